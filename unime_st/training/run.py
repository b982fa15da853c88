"""Training run of a stage: opens the output folder, resumes, trains with the stock trainer, saves the model."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, TypeVar

import torch
from datasets import Dataset
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.model import BaseModel
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.data.data_collator import DataCollator

from unime_st.data.manifest import MANIFEST, begin_stage, finish_stage, is_complete
from unime_st.data.records import RecordSet
from unime_st.files import folder_lock
from unime_st.options import require_options
from unime_st.training import LOG
from unime_st.training.adapters import choose_trainable, load_options, merge_lora, trained_into
from unime_st.training.arguments import StageArguments
from unime_st.training.hub import make_repository, upload
from unime_st.training.planning import TrainingEstimate
from unime_st.training.processes import partial_state
from unime_st.training.resume import CHECKPOINTS, last_whole_checkpoint
from unime_st.training.trainer import WRITE_ERRORS, ReportingTrainer, write_error

logger = logging.getLogger(__name__)
ArgumentsT = TypeVar("ArgumentsT", bound=StageArguments)
ModelT = TypeVar("ModelT", bound=BaseModel)
StageT = TypeVar("StageT", bound="TrainingStage[Any, Any]")


class TrainingStage(ABC, Generic[ArgumentsT, ModelT]):
    """A training stage: records in, native model folder out, resumable, on one process or many.

    A context manager. Entering opens the output folder and the records; leaving without an error writes the manifest
    and the model card, and says how to load the model. Subclasses say what is loaded and trained.

    Attributes:
        output: Folder of the trained model: native, with ``log.jsonl`` (loss curve) and ``manifest.json``.
        records: The training data.
        done: The folder holds the finished model: there is nothing to do.

    Raises:
        OptionError: If data or output are missing.
        StageConflictError: If the folder holds the work of other data or options.
        FolderInUseError: If another process works in the folder.
    """

    trainer_class: ClassVar[type[ReportingTrainer]]
    loading: ClassVar[str]

    def __init__(self, name: str, args: ArgumentsT) -> None:
        self.name, self.args = name, args
        self.output = Path(args.output)
        self.done = False
        self._lock = ExitStack()
        self._repository = ""
        self._options: dict[str, object] = {}
        self._facts: dict[str, object] | None = None

    def __enter__(self: StageT) -> StageT:
        require_options(self.args)
        self.records = RecordSet.load(self.args.data)
        if self.args.dry_run:
            return self
        with ExitStack() as lock:
            if partial_state().is_main_process:
                lock.enter_context(folder_lock(self.output, wait=False))
                if self.args.push_to_hub and (self.args.overwrite or not is_complete(self.output)):
                    self._repository = make_repository(self.args)
            self.done = not self._begin()
            self._lock = lock.pop_all()
        if self.done:
            logger.info("%s: %s is there already.", self.name, self.output)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            if error is None and self._facts is not None:
                self._finish(self._facts)

    def _finish(self, facts: dict[str, object]) -> None:
        """Write manifest and card, and say how the model is loaded."""
        if partial_state().is_main_process:
            finish_stage(self.output, facts)
            _add_manifest_to_card(self.output)
            shutil.rmtree(self.output / CHECKPOINTS, ignore_errors=True)
            if self._repository:
                upload(self.args, self._repository)
            logger.info(
                "%s: the trained model is in %s. Load it: %s", self.name, self.output, self.loading.format(self.output)
            )
        partial_state().wait_for_everyone()

    @property
    def resumes(self) -> bool:
        """Whether a killed run left a checkpoint."""
        return any((self.output / CHECKPOINTS).glob("checkpoint-*"))

    def load_model(self, **options: Any) -> ModelT:
        """Load the model to start from: its dtype, quantization and adapter by the options of the stage."""
        self._options = options
        torch.manual_seed(self.args.seed)
        model = self._load(**options, **load_options(self.args))
        choose_trainable(model, self.args)
        if self.args.gradient_checkpointing:
            given = self.args.gradient_checkpointing_kwargs
            settings = {"use_reentrant": False, **(given if isinstance(given, dict) else {})}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        return model

    @abstractmethod
    def _load(self, **options: Any) -> ModelT:
        """Load the model with the given options."""

    @abstractmethod
    def _evaluator(self, records: RecordSet) -> BaseEvaluator:
        """Evaluator for held-out records."""

    def _inputs(self) -> list[str]:
        """Folders that decide the result."""
        args = self.args
        return [args.data, *([args.eval_data] if args.eval_data and args.load_best_model_at_end else [])]

    def _begin(self) -> bool:
        """Open the output folder, the first process before the others; say whether there is work to do."""
        args, state = self.args, partial_state()
        inputs = self._inputs()
        with state.main_process_first():
            overwrite = args.overwrite and state.is_main_process
            # A step's rows are those of all processes: with more or fewer of them it would be another run.
            options = {**args.plan(), "processes": state.num_processes}
            due = begin_stage(self.output, self.name, inputs=inputs, options=options, overwrite=overwrite)
            if due and state.is_main_process:
                if not args.resume:
                    shutil.rmtree(self.output / CHECKPOINTS, ignore_errors=True)
                last_whole_checkpoint(self.output / CHECKPOINTS)
        return due

    def check_rows(self, count: int) -> None:
        """Raise ValueError if the rows do not fill a batch; a dry run may estimate a larger batch than it has rows."""
        batch = self.args.per_device_train_batch_size * self.args.world_size
        if count < batch and not self.args.dry_run:
            raise ValueError(
                f"{count} rows do not fill a batch of {batch}; lower per_device_train_batch_size, or add data."
            )

    def fit(
        self,
        model: ModelT,
        rows: Dataset,
        loss: nn.Module,
        collator: DataCollator,
        plan: TrainingEstimate,
        *,
        rows_per_pass: int | None = None,
        cached: bool = False,
        **reporting: Any,
    ) -> None:
        """Log the plan, train with the stock trainer, save the model.

        ``rows_per_pass`` are the rows of a forward pass on one device, a divisor of the batch (None: all of it). A
        ``cached`` loss goes back through the model more than once. ``reporting`` are arguments of
        :class:`~unime_st.training.trainer.ReportingTrainer`.
        """
        if cached and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
            raise ValueError(
                "DeepSpeed cannot train with gradient caching: it goes back through the model once a batch. Leave out "
                "mini_batch_size and token_budget and raise gradient_accumulation_steps, or start with torchrun (DDP)."
            )
        logger.info("%s:\n%s", self.name, plan)
        if self.args.dry_run:
            return
        trainer = self._trainer(model, rows, loss, collator, rows_per_pass, reporting)
        checkpoint = self.args.resume_from_checkpoint or last_whole_checkpoint(self.output / CHECKPOINTS)
        logger.info("%s: %d rows%s.", self.name, len(rows), f", going on from {checkpoint}" if checkpoint else "")
        trainer.train(resume_from_checkpoint=checkpoint)
        self._save(model, trainer)
        # The trainer's own summary divides the losses since the last start by the steps of all.
        last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
        self._facts = {"rows": len(rows), "steps": trainer.state.global_step, "loss": last}
        if trainer.state.best_metric is not None:
            self._facts["best"] = {
                "step": int(trainer.state.best_global_step or 0),
                trainer.args.metric_for_best_model: trainer.state.best_metric,
            }
        self._facts["plan"] = asdict(plan)

    def _trainer(
        self,
        model: ModelT,
        rows: Dataset,
        loss: nn.Module,
        collator: DataCollator,
        rows_per_pass: int | None,
        reporting: dict[str, Any],
    ) -> ReportingTrainer:
        args = copy.copy(self.args)
        batch = args.per_device_train_batch_size
        args.output_dir = str(self.output / CHECKPOINTS)
        args.per_device_train_batch_size = rows_per_pass or batch
        args.gradient_accumulation_steps *= batch // args.per_device_train_batch_size
        args.gradient_checkpointing = args.activation_checkpointing = False  # the model has it already
        args.dataloader_drop_last |= args.world_size > 1  # as the stock class does; the batch sampler has its own
        args.push_to_hub = False  # the finished model is uploaded, and not its checkpoints
        callbacks: list[TrainerCallback] = [LossCurve(self.output / LOG)]
        if args.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        trainer_class: Any = self.trainer_class
        trainer: ReportingTrainer = trainer_class(
            model=model,
            args=args,
            train_dataset=rows,
            loss=loss,
            data_collator=collator,
            evaluator=self._evaluator(RecordSet.load(args.eval_data)) if args.eval_data else None,
            callbacks=callbacks,
            rows_per_step=batch * self.args.gradient_accumulation_steps * args.world_size,
            **reporting,
        )
        leave_ids_out_of_card(model)  # the stock trainer has just put them there, and the card goes into checkpoints
        return trainer

    def _save(self, model: BaseModel, trainer: ReportingTrainer) -> None:
        args, weights = self.args, None
        if trainer.is_fsdp_enabled:  # all processes together
            weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        elif args.quantize:
            weights = {n: weight.detach().cpu() for n, weight in model.named_parameters() if weight.requires_grad}
        if not trainer.is_world_process_zero():
            return
        if weights is not None:
            options = load_options(args)
            options["model_kwargs"].pop("quantization_config", None)
            model = trained_into(self._load(**self._options, **{**options, "device": "cpu"}), weights, args)
        elif args.lora_rank:
            merge_lora(model)
        leave_ids_out_of_card(model)
        try:
            model.save_pretrained(str(self.output))
        except WRITE_ERRORS as error:
            raise write_error("The trained model", self.output, "The last checkpoint", error) from error


class LossCurve(TrainerCallback):
    """Loss curve and evaluations in a file, written while they come; a resumed run's curve begins anew.

    Every checkpoint is a point of it: the trainer takes the mean from the last point on, and a resumed one has
    forgotten the losses before its checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Write the curve up to the checkpoint."""
        if state.is_world_process_zero:
            self._write("w", state.log_history)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Make every checkpoint a point of the curve."""
        control.should_log |= control.should_save

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Write the newest point."""
        if state.is_world_process_zero:
            self._write("a", state.log_history[-1:])

    def _write(self, mode: str, entries: list[dict[str, float]]) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.writelines(
                json.dumps(entry) + "\n"
                for entry in entries
                if "loss" in entry or any(name.startswith("eval_") for name in entry)
            )


def shards_weights(args: StageArguments) -> bool:
    """Whether the weights will be sharded over the processes (FSDP)."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def leave_ids_out_of_card(model: BaseModel) -> None:
    """Keep the rows out of the model card: Sentence Transformers takes item ids for texts, and would embed them."""
    card: Any = model.model_card_data
    card.widget, card.usage_examples, card.generate_widget_examples = [], None, False
    for entry in card.train_datasets:
        for part in ("stats_table", "examples", "examples_table"):
            entry.pop(part, None)


def _add_manifest_to_card(output: Path) -> None:
    card, manifest = (output / name for name in ("README.md", MANIFEST))
    with card.open("a", encoding="utf-8") as file:
        file.write(f"\n## Manifest\n\n```json\n{manifest.read_text(encoding='utf-8')}```\n")
