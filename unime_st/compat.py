"""Private and patched names of other libraries, all in this file, each with the version it was checked on.

Functions below wrap or patch what sentence-transformers, transformers, mteb, peft and huggingface_hub do not promise to
keep. :data:`PRIVATE_NAMES` lists every such name, those included that our classes override or call in place.
``tests/test_compat.py`` fails when an installed version no longer has one of them. Cheap to import: the libraries are
imported inside the functions.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from mteb.abstasks import AbsTask
    from mteb.benchmarks.benchmark import Benchmark
    from mteb.models import ModelMeta
    from torch import nn

CHECKED = {
    "sentence_transformers": "6.2.0",
    "transformers": "5.23.0",
    "mteb": "2.26.24",
    "peft": "0.21.2",
    "huggingface_hub": "2.4.0",
}
"""Version of each library that the names in this file were checked on."""


@dataclass(frozen=True)
class PrivateName:
    """A name that its library does not promise to keep.

    Args:
        path: ``module:Class.attribute`` or ``module:attribute``.
        parameters: Parameters that we pass or override by name, or receive by position.
        use: What we need it for.
    """

    path: str
    parameters: tuple[str, ...] = ()
    use: str = ""


PRIVATE_NAMES = (
    # Patched here.
    PrivateName(
        "sentence_transformers.base.model:BaseModel.__init__",
        ("self", "model_name_or_path", "local_files_only"),
        "resolves aliases, see patch_sentence_transformers",
    ),
    PrivateName(
        "transformers:AutoConfig.from_pretrained", (), "registers our model types first, see patch_auto_class"
    ),
    PrivateName("transformers:AutoProcessor.from_pretrained", (), "the same"),
    PrivateName("transformers:AutoImageProcessor.from_pretrained", (), "the same"),
    PrivateName(
        "transformers.utils.output_capturing:install_output_capuring_hook",
        ("module",),
        "its hooks are closures and cannot be pickled, see patch_output_capturing",
    ),
    PrivateName(
        "transformers.utils.output_capturing:_CAN_RECORD_REGISTRY",
        (),
        "lacks models that arrived by pickle, see patch_output_capturing",
    ),
    PrivateName("mteb.get_tasks:_TASKS_REGISTRY", (), "mteb has no plug-in interface for tasks"),
    PrivateName("mteb.get_tasks:TASK_LIST", (), "the same"),
    PrivateName("mteb.models.model_implementations:MODEL_REGISTRY", (), "nor for models"),
    PrivateName("mteb.benchmarks.get_benchmark:_build_registry.cache_clear", (), "nor for benchmarks"),
    PrivateName("mteb.benchmarks.get_benchmark:_build_aliases_registry.cache_clear", (), "the same"),
    PrivateName("mteb.cli.build_cli:run", ("args",), "mteb prints no scores; ours go below its own output"),
    # Called here.
    PrivateName(
        "sentence_transformers.base.model:BaseModel._resolve_inference_device",
        ("self", "device"),
        "default device of `encode`",
    ),
    PrivateName(
        "transformers:Qwen2VLProcessor._get_num_multimodal_tokens", ("self", "image_sizes"), "image tokens by size"
    ),
    PrivateName("transformers:PreTrainedModel._hf_peft_config_loaded", (), "must be False once the adapter is merged"),
    PrivateName(
        "huggingface_hub.file_download:http_get",
        ("temp_file", "resume_size", "headers", "expected_size"),
        "resumed downloads",
    ),
    PrivateName(
        "huggingface_hub.file_download:repo_folder_name", ("repo_id", "repo_type"), "layout of the hub's cache"
    ),
    PrivateName("huggingface_hub.utils:WeakFileLock", ("lock_file",), "downloads of one file by several processes"),
    PrivateName("huggingface_hub.file_download:_download_to_tmp_and_move", (), "deletes what it could not finish"),
    # Overridden or called in place, by classes that derive from theirs.
    PrivateName(
        "sentence_transformers.base.model:BaseModel._load_default_modules",
        ("self", "model_name_or_path"),
        "UniME refuses bare backbones",
    ),
    PrivateName(
        "sentence_transformers:SentenceTransformer._inference",
        ("self", "inputs", "output_value", "save_to_cpu", "show_progress_bar"),
        "UniME runs the engine of unime_st.encoding",
    ),
    PrivateName(
        "sentence_transformers.base.model:BaseModel._multi_process", ("self", "inputs"), "UniME embeds an input once"
    ),
    PrivateName("transformers:Trainer._save_checkpoint", ("self", "model", "trial"), "errors name the folder"),
    PrivateName(
        "transformers:Trainer._save_rng_state", ("self", "output_dir"), "all processes write before the first"
    ),
    PrivateName(
        "transformers:Trainer._load_from_checkpoint",
        ("self", "resume_from_checkpoint", "model"),
        "sharded checkpoints are transformers' own",
    ),
    PrivateName(
        "sentence_transformers.base.trainer:BaseTrainer._load_from_checkpoint", ("self", "checkpoint_path"), "others"
    ),
    PrivateName(
        "transformers:ProcessorMixin._get_arguments_from_pretrained",
        ("pretrained_model_name_or_path", "processor_dict"),
        "the recipe chooses the backend of the image processor",
    ),
    PrivateName("transformers:ProcessorMixin._merge_kwargs", ("self", "tokenizer_init_kwargs"), "Phi-3.5-Vision"),
    PrivateName("transformers.processing_utils:MODALITY_TO_AUTOPROCESSOR_MAPPING", (), "parts of a processor"),
    PrivateName("transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected", (), "embedders drop the head"),
    PrivateName("transformers:PreTrainedModel._no_split_modules", (), "units that accelerate shards"),
    PrivateName(
        "mteb.abstasks:AbsTask._evaluate_subset",
        ("self", "model", "data_split", "encode_kwargs", "hf_split", "hf_subset", "prediction_folder"),
        "preference tasks score pairs",
    ),
    PrivateName(
        "mteb.abstasks:AbsTask._save_task_predictions",
        ("self", "predictions", "model", "prediction_folder", "hf_split", "hf_subset"),
        "predictions for `unime report`",
    ),
    PrivateName("mteb.abstasks:AbsTask._support_search", (), "two-stage models on preference tasks"),
)


# sentence-transformers


def patch_sentence_transformers(resolve: Callable[[str, bool], str | None]) -> None:
    """Let every Sentence Transformers class resolve our aliases before it turns to the hub.

    Args:
        resolve: Gets a model name that is no folder, and whether the hub may not be asked; returns the folder of an
            alias, None for other names.
    """
    from sentence_transformers.base.model import BaseModel

    original = BaseModel.__init__

    @functools.wraps(original)
    def init(self: BaseModel, model_name_or_path: str | None = None, **kwargs: Any) -> None:
        if isinstance(model_name_or_path, str) and not os.path.isdir(model_name_or_path):
            found = resolve(model_name_or_path, bool(kwargs.get("local_files_only", False)))
            model_name_or_path = model_name_or_path if found is None else found
        original(self, model_name_or_path, **kwargs)

    setattr(BaseModel, "__init__", init)  # noqa: B010  # mypy takes a plain assignment for a mistake


def inference_device(model: Any, device: int | str | torch.device | None) -> torch.device:
    """Device that ``model.encode(device=device)`` runs on.

    Args:
        model: A Sentence Transformers model.
        device: As given to ``encode``; None is where the model is.
    """
    found: torch.device = model._resolve_inference_device(device)
    return found


# transformers


def patch_auto_class(name: str, before_first_load: Callable[[], None]) -> None:
    """Run an action before the first ``from_pretrained`` of one of transformers' Auto classes.

    Args:
        name: ``"AutoConfig"``, ``"AutoProcessor"`` or ``"AutoImageProcessor"``.
        before_first_load: Registers our model types; importing them is worth it only then.
    """
    kind = {"AutoConfig": "configuration", "AutoProcessor": "processing", "AutoImageProcessor": "image_processing"}
    # Not from `transformers`, which is still being imported when this runs.
    auto_class: Any = getattr(importlib.import_module(f"transformers.models.auto.{kind[name]}_auto"), name)
    original = auto_class.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        auto_class.from_pretrained = original
        before_first_load()
        return cls.from_pretrained(*args, **kwargs)

    auto_class.from_pretrained = classmethod(functools.wraps(original.__func__)(from_pretrained))


class OutputHook:
    """Forward hook with which transformers records outputs, made picklable.

    Args:
        *args: Arguments of ``install_output_capuring_hook`` after the module.
        **kwargs: The same by name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from torch import nn
        from transformers.utils import output_capturing

        patch_output_capturing()
        self._args, self._kwargs = args, kwargs
        install = output_capturing.install_output_capuring_hook
        probe = nn.Module()
        getattr(install, "__wrapped__", install)(probe, *args, **kwargs)
        (self._hook,) = probe._forward_hooks.values()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Record the output of a module; see :meth:`torch.nn.Module.register_forward_hook`."""
        return self._hook(module, args, output)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments; the hook itself is made again."""
        return functools.partial(OutputHook, **self._kwargs), self._args


