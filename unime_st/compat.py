"""Private and patched names of other libraries, all in this file.

Functions below wrap or patch what sentence-transformers, transformers, mteb, peft and huggingface_hub do not promise
to keep. :mod:`unime_st.private_names` lists these names with the versions they were checked on. Cheap to import: the
libraries are imported inside the functions.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unime_st.paths import adapter_base
from unime_st.private_names import CHECKED

if TYPE_CHECKING:
    import torch
    from huggingface_hub import CardData
    from mteb.abstasks import AbsTask
    from mteb.benchmarks.benchmark import Benchmark
    from mteb.models import ModelMeta
    from PIL import Image
    from sentence_transformers.base.model import BaseModel
    from sentence_transformers.base.modules import Transformer
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


# sentence-transformers


def patch_sentence_transformers(
    resolve: Callable[[str, bool], str | None],
    check: Callable[[type, Path], None],
    card_data: Callable[[type, Path, bool], CardData | None],
) -> None:
    """Let every Sentence Transformers class resolve our aliases before it turns to the hub.

    Args:
        resolve: Gets a model name, and whether the hub may not be asked; returns the folder of an alias, None for
            folders and other names.
        check: Gets the class and the folder; raises an error if the folder holds another kind of model.
        card_data: Gets the class, the folder and whether the hub may not be asked; returns the data of the model card,
            None for folders of others.
    """
    from sentence_transformers.base.model import BaseModel

    original = BaseModel.__init__

    @functools.wraps(original)
    def init(self: BaseModel, model_name_or_path: str | None = None, **kwargs: Any) -> None:
        offline = bool(kwargs.get("local_files_only", False))
        if isinstance(model_name_or_path, str):
            model_name_or_path = resolve(model_name_or_path, offline) or model_name_or_path
        if model_name_or_path and (folder := Path(model_name_or_path)).is_dir():
            check(type(self), folder)
            if (base := adapter_base(folder)) is not None:
                resolve(base, offline)  # so that it is on this machine, see patch_peft
            if kwargs.get("model_card_data") is None:
                kwargs["model_card_data"] = card_data(type(self), folder, offline)
        original(self, model_name_or_path, **kwargs)

    setattr(BaseModel, "__init__", init)  # noqa: B010  # mypy takes a plain assignment for a mistake


def patch_max_seq_length() -> None:
    """Let ``max_seq_length`` truncate the rows of embedders in folders of bare backbones, from when it is set.

    Such folders store ``truncation=False``, because the processors of transformers cut off the end of the prompt of
    rows with images, where the embedding is read. Until a length is set, theirs is None. Setting one also stores
    ``truncation="only_first"``: the same for single rows, and the mark that the end of the prompt is restored in rows
    with images, too.
    """
    from sentence_transformers.base.modules.transformer import Transformer

    stock: Any = Transformer.max_seq_length
    suffix = Transformer._chat_template_suffix_ids

    def get_max_seq_length(self: Transformer) -> int | None:
        endless = _truncation(self) is False and self.transformer_task == "feature-extraction"
        return None if endless else stock.fget(self)

    def set_max_seq_length(self: Transformer, value: int | None) -> None:
        if _truncation(self) in (False, _CUT_ON_REQUEST):
            if self.transformer_task != "feature-extraction":
                logger.warning("max_seq_length has no effect: a pair is never truncated, see docs/checkpoints.md")
            else:
                text = {**self.processing_kwargs["text"], "truncation": False if value is None else _CUT_ON_REQUEST}
                self.processing_kwargs = {**self.processing_kwargs, "text": text}
                if value is None:
                    return
        stock.fset(self, value)

    @functools.wraps(suffix)
    def chat_template_suffix_ids(self: Transformer, conversation: Any, *args: Any, **kwargs: Any) -> list[int]:
        if _truncation(self) == _CUT_ON_REQUEST:
            conversation = [_without_images(message) for message in conversation]
        return suffix(self, conversation, *args, **kwargs)

    setattr(Transformer, "max_seq_length", property(get_max_seq_length, set_max_seq_length))  # noqa: B010
    setattr(Transformer, "_chat_template_suffix_ids", chat_template_suffix_ids)  # noqa: B010


_CUT_ON_REQUEST = "only_first"


def patch_preprocess(error_of: Callable[[object], Exception | None]) -> None:
    """Let errors of image decoders name the file in folders of bare backbones, whose processors are transformers' own.

    Args:
        error_of: Gets an input; returns an error that names the image file that cannot be decoded, None if all can.
    """
    from sentence_transformers.base.modules.transformer import Transformer

    original = Transformer.preprocess

    @functools.wraps(original)
    def preprocess(self: Transformer, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return original(self, inputs, *args, **kwargs)
        except Exception as error:
            if _truncation(self) in (False, _CUT_ON_REQUEST):
                for value in inputs:
                    if (named := error_of(value)) is not None:
                        raise named from error
            raise

    setattr(Transformer, "preprocess", preprocess)  # noqa: B010


def _truncation(transformer: Transformer) -> object:
    return (getattr(transformer, "processing_kwargs", None) or {}).get("text", {}).get("truncation")


def _without_images(message: dict[str, object]) -> dict[str, object]:
    if not isinstance(content := message.get("content"), list):
        return message
    return {**message, "content": [part for part in content if part.get("type") == "text"]}


def inference_device(model: BaseModel, device: int | str | torch.device | None) -> torch.device:
    """Device that ``encode(device=device)`` of a Sentence Transformers model runs on."""
    found: torch.device = model._resolve_inference_device(device)
    return found


# transformers


def patch_auto_class(module: str, name: str, before_first_load: Callable[[], None]) -> None:
    """Run an action before the first ``from_pretrained`` of one of transformers' Auto classes.

    ``module`` is the one of the class; not ``transformers``, which is still being imported when this runs.
    """
    auto_class: Any = getattr(importlib.import_module(module), name)
    original = auto_class.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        auto_class.from_pretrained = original
        before_first_load()
        return cls.from_pretrained(*args, **kwargs)

    auto_class.from_pretrained = classmethod(functools.wraps(original.__func__)(from_pretrained))


def patch_adapter_base(folder_of: Callable[[str], Path | None]) -> None:
    """Let transformers load the base of an adapter by its alias, see :func:`patch_peft` for ``folder_of``."""
    from transformers import modeling_utils

    original = modeling_utils.maybe_load_adapters

    @functools.wraps(original)
    def maybe_load_adapters(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        adapter, base, rest = original(*args, **kwargs)
        folder = folder_of(base) if adapter is not None and isinstance(base, str) else None
        return adapter, base if folder is None else str(folder), rest

    modeling_utils.maybe_load_adapters = maybe_load_adapters


def patch_adapter_revision(folder_of: Callable[[str], Path | None]) -> None:
    """Keep transformers from asking the hub for the commit of an alias, see :func:`patch_peft` for ``folder_of``."""
    from transformers.models.auto import auto_factory

    original = auto_factory.resolve_revision

    @functools.wraps(original)
    def resolve_revision(path_or_repo_id: Any, revision: str | None = None, **kwargs: Any) -> str | None:
        if isinstance(path_or_repo_id, str) and folder_of(path_or_repo_id) is not None:
            return revision
        return original(path_or_repo_id, revision, **kwargs)

    auto_factory.resolve_revision = resolve_revision


def patch_peft(folder_of: Callable[[str], Path | None], alias_of: Callable[[str], str | None]) -> None:
    """Let adapters name the alias of their base on disk, not a path of this machine, and its folder in memory.

    Args:
        folder_of: Gets the name of a base; returns the folder of an alias that is on this machine, else None.
        alias_of: Gets the name of a base; returns the alias of one of our folders, else None.
    """
    from peft.config import PeftConfigMixin

    save, load = PeftConfigMixin.save_pretrained, PeftConfigMixin.__dict__["from_pretrained"].__func__

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str, **kwargs: Any) -> None:
        base = self.base_model_name_or_path
        self.base_model_name_or_path = (alias_of(base) if base else None) or base
        try:
            save(self, save_directory, **kwargs)
        finally:
            self.base_model_name_or_path = base

    @functools.wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        config = load(cls, *args, **kwargs)
        base = getattr(config, "base_model_name_or_path", None)
        if base and (folder := folder_of(base)) is not None:
            config.base_model_name_or_path = str(folder)
        return config

    setattr(PeftConfigMixin, "save_pretrained", save_pretrained)  # noqa: B010
    setattr(PeftConfigMixin, "from_pretrained", classmethod(from_pretrained))  # noqa: B010


class OutputHook:
    """Forward hook with which transformers records outputs, made picklable."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from torch import nn
        from transformers.utils import output_capturing

        patch_output_capturing()
        self._args, self._kwargs = args, kwargs
        install = output_capturing.install_output_capuring_hook
        probe = nn.Module()
        getattr(install, "__wrapped__", install)(probe, *args, **kwargs)
        (self._hook,) = probe._forward_hooks.values()

    def __call__(self, module: nn.Module, args: object, output: object) -> object:
        """Record the output of a module; see :meth:`torch.nn.Module.register_forward_hook`."""
        return self._hook(module, args, output)

    def __reduce__(self) -> tuple[object, ...]:
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
    """Function that counts the image tokens of sizes ``[height, width]``; None where transformers has none."""
    if (count := getattr(processor, "_get_num_multimodal_tokens", None)) is None:
        return None
    return lambda sizes: list(count(image_sizes=sizes)["num_image_tokens"])


