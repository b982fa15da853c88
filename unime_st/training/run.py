"""Runs one training stage: folder in, native model folder out, resumable."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.model import BaseModel
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from unime_st.data.manifest import begin_stage, finish_stage
from unime_st.training.arguments import TrainArguments

logger = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"


def add_lora(model: BaseModel, arguments: TrainArguments) -> None:
    """Give ``model`` a trainable LoRA or DoRA adapter; its weights are float32 whatever the model's are.

    Raises:
        ValueError: If ``lora_targets`` matches no layer.
    """
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_targets,
        use_dora=arguments.use_dora,
        task_type=TaskType.FEATURE_EXTRACTION,
    )
    model.add_adapter(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merge_lora(model: BaseModel) -> None:
    """Fold the adapter into the weights, so that the saved folder is a plain full model."""
    transformer: Any = model.transformers_model
    for module in list(transformer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(module, name, child.get_base_layer())
    transformer._hf_peft_config_loaded = False


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


class _StopOnDivergence(TrainerCallback):
    """Ends a run whose loss is no longer a number, while the last checkpoint is still good."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise FloatingPointError(
                f"The loss at step {state.global_step} is {loss}. The last checkpoint in {args.output_dir} is intact: "
                "lower learning_rate, or look at the batch that came last."
            )


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
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "dataloader_num_workers": arguments.workers,
        "save_steps": arguments.save_every,
        "save_total_limit": 2,
        "logging_steps": arguments.log_every,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "seed": arguments.seed,
        "dataloader_drop_last": True,
    }


def run_stage(
    stage: str,
    arguments: TrainArguments,
    *,
    load: Callable[[], BaseModel],
    dataset: Callable[[], Dataset],
    loss: Callable[[BaseModel], nn.Module],
    collator: Callable[[BaseModel], Any],
    batch_sampler: Any = "batch_sampler",
    inputs: tuple[str, ...] = (),
) -> Path:
    """Train with the stock trainer and leave a native model folder; finished or half-done work is taken up.

    Args:
        stage: Name of the stage, for the manifest.
        arguments: Options.
        load: Makes the model to start from.
        dataset: Makes the rows.
        loss: Makes the loss for the model.
        collator: Makes the data collator for the model.
        batch_sampler: Batch sampler of Sentence Transformers, or a function that makes one.
        inputs: Folders whose content the result depends on.

    Returns:
        The output folder: a native model, ``log.jsonl`` with the loss curve, ``manifest.json``.
    """
    if not arguments.output:
        raise ValueError("output is missing: name a folder for the trained model (--output FOLDER).")
    output = Path(arguments.output)
    if not begin_stage(output, stage, inputs=inputs, options=arguments.plan(), overwrite=arguments.overwrite):
        logger.info("%s: %s is there already.", stage, output)
        return output
    torch.manual_seed(arguments.seed)
    model, rows = load(), dataset()
    if len(rows) < arguments.batch_size:
        raise ValueError(f"{stage}: {len(rows)} rows do not fill a batch of {arguments.batch_size}; lower batch_size.")
    if arguments.lora_rank:
        add_lora(model, arguments)
    is_embedder = hasattr(model, "encode")
    trainer_class: Any = SentenceTransformerTrainer if is_embedder else CrossEncoderTrainer
    options_class: Any = SentenceTransformerTrainingArguments if is_embedder else CrossEncoderTrainingArguments
    trainer = trainer_class(
        model=model,
        args=options_class(**trainer_arguments(arguments, output), batch_sampler=batch_sampler),
        train_dataset=rows,
        loss=loss(model),
        data_collator=collator(model),
        callbacks=[_StopOnDivergence()],
    )
    checkpoint = last_whole_checkpoint(output / CHECKPOINTS)
    logger.info("%s: %d rows%s.", stage, len(rows), f", going on from {checkpoint}" if checkpoint else "")
    trainer.train(resume_from_checkpoint=checkpoint)
    if arguments.lora_rank:
        merge_lora(model)
    _save(model, trainer, output)
    finish_stage(
        output, {"rows": len(rows), "steps": trainer.state.global_step, "loss": trainer.state.log_history[-1]}
    )
    return output


def _save(model: BaseModel, trainer: Any, output: Path) -> None:
    if not trainer.is_world_process_zero():
        return
    model.save_pretrained(str(output))
    curve = [entry for entry in trainer.state.log_history if "loss" in entry]
    (output / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in curve), encoding="utf-8")
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
