"""Runs one training stage: folder in, native model folder out, resumable, on one process or many."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.base.model import BaseModel
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from unime_st.data.manifest import MANIFEST, begin_stage, finish_stage
from unime_st.training.adapters import choose_trainable, load_options, merge_lora, trained_into
from unime_st.training.arguments import LOG, TrainArguments
from unime_st.training.planning import Plan
from unime_st.training.processes import computes_on_cpu, processes
from unime_st.training.trainer import WRITE_ERRORS, EmbedderTrainer, RerankerTrainer, not_written

logger = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"


@dataclass
class Setup:
    """What a stage makes of its model and rows.

    Args:
        rows: The rows to train on.
        loss: The loss.
        collator: The data collator.
        plan: What the run will take.
        make_batches: Makes the batch sampler; None: the trainer's usual one.
        batch_size: Rows of a forward pass on one device; None: as the options say.
        accumulation: Forward passes of a step; None: as the options say.
        flops_per_token: Floating-point operations that a token takes.
        peak_matmul_flops: Operations per second of a matrix product on this device.
        mean_over_rows: Forward passes of a step count by their rows; False: all the same.
        cached: The loss caches gradients: it goes back through the model more than once.
    """

    rows: Dataset
    loss: nn.Module
    collator: Any
    plan: Plan
    make_batches: Callable[..., Any] | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    flops_per_token: float = 0.0
    peak_matmul_flops: float = 0.0
    mean_over_rows: bool = False
    cached: bool = False


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; half-written ones, of a killed run, are removed.

    The trainer writes ``trainer_state.json`` last.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    for checkpoint in found:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is incomplete and removed.", checkpoint)
            shutil.rmtree(checkpoint)
        else:
            return str(checkpoint)
    return None


def trainer_arguments(arguments: TrainArguments, output: Path) -> dict[str, Any]:
    """Our options in the words of transformers' training arguments."""
    return {
        "output_dir": str(output / CHECKPOINTS),
        "max_steps": arguments.max_steps,
        "num_train_epochs": arguments.epochs,
        "per_device_train_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "learning_rate": arguments.learning_rate,
        "warmup_steps": arguments.warmup_ratio,
        "lr_scheduler_type": arguments.scheduler,
        "max_grad_norm": arguments.max_grad_norm,
        "bf16": arguments.precision == "bf16",
        "fp16": arguments.precision == "fp16",
        "use_cpu": computes_on_cpu(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": arguments.workers,
        "save_steps": arguments.save_every,
        "save_total_limit": 2,
        "logging_steps": arguments.log_every,
        "logging_nan_inf_filter": False,
        "report_to": arguments.report_to,
        "seed": arguments.seed,
        "dataloader_drop_last": arguments.drop_last,
        # Weights alone are trained: buffers are the same everywhere, and a broadcast per forward pass would hang where
        # processes need different numbers of mini-batches.
        "ddp_broadcast_buffers": False,
    }


class _LossCurve(TrainerCallback):
    """Writes the loss curve while it comes, so that a long run can be watched; a resumed run's begins anew.

    Every checkpoint is a point of it: the trainer takes the mean from the last point on, and a resumed one has forgotten
    the losses before its checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._write("w", state.log_history)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._write("a", state.log_history[-1:])

    def _write(self, mode: str, entries: list[dict[str, Any]]) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries if "loss" in entry)


def _begin(stage: str, arguments: TrainArguments, output: Path, inputs: tuple[str, ...]) -> bool:
    """Open the output folder, the first process before the others; say whether there is work to do."""
    state = processes()
    with state.main_process_first():
        overwrite = arguments.overwrite and state.is_main_process
        # A step's rows are those of all processes: with more or fewer of them it would be another run.
        options = {**arguments.plan(), "processes": state.num_processes}
        due = begin_stage(output, stage, inputs=inputs, options=options, overwrite=overwrite)
        if due and state.is_main_process:
            if not arguments.resume:
                shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
            last_whole_checkpoint(output / CHECKPOINTS)
    return due


def run_stage(
    stage: str,
    arguments: TrainArguments,
    *,
    load: Callable[..., BaseModel],
    dataset: Callable[[], Dataset],
    setup: Callable[[BaseModel, Dataset], Setup],
    inputs: tuple[str, ...] = (),
) -> Path:
    """Train with the stock trainer and leave a native model folder; finished or half-done work is taken up.

    Args:
        stage: Name of the stage, for the manifest.
        arguments: Options.
        load: Makes the model to start from; takes the keyword arguments of a Sentence Transformers model.
        dataset: Makes the rows.
        setup: Makes everything else of model and rows.
        inputs: Folders whose content the result depends on.

    Returns:
        The output folder: a native model, ``log.jsonl`` with the loss curve, ``manifest.json``. With ``dry_run`` the
        plan is logged and nothing is written.
    """
    if not arguments.output:
        raise ValueError("output is missing: name a folder for the trained model (--output FOLDER).")
    output = Path(arguments.output)
    if not arguments.dry_run and not _begin(stage, arguments, output, inputs):
        logger.info("%s: %s is there already.", stage, output)
        return output
    torch.manual_seed(arguments.seed)
    model, rows = load(**load_options(arguments)), dataset()
    choose_trainable(model, arguments)
    if arguments.gradient_checkpointing:  # here and not by the trainer: its option changes its name in version 6
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made = setup(model, rows)
    if made.cached and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise ValueError(
            "DeepSpeed cannot train with gradient caching: it goes back through the model once a batch. Leave out "
            "mini_batch_size and token_budget and raise gradient_accumulation_steps, or start with torchrun (DDP)."
        )
    logger.info("%s:\n%s", stage, made.plan)
    if arguments.dry_run:
        return output
    trainer = _trainer(arguments, model, made, output)
    checkpoint = last_whole_checkpoint(output / CHECKPOINTS)
    logger.info("%s: %d rows%s.", stage, len(made.rows), f", going on from {checkpoint}" if checkpoint else "")
    trainer.add_callback(_LossCurve(output / LOG))
    trainer.train(resume_from_checkpoint=checkpoint)
    _save(arguments, model, load, trainer, output)
    if trainer.is_world_process_zero():
        # The trainer's own summary divides the losses since the last start by the steps of all.
        last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
        facts = {"rows": len(made.rows), "steps": trainer.state.global_step, "loss": last}
        finish_stage(output, {**facts, "plan": made.plan.facts()})
        _add_manifest_to_card(output)
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    processes().wait_for_everyone()
    return output


def _trainer(arguments: TrainArguments, model: BaseModel, made: Setup, output: Path) -> Any:
    is_embedder = hasattr(model, "encode")
    trainer_class: Any = EmbedderTrainer if is_embedder else RerankerTrainer
    options_class: Any = SentenceTransformerTrainingArguments if is_embedder else CrossEncoderTrainingArguments
    options = trainer_arguments(arguments, output)
    options["per_device_train_batch_size"] = made.batch_size or arguments.batch_size
    options["gradient_accumulation_steps"] = made.accumulation or arguments.gradient_accumulation_steps
    trainer_options = options_class(**options)
    batch = arguments.batch_size * trainer_options.world_size
    if len(made.rows) < batch:
        raise ValueError(f"{len(made.rows)} rows do not fill a batch of {batch}; lower batch_size, or add data.")
    trainer = trainer_class(
        model=model,
        args=trainer_options,
        train_dataset=made.rows,
        loss=made.loss,
        data_collator=made.collator,
        make_batches=made.make_batches,
        rows_per_step=arguments.batch_size * arguments.gradient_accumulation_steps * trainer_options.world_size,
        flops_per_token=made.flops_per_token,
        peak_matmul_flops=made.peak_matmul_flops,
        mean_over_rows=made.mean_over_rows,
    )
    if trainer.is_fsdp_enabled and not is_embedder:
        raise ValueError(
            "A reranker's weights cannot be sharded (FSDP): its processes need different numbers of forward passes, and "
            "would wait for each other. Start it with torchrun (DDP)."
        )
    return trainer


def _save(
    arguments: TrainArguments, model: BaseModel, load: Callable[..., BaseModel], trainer: Any, output: Path
) -> None:
    weights = None
    if trainer.is_fsdp_enabled:  # all processes together
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    elif arguments.quantize:
        weights = {name: weight.detach().cpu() for name, weight in model.named_parameters() if weight.requires_grad}
    if not trainer.is_world_process_zero():
        return
    if weights is not None:
        options = load_options(arguments)
        options["model_kwargs"].pop("quantization_config", None)
        model = trained_into(load(**options, device="cpu"), weights, arguments)
    elif arguments.lora_rank:
        merge_lora(model)
    _leave_ids_out_of_card(model)
    try:
        model.save_pretrained(str(output))
    except WRITE_ERRORS as error:
        raise not_written("The trained model", output, "The last checkpoint", error) from error


def _leave_ids_out_of_card(model: BaseModel) -> None:
    """Sentence Transformers takes the rows for texts, and would show and count them."""
    card: Any = model.model_card_data
    card.widget, card.usage_examples, card.generate_widget_examples = [], None, False
    for entry in card.train_datasets:
        for part in ("stats_table", "examples", "examples_table"):
            entry.pop(part, None)


def _add_manifest_to_card(output: Path) -> None:
    card, manifest = (output / name for name in ("README.md", MANIFEST))
    with card.open("a", encoding="utf-8") as file:
        file.write(f"\n## Manifest\n\n```json\n{manifest.read_text(encoding='utf-8')}```\n")