def forget_adapter(model: PreTrainedModel) -> None:
    """Tell a transformers model whose adapter layers were merged that it has no adapter, so that it saves all weights."""
    model._hf_peft_config_loaded = False


def forget_adapter_names(model: Any) -> None:
    """Let a transformers model that was loaded from the folder of an adapter save its weights under its own names."""
    model._weight_conversions = None


def hub_commit(config: object) -> str | None:
    """Commit of the hub repository that a transformers configuration was loaded from, None for a local folder."""
    return getattr(config, "_commit_hash", None)


# mteb


def add_mteb_task(task: type[AbsTask]) -> None:
    """Make mteb find a task class by its name; a name that mteb already has stays mteb's.

    Selections by language, type or modality (``mteb.get_tasks`` without names) do not include the task: they would be
    other evaluations than without this package. RuntimeError if mteb has no task registry where we know it.
    """
    import mteb.tasks

    importlib.import_module("mteb.get_tasks")
    # The attribute `mteb.get_tasks` is the function of that name, which hides the module.
    home: Any = sys.modules["mteb.get_tasks"]
    registry = getattr(home, "_TASKS_REGISTRY", None)
    if registry is None:
        raise RuntimeError(f"this version of mteb keeps its tasks elsewhere: install mteb {CHECKED['mteb']}")
    name = task.metadata.name
    if name not in registry:
        registry[name] = task
        setattr(mteb.tasks, task.__name__, task)
    elif registry[name] is not task:
        logger.warning("mteb already has a task named %s: ours is not registered", name)