def patch_output_capturing() -> None:
    """Let models of transformers survive pickling before and after their first forward pass.

    transformers records hidden states with forward hooks that are closures, which cannot be pickled, and looks up what
    to record in a table that it fills when a model is built. A model that arrives in another process by pickle was
    never built there, so LLaVA models would fail. A second call changes nothing.
    """
    from transformers.utils import output_capturing

    install = output_capturing.install_output_capuring_hook
    if hasattr(install, "__wrapped__"):
        return

    @functools.wraps(install)
    def install_picklable(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        module.register_forward_hook(OutputHook(*args, **kwargs))

    output_capturing.install_output_capuring_hook = install_picklable
    table: Any = type(output_capturing._CAN_RECORD_REGISTRY)
    registered = table.get

    def get(self: Any, model: Any, *default: Any) -> Any:
        return registered(self, model, *default) or getattr(model, "_can_record_outputs", None) or {}

    table.get = get


def image_token_counter(processor: object) -> Callable[[list[list[int]]], list[int]] | None:
    """Function that gives the number of image tokens for sizes ``[height, width]``; None where transformers has none.

    Args:
        processor: Processor of a vision-language model.
    """
    if (count := getattr(processor, "_get_num_multimodal_tokens", None)) is None:
        return None
    return lambda sizes: list(count(image_sizes=sizes)["num_image_tokens"])


def forget_adapter(model: Any) -> None:
    """Tell a transformers model that it has no adapter any more, so that it saves a plain full model.

    Args:
        model: A model whose adapter layers have been replaced by their merged base layers.
    """
    model._hf_peft_config_loaded = False


def hub_commit(config: object) -> str | None:
    """Commit of the hub repository that a configuration was loaded from, None for a local folder.

    Args:
        config: Configuration of a transformers model.
    """
    return getattr(config, "_commit_hash", None)


# mteb


def add_mteb_task(task: type[AbsTask]) -> bool:
    """Make mteb find a task class by its name; a name that mteb already has stays mteb's.

    Args:
        task: The class.

    Returns:
        bool: Whether the name now stands for this class.

    Raises:
        RuntimeError: mteb has no task registry where we know it.
    """
    import mteb.tasks

    importlib.import_module("mteb.get_tasks")
    # The attribute `mteb.get_tasks` is the function of that name, which hides the module.
    home: Any = sys.modules["mteb.get_tasks"]
    registry = getattr(home, "_TASKS_REGISTRY", None)
    if registry is None:
        raise RuntimeError(f"this version of mteb keeps its tasks elsewhere: install mteb {CHECKED['mteb']}")
    name = task.metadata.name
    if name in registry:
        return registry[name] is task
    registry[name] = task
    home.TASK_LIST = (*home.TASK_LIST, task)
    setattr(mteb.tasks, task.__name__, task)
    return True


def add_mteb_model(name: str, meta: ModelMeta) -> None:
    """Make mteb find a model by its short and by its full name; a name that mteb already has stays mteb's.

    Args:
        name: What users pass to ``mteb run -m``.
        meta: Its description; mteb reads results back by ``meta.name``.
    """
    from mteb.models.model_implementations import MODEL_REGISTRY

    MODEL_REGISTRY.setdefault(name, meta)
    if meta.name is not None:
        MODEL_REGISTRY.setdefault(meta.name, meta)


def add_mteb_benchmark(benchmark: Benchmark) -> None:
    """Make mteb find a benchmark by its name.

    Args:
        benchmark: The benchmark.
    """
    import mteb.benchmarks.benchmarks as home

    importlib.import_module("mteb.benchmarks.get_benchmark")
    lookup: Any = sys.modules["mteb.benchmarks.get_benchmark"]
    attribute = "".join(letter if letter.isalnum() else "_" for letter in benchmark.name).strip("_").upper()
    if not hasattr(home, attribute):
        setattr(home, attribute, benchmark)
        lookup._build_registry.cache_clear()
        lookup._build_aliases_registry.cache_clear()
