"""Options that all training stages share, beside those of the stock trainers under their stock names."""

from __future__ import annotations

import os
import warnings
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from typing import Literal

from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.base.training_args import BaseTrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from unime_st.former_names import FormerNames
from unime_st.options import OptionError, check_options, option, options_of
from unime_st.training.processes import computes_on_cpu

MUON = "muon"
"""Value of ``optim`` for :class:`unime_st.training.muon.Muon`; the others are transformers'."""
LANGUAGE_MODEL_LAYERS = (
    r"^(?!.*(visual|vision|image)).*\.(q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_proj|up_proj|gate_up_proj|down_proj)$"
)
"""Linear layers of the language model, in every supported family; vision tower and projector have no adapter."""

_DECIDED = {
    "batch_sampler": "batches are drawn over all processes, no item twice; see dataset_temperature and sub_batch_size",
    "multi_dataset_batch_sampler": "all datasets are one table; see dataset_temperature and sub_batch_size",
    "train_sampling_strategy": "batches are drawn over all processes; see dataset_temperature and sub_batch_size",
    "auto_find_batch_size": "the batch is a part of the loss; `token_budget auto` finds what fits the memory",
    "prompts": "see query_prompt and document_prompt",
    "router_mapping": "models of this package have no router",
    "label_smoothing_factor": "the losses have no class labels",
    "neftune_noise_alpha": "the loss embeds every item twice, and its noise would differ",
    "use_liger_kernel": "its fused losses do not apply to embeddings",
    "include_for_metrics": "the evaluator takes embeddings",
    "save_only_model": "a killed run could not be resumed",
    "ignore_data_skip": "a resumed run goes on with the same rows",
    "enable_jit_checkpoint": "a killed run resumes from its last checkpoint; see save_steps",
    "torch_compile": "mini-batches differ in shape, so every one would be compiled anew",
}
"""Stock options that a stage decides itself, and why."""

_NO_PART_OF_RESULT = (
    *("output", "output_dir", "overwrite", "resume", "resume_from_checkpoint", "dry_run"),
    *("vision_cache", "item_cache"),
    *("run_name", "project", "report_to", "disable_tqdm", "use_cpu", "full_determinism", "skip_memory_metrics"),
    *("do_train", "do_eval", "do_predict", "local_rank", "log_on_each_node", "debug", "deepspeed"),
    *("logging_", "log_level", "save_", "hub_", "push_to_hub", "trackio_", "ddp_", "fsdp", "dataloader_num_workers"),
    *("dataloader_pin", "dataloader_persistent", "dataloader_prefetch", "dataloader_multi", "dataloader_in_order"),
    *("eval_", "per_device_eval", "restore_callback", "accelerator_config", "parallelism_config"),
)
"""Beginnings of the names of options that may differ between a run and its resumption."""