def add_mteb_model(name: str, meta: ModelMeta) -> None:
    """Make mteb find a model by its full name, and by another one; a name that mteb already has stays mteb's."""
    from mteb.models.model_implementations import MODEL_REGISTRY

    known = MODEL_REGISTRY.setdefault(str(meta.name), meta)
    if known.loader is meta.loader and known != meta:  # ours, of another folder
        MODEL_REGISTRY[str(meta.name)] = meta
    if name not in MODEL_REGISTRY:  # an entry of its own would list the model twice
        # The attribute `mteb.models.get_model_meta` may be the function of that name.
        importlib.import_module("mteb.models.get_model_meta")._MODEL_RENAMES.setdefault(name, str(meta.name))
        warnings.filterwarnings("ignore", f"The model '{re.escape(name)}' has been renamed", DeprecationWarning)


def add_mteb_benchmark(benchmark: Benchmark) -> None:
    """Make mteb find a benchmark by its name."""
    import mteb.benchmarks.benchmarks as home

    importlib.import_module("mteb.benchmarks.get_benchmark")
    lookup: Any = sys.modules["mteb.benchmarks.get_benchmark"]
    attribute = "".join(letter if letter.isalnum() else "_" for letter in benchmark.name).strip("_").upper()
    if not hasattr(home, attribute):
        setattr(home, attribute, benchmark)
        lookup._build_registry.cache_clear()
        lookup._build_aliases_registry.cache_clear()


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]  # gets a function; returns the one that replaces it


def patch_mteb_functions(evaluate: Wrap, check_cache: Wrap, get_model_meta: Wrap) -> None:
    """Wrap ``mteb.evaluate``, its look at stored scores, and ``mteb.get_model_meta``, which ``mteb.get_model`` calls."""
    import mteb

    # The attributes of `mteb` are the functions of these names, which hide the modules.
    home: Any = sys.modules["mteb.evaluate"]
    home.evaluate = mteb.evaluate = evaluate(home.evaluate)
    home._check_cache = check_cache(home._check_cache)
    models: Any = importlib.import_module("mteb.models.get_model_meta")
    models.get_model_meta = mteb.get_model_meta = get_model_meta(models.get_model_meta)


def patch_mteb_run(wrap: Wrap) -> None:
    """Wrap the command ``mteb run`` in the same way."""
    from mteb.cli import build_cli

    home: Any = build_cli
    home.run = wrap(home.run)


# Pillow


def plain_image(image: Image.Image) -> Image.Image:
    """A loaded image without the file it comes from: what ``Image.copy`` returns, with the pixels themselves."""
    return image._new(image.im)
