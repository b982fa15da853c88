"""Table of the private and patched names of other libraries, with the versions they were checked on.

:mod:`unime_st.compat` uses most of them; the rest are names that our classes override or call in place.
``tests/test_compat.py`` fails when an installed version no longer has one of them.
"""

from __future__ import annotations

from typing import NamedTuple

CHECKED = {
    "sentence_transformers": "6.2.0",
    "transformers": "5.23.0",
    "mteb": "2.26.24",
    "peft": "0.21.2",
    "huggingface_hub": "2.4.0",
    "pillow": "13.0.0",
    "torch": "2.15.0",
}
"""Version of each library that the names of this package were checked on."""


class PrivateName(NamedTuple):
    """A name that its library does not promise to keep: ``module:attribute``, parameters relied on, what it is for."""

    path: str
    parameters: tuple[str, ...]
    use: str


PRIVATE_NAMES = tuple(
    PrivateName(path, tuple(parameters.split()), use)
    for path, parameters, use in (
        ("torch:ops.aten._flash_attention_forward", "", "the kernel behind sdpa, for sequences in one row"),
        # Patched here.
        ("sentence_transformers.base.model:BaseModel.__init__", "self model_name_or_path", "resolves aliases"),
        ("sentence_transformers.base.modules:Transformer.max_seq_length", "", "bare backbones store no truncation"),
        (
            "sentence_transformers.base.modules:Transformer._chat_template_suffix_ids",
            "self conversation",
            "the end of the prompt is restored in rows with images",
        ),
        ("sentence_transformers.base.modules:Transformer.preprocess", "self inputs", "errors name the image file"),
        ("transformers:AutoConfig.from_pretrained", "", "registers our model types first"),
        ("transformers:AutoProcessor.from_pretrained", "", "registers our model types first"),
        ("transformers:AutoImageProcessor.from_pretrained", "", "registers our model types first"),
        ("transformers.modeling_utils:maybe_load_adapters", "", "aliases as bases of adapters"),
        ("transformers.models.auto.auto_factory:resolve_revision", "path_or_repo_id revision", "no request for them"),
        ("peft.config:PeftConfigMixin.save_pretrained", "self save_directory", "writes them"),
        ("peft.config:PeftConfigMixin.from_pretrained", "pretrained_model_name_or_path", "reads them"),
        ("transformers.utils.output_capturing:install_output_capuring_hook", "module", "its closures do not pickle"),
        ("transformers.utils.output_capturing:_CAN_RECORD_REGISTRY", "", "lacks models that arrived by pickle"),
        ("mteb.get_tasks:_TASKS_REGISTRY", "", "mteb has no plug-in interface"),
        ("mteb.models.model_implementations:MODEL_REGISTRY", "", "mteb has no plug-in interface"),
        ("mteb.models.get_model_meta:_MODEL_RENAMES", "", "second names without second entries"),
        ("mteb.benchmarks.get_benchmark:_build_registry.cache_clear", "", "mteb has no plug-in interface"),
        ("mteb.benchmarks.get_benchmark:_build_aliases_registry.cache_clear", "", "mteb has no plug-in interface"),
        ("mteb.evaluate:evaluate", "model tasks", "drops the images of a SentenceTransformer object"),
        ("mteb.models:ModelMeta._resolve_extras_groups", "", "demands torchcodec of models that take videos"),
        ("mteb.models.get_model_meta:get_model_meta", "model_name", "models of folders that variables name later"),
        ("mteb.evaluate:_check_cache", "task meta cache overwrite_strategy", "ignores the revision of the data"),
        ("mteb.cli.build_cli:run", "args", "prints no scores"),
        # Called here or in place.
        ("sentence_transformers.base.model:BaseModel._resolve_inference_device", "self device", "device of encode"),
        ("transformers:Qwen2VLProcessor._get_num_multimodal_tokens", "self image_sizes", "image tokens by size"),
        ("transformers:PreTrainedModel._hf_peft_config_loaded", "", "must be False once an adapter is merged"),
        ("transformers:ProcessorMixin._merge_kwargs", "self tokenizer_init_kwargs", "options of Phi-3.5-Vision"),
        ("transformers.processing_utils:MODALITY_TO_AUTOPROCESSOR_MAPPING", "", "parts of a processor"),
        ("huggingface_hub.file_download:http_get", "temp_file resume_size headers expected_size", "resumed downloads"),
        ("huggingface_hub.file_download:repo_folder_name", "repo_id repo_type", "layout of the hub's cache"),
        ("huggingface_hub.file_download:_download_to_tmp_and_move", "", "deletes what it could not finish"),
        ("huggingface_hub.utils:WeakFileLock", "lock_file", "downloads of one file by several processes"),
        ("mteb.abstasks:AbsTask._save_task_predictions", "predictions model prediction_folder", "for `unime report`"),
        # Overridden by classes that derive from theirs.
        (
            "sentence_transformers.base.model:BaseModel._load_default_modules",
            "model_name_or_path",
            "no bare backbones",
        ),
        ("sentence_transformers:SentenceTransformer._inference", "inputs output_value save_to_cpu", "our engine"),
        ("sentence_transformers.base.model:BaseModel._multi_process", "self inputs", "an input is embedded once"),
        ("transformers:Trainer._save_checkpoint", "self model trial", "errors name the folder"),
        ("transformers:Trainer._save_rng_state", "self output_dir", "all processes write before the first"),
        ("transformers:Trainer._load_from_checkpoint", "resume_from_checkpoint model", "sharded checkpoints"),
        (
            "sentence_transformers.base.trainer:BaseTrainer._load_from_checkpoint",
            "checkpoint_path",
            "whole checkpoints",
        ),
        ("transformers:ProcessorMixin._get_arguments_from_pretrained", "processor_dict", "backend of the recipe"),
        ("transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected", "", "embedders drop the language head"),
        ("transformers:PreTrainedModel._no_split_modules", "", "units that accelerate shards"),
        ("mteb.abstasks:AbsTask._evaluate_subset", "model data_split encode_kwargs hf_split", "pairs are scored"),
        ("mteb.abstasks:AbsTask._support_search", "", "two-stage models on preference tasks"),
        ("PIL.Image:Image._new", "self im", "a decoded image is not copied"),
    )
)
"""Every such name, with its use."""