@dataclass
class StageArguments(BaseTrainingArguments, metaclass=FormerNames):
    """Options that embedding stages and the reranker share: those of the stock trainers, and these.

    Args:
        **options: See ``unime STAGE --help``. Those of :class:`transformers.TrainingArguments` have their stock names.

    Raises:
        OptionError: If an option has a value that it cannot have.
    """

    model: str = option("unime-tiny", "Alias, folder or hub name of the model to start from.")
    data: str = option(
        "",
        "Folder of records.",
        required=True,
        path="stage",
        made_by="unime import --source FILE --output FOLDER",
    )
    output: str = option("", "Folder for the trained model; a finished one is kept.", required=True)
    overwrite: bool = option(False, "Overwrite the output folder.")
    resume: bool = option(True, "Go on from the last checkpoint of a killed run.")
    dry_run: bool = option(False, "Print the plan (steps, tokens, memory, time) and stop.")
    max_steps: int = option(-1, "Optimizer steps; -1 trains for num_train_epochs.", unit="steps", at_least=-1)
    num_train_epochs: float = option(
        1.0, "Passes over the data if max_steps is -1.", unit="epochs", above=0, old="epochs"
    )
    per_device_train_batch_size: int = option(64, "Batch size per device.", unit="rows", at_least=1, old="batch_size")
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", unit="batches", at_least=1)
    mini_batch_size: int | None = option(
        None, "Items embedded at a time (gradient caching); none, without token_budget: the whole batch.",
        unit="items", at_least=1,
    )  # fmt: skip
    dataloader_drop_last: bool = option(True, "Drop the last incomplete batch of an epoch.", old="drop_last")
    learning_rate: float = option(1e-4, "Peak learning rate.", above=0)
    lr_scheduler_type: SchedulerType | str = option("linear", "Learning-rate schedule.", old="scheduler")
    warmup_steps: float = option(
        0.1, "Learning-rate warm-up: steps, or below 1 the fraction of all steps.", unit="steps", at_least=0
    )
    warmup_ratio: float | None = option(
        None, "Former name of warmup_steps for a fraction of all steps.", at_least=0, below=1
    )
    max_grad_norm: float = option(1.0, "Maximum gradient norm (clipping threshold); 0: no clipping.", at_least=0)
    optim: OptimizerNames | Literal["muon"] | str = option(
        "adamw_torch_fused", "Optimizer of transformers, or muon: Muon for linear layers, AdamW for the other weights."
    )
    lora_rank: int = option(16, "Rank of the LoRA adapter; 0 trains all weights.", at_least=0)
    lora_alpha: int = option(64, "LoRA scale: the update is alpha / rank times B A.", at_least=1)
    lora_dropout: float = option(0.1, "Dropout probability on the adapter's input.", at_least=0, below=1)
    lora_targets: str = option(LANGUAGE_MODEL_LAYERS, "Layers with an adapter: regular expression, or all-linear.")
    frozen: str | None = option(
        None, "With lora_rank 0: regular expression of the weights that are not trained, e.g. visual|vision."
    )
    use_dora: bool = option(False, "DoRA instead of LoRA (the released V2 scripts).")
    quantize: str | None = option(
        None, "Quantization of the frozen weights under the adapter (QLoRA, extra `qlora`).", choices=("nf4", "int8")
    )
    bf16: bool = option(False, "Computation in bfloat16 (mixed precision); default float32.", old="precision=bf16")
    fp16: bool = option(False, "Computation in float16 (mixed precision); default float32.", old="precision=fp16")
    weights: str = option(
        "auto", "Precision of the weights; auto: that of the computation under an adapter, else fp32.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )  # fmt: skip
    gradient_checkpointing: bool | None = option(None, "Recomputation of activations, to save memory.")
    dataloader_num_workers: int = option(
        0, "Processes that decode images ahead of the model.", unit="processes", at_least=0, old="workers"
    )
    save_steps: float = option(
        100, "Interval of checkpoints; a killed run resumes from the last one.", unit="steps", above=0,
        old="save_every",
    )  # fmt: skip
    save_total_limit: int | None = option(2, "Checkpoints that are kept.", unit="checkpoints", at_least=1)
    logging_steps: float = option(10, "Interval of the loss curve.", unit="steps", above=0, old="log_every")
    logging_nan_inf_filter: bool = option(False, "Leave NaN and infinite losses out of the log.")
    report_to: str | list[str] = option("none", "Experiment trackers, such as tensorboard or wandb; all; none.")
    eval_data: str | None = option(
        None, "Folder of held-out records: hit@1 and MRR while training.", path="stage",
        made_by="unime import --source FILE --output FOLDER",
    )  # fmt: skip
    eval_strategy: IntervalStrategy | str = option(
        "no", "When eval_data is evaluated; with eval_data the default is steps."
    )
    eval_steps: float | None = option(
        None, "Interval of evaluations; none: that of checkpoints.", unit="steps", above=0
    )
    per_device_eval_batch_size: int = option(64, "Batch size of the evaluation.", unit="items", at_least=1)
    metric_for_best_model: str | None = option(
        None, "Metric of load_best_model_at_end and of early stopping; none: mrr@10.",
        choices=("mrr@10", "hit@1", "eval_mrr@10", "eval_hit@1"),
    )  # fmt: skip
    early_stopping_patience: int | None = option(
        None, "Evaluations without improvement after which training stops.", unit="evaluations", at_least=1
    )
    hub_strategy: str = option("end", "What push_to_hub uploads: the trained model.", choices=("end",))
    seed: int = option(42, "Seed of adapter weights, data order and dropout.", at_least=0)

    def __post_init__(self) -> None:
        """Check all options, then derive what the stock class derives."""
        check_options(self)
        self._refuse_decided()
        self._check_together()
        self._check_evaluation()
        self._check_trackers()
        self.output = os.path.expanduser(self.output or self.output_dir or "")
        self.output_dir = self.output or None
        self.use_cpu = self.use_cpu or computes_on_cpu()
        if self.warmup_ratio is not None:
            warnings.warn("warmup_ratio is now warmup_steps, below 1 a fraction.", FutureWarning, stacklevel=3)
            self.warmup_steps, self.warmup_ratio = self.warmup_ratio, None
        # The stage turns it on when it loads the model; the stock class would warn of the name.
        checkpointing = bool(self.gradient_checkpointing or getattr(self, "activation_checkpointing", False))
        self.gradient_checkpointing = None
        drop_last, optim = self.dataloader_drop_last, self.optim
        if optim == MUON:
            self.optim = OptimizerNames.ADAMW_TORCH  # the stock class knows its own optimizers only
        super().__post_init__()
        if optim == MUON:
            self.optim = MUON
        self.gradient_checkpointing = checkpointing
        self.dataloader_drop_last = drop_last  # the stock class sets it on several devices; batches here may be uneven

    def _refuse_decided(self) -> None:
        for entry in fields(BaseTrainingArguments):
            if entry.name in _DECIDED and getattr(self, entry.name) != _stock_default(entry):
                raise OptionError(f"{entry.name} cannot be set here: {_DECIDED[entry.name]}.")

    def _check_together(self) -> None:
        if self.max_steps == 0:
            raise OptionError("max_steps: expected -1 or an integer of at least 1, found 0")
        if self.warmup_steps >= 1 and not float(self.warmup_steps).is_integer():
            raise OptionError(f"warmup_steps: expected an integer or a fraction below 1, found {self.warmup_steps:g}")
        if self.fp16 and self.bf16:
            raise OptionError("bf16 and fp16 exclude each other: leave out one.")
        if self.quantize and not self.lora_rank:
            raise OptionError("quantize needs an adapter: quantized weights are not trained. Set lora_rank.")
        if self.frozen and self.lora_rank:
            raise OptionError(
                "frozen goes with lora_rank 0: under an adapter all other weights are frozen, and lora_targets says "
                "which layers have one."
            )
        if self.output and self.output_dir and os.path.expanduser(self.output) != self.output_dir:
            raise OptionError("output and output_dir name the same folder: leave out output_dir.")

    def _check_evaluation(self) -> None:
        if not self.eval_data:
            given = {
                "eval_strategy": self.eval_strategy != IntervalStrategy.NO,
                "load_best_model_at_end": self.load_best_model_at_end,
                "early_stopping_patience": self.early_stopping_patience is not None,
                "eval_on_start": self.eval_on_start,
            }
            if name := next((name for name, value in given.items() if value), None):
                raise OptionError(f"{name} needs held-out records: add eval_data, or leave out {name}.")
            return
        if self.eval_strategy == IntervalStrategy.NO:
            self.eval_strategy = IntervalStrategy.STEPS
        if self.eval_strategy == IntervalStrategy.STEPS and self.eval_steps is None:
            self.eval_steps = self.save_steps
        self.metric_for_best_model = self.metric_for_best_model or "mrr@10"
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = self.restore_callback_states_from_checkpoint = True

    def _check_trackers(self) -> None:
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        for name in names:
            if name in ("all", "none"):
                continue
            if name not in INTEGRATION_TO_CALLBACK:
                known = ", ".join(["all", "none", *sorted(INTEGRATION_TO_CALLBACK)])
                raise OptionError(f"report_to: expected one of {known}, found {name}")
            if name not in get_available_reporting_integrations():
                raise OptionError(
                    f"report_to: {name} is not installed. Install its package, or choose another tracker."
                )

    def plan(self) -> dict[str, object]:
        """Options that decide the result; a folder that was made with other ones is not continued."""
        stock = {entry.name: _stock_default(entry) for entry in fields(BaseTrainingArguments)}
        declared = options_of(type(self))
        found = {}
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            ours = name not in declared or not declared[name].stock
            if not name.startswith(_NO_PART_OF_RESULT) and (ours or value != stock[name]):
                found[name] = value.value if isinstance(value, Enum) else value
        return found


@dataclass
class TrainArguments(StageArguments, SentenceTransformerTrainingArguments):
    """Options that the embedding stages share.

    Args:
        **options: See ``unime STAGE --help``.
    """

    token_budget: int | str | None = option(
        None, "Text and image tokens embedded at a time, instead of mini_batch_size; auto: what fits the memory.",
        unit="tokens", at_least=1, choices=("auto",),
    )  # fmt: skip
    query_prompt: str | None = option(
        None, "Instruction of queries, which the trained model keeps; none: that of the model's encode_query."
    )
    document_prompt: str | None = option(
        None, "Instruction of documents, which the trained model keeps; none: that of the model's encode_document."
    )
    dataset_temperature: float = option(
        1.0, "Dataset sampling temperature T, p ~ size^(1/T); 1: proportional, large: uniform.", above=0
    )
    sub_batch_size: int | None = option(
        None, "Consecutive rows of one dataset in a batch; none: datasets are mixed.", unit="rows", at_least=1
    )
    cluster_pools: str | None = option(
        None, "Folder of pools mined among the records: batches are made of clusters of mutual hard negatives.",
        path="stage", made_by="unime mine --data RECORDS --output FOLDER",
    )  # fmt: skip
    cluster_size: int = option(8, "Rows of a cluster.", unit="rows", at_least=2, needs="cluster_pools")
    cluster_skip: int = option(
        0, "Nearest candidates left out of clusters, as likely false negatives.", unit="candidates", at_least=0,
        needs="cluster_pools",
    )  # fmt: skip
    cluster_candidates: int = option(
        10, "Candidates behind those that count for clusters.", unit="candidates", at_least=1, needs="cluster_pools"
    )
    matryoshka_dims: list[int] | None = option(
        None, "Embedding prefixes to train as well, e.g. 1536 512 128.", unit="dimensions", at_least=1
    )
    quantization_aware: list[str] | None = option(
        None, "Precisions of the embeddings to train as well, rounded with straight-through gradients.",
        choices=("int8", "binary"),
    )  # fmt: skip
    gather_across_devices: bool = option(True, "In-batch negatives from all devices.")
    gradient_caching: bool = option(
        True,
        "With mini_batch_size or token_budget: embed mini-batches twice, and keep the activations of one at a time.",
    )
    item_cache: int = option(
        0, "Memory for prepared items, kept across steps: token ids, and pixels or (frozen tower) visual tokens; 0: none.",
        unit="MiB", at_least=0,
    )  # fmt: skip
    vision_cache: str | None = option(
        None, "Folder that keeps the visual tokens of images and videos; for a frozen vision tower and projector."
    )

    def _check_together(self) -> None:
        super()._check_together()
        if self.token_budget is not None and self.mini_batch_size is not None:
            raise OptionError("mini_batch_size and token_budget exclude each other: leave out one.")
        if not self.gradient_caching and self.token_budget is None and self.mini_batch_size is None:
            raise OptionError(
                "gradient_caching has no effect without mini-batches: set token_budget or mini_batch_size, or leave out "
                "gradient_caching."
            )
        if self.item_cache and self.dataloader_num_workers:
            raise OptionError(
                "item_cache is in the memory of the process that trains: set dataloader_num_workers 0, or item_cache 0."
            )
        if self.cluster_pools and (self.sub_batch_size is not None or self.dataset_temperature != 1.0):
            raise OptionError(
                "cluster_pools decides which rows stand together: leave out sub_batch_size and dataset_temperature."
            )


def _stock_default(entry: Field[object]) -> object:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default
