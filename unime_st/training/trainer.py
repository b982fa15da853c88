"""Stock trainers with figures of contrastive training in their logs, whole checkpoints and a stop at a NaN loss."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.trainer import BaseTrainer
from sentence_transformers.cross_encoder import CrossEncoderTrainer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from unime_st.data.items import Item
from unime_st.encoding.model_inputs import Features
from unime_st.training.adapters import load_adapter_weights
from unime_st.training.arguments import MUON
from unime_st.training.batches import RowBatches
from unime_st.training.distinct_items import COLUMNS, RerankerItemCollator
from unime_st.training.muon import Muon, muon_groups
from unime_st.training.resume import seal_checkpoint


class SetEpochCallback(TrainerCallback):
    """Sets the epoch of the batch sampler.

    In a resumed run on several processes the sampler is wrapped so deep that the trainer does not reach it.
    """

    def __init__(self, batches: RowBatches) -> None:
        self.batches = batches

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Set the epoch that begins."""
        self.batches.set_epoch(int(state.epoch or 0))


class ReduceUnusedGradientsCallback(TrainerCallback):
    """Under FSDP2, counts gradients that a device does not have as zero: a mini-batch may have no image."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set it for a sharded model."""
        model = kwargs["model"]
        if not hasattr(model, "set_requires_gradient_sync"):  # not sharded
            return
        if not hasattr(model, "set_reduce_scatter_unused_params"):
            raise RuntimeError(
                "This torch cannot shard a model of which devices use different weights, as images and texts do: "
                "update torch, or use DDP."
            )
        model.set_reduce_scatter_unused_params(True)


_LOSS_PARAMETERS = "loss.safetensors"

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""Errors that a full disk raises in Python, torch and safetensors."""


def write_error(what: str, folder: Path, intact: str, error: BaseException) -> OSError:
    """Error for a model that could not be written: the cause, what the run goes on from (``intact``), what to do."""
    free = shutil.disk_usage(folder).free / 2**30 if folder.exists() else 0.0
    return OSError(
        f"{what} could not be written to {folder} ({free:.1f} GiB are free there): {error}. {intact} is intact: make "
        "room and run the same command again."
    )


class ReportingTrainer(BaseTrainer):
    """Stock trainer with statistics of the loss, examples and tokens per second, and MFU in its log.

    Counts are those of this process; rates are times the number of processes.

    Args:
        *args: Arguments of the trainer.
        make_batches: Makes the batch sampler. Defaults to None: as the trainer's options say.
        rows_per_step: Rows of an optimizer step, on all devices.
        flops_per_token: Floating-point operations per token.
        peak_matmul_flops: Floating-point operations per second of a matrix product here; 0 leaves MFU out.
        mean_over_rows: The loss of a step is the mean over its rows, so forward passes are weighted by their rows, on
            all processes; else all passes have the same weight, as in the stock trainer.
        **kwargs: Keyword arguments of the trainer.
    """

    def __init__(
        self,
        *args: Any,
        make_batches: Callable[..., RowBatches] | None = None,
        rows_per_step: int = 0,
        flops_per_token: float = 0.0,
        peak_matmul_flops: float = 0.0,
        mean_over_rows: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(ReduceUnusedGradientsCallback())
        self._make_batches = make_batches
        self._mean_over_rows = mean_over_rows
        self._shares: list[float] = []
        self._rows_per_step, self._operations, self._matrix_rate = rows_per_step, flops_per_token, peak_matmul_flops
        self._mark = (0.0, 0, 0)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward pass; stop on a NaN or infinite loss before the optimizer step."""
        if not self._mark[0]:
            self._mark = (time.perf_counter(), self.state.global_step, self._tokens())
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            state, options = self.state, self.args
            raise FloatingPointError(
                f"The loss of step {state.global_step + 1} is {float(loss)}; training stopped before the optimizer "
                f"step, and the last checkpoint in {options.output_dir} is intact. Lower learning_rate, or look at the "
                "rows of that step."
            )
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
            if self.is_world_process_zero():
                seal_checkpoint(self._folder / f"checkpoint-{self.state.global_step}")
        except WRITE_ERRORS as error:
            what = f"The checkpoint of step {self.state.global_step}"
            raise write_error(what, self._folder, "The one before it", error) from error

    @property
    def _folder(self) -> Path:
        """Folder of the checkpoints."""
        return Path(str(self.args.output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random states of all processes before the first one writes the file that makes a checkpoint whole."""
        super()._save_rng_state(output_dir)
        if self.is_world_process_zero() and (learned := self._loss_parameters()):
            save_file(
                {name: weight.detach().cpu() for name, weight in learned.items()}, Path(output_dir) / _LOSS_PARAMETERS
            )
        if dist.is_initialized():
            dist.barrier()

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        """Load an adapter alone, whose base may be quantized; leave a sharded checkpoint to transformers."""
        if self.is_fsdp_enabled:
            Trainer._load_from_checkpoint(self, checkpoint_path, model)
        elif not load_adapter_weights(self.model, checkpoint_path):
            super()._load_from_checkpoint(checkpoint_path)
        if learned := self._loss_parameters():
            saved = load_file(Path(checkpoint_path) / _LOSS_PARAMETERS)
            with torch.no_grad():
                for name, weight in learned.items():
                    weight.copy_(saved[name])

    def _loss_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters of the loss that are not the model's, such as a learnable temperature."""
        model = {id(weight) for weight in self.model.parameters()}
        loss: Any = self.loss
        return {name: p for name, p in loss.named_parameters() if p.requires_grad and id(p) not in model}

    def _load_best_model(self) -> None:
        """Load the best checkpoint; Sentence Transformers logs a failure and goes on with the last weights."""
        best = str(self.state.best_model_checkpoint)
        card: Any = self.model.model_card_data
        card.set_best_model_step(int(best.rsplit("-", 1)[1]))
        self._load_from_checkpoint(best)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer that the options name; ``optim: muon`` is ours, with the groups of the stock AdamW."""
        if self.args.optim == MUON and self.optimizer is None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "optim muon needs whole matrices, which FSDP and DeepSpeed split: use adamw_torch, or DDP."
                )
            stock = copy.copy(self.args)
            stock.optim = OptimizerNames.ADAMW_TORCH
            _, options = self.get_optimizer_cls_and_kwargs(stock, model)
            loss: Any = self.loss
            groups = muon_groups(loss, options["optimizer_dict"])
            self.optimizer = Muon(groups, options["lr"], options["betas"], options["eps"])
        created: torch.optim.Optimizer = super().create_optimizer(model)
        return created

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Features], Tensor | int | None]:
        """Fetch the batches of a step, and compute the weight of each."""
        state = self.state
        if state.global_step >= state.max_steps:  # killed after its last checkpoint: transformers would do a step more
            self.control.should_training_stop = True
            return [], None
        samples, items = super().get_batch_samples(*args, **kwargs)
        self._shares = self._shares_of(samples) if self._mean_over_rows else []
        return samples, items

    def _shares_of(self, samples: list[Features]) -> list[float]:
        """Rows of a batch over the mean rows of a batch, where a step is all batches of all processes."""
        rows = [sample[f"bucket0_{COLUMNS}"].shape[1] for sample in samples]
        total = torch.tensor([sum(rows), len(rows)], device=self.args.device)
        if dist.is_initialized():
            dist.all_reduce(total)
        all_rows, batches = total.tolist()
        return [count * batches / all_rows for count in rows]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of one batch; the trainer takes the mean over the batches of a step."""
        loss: Any = super().compute_loss(*args, **kwargs)
        return loss * self._shares.pop(0) if self._shares else loss

    def get_batch_sampler(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Any:
        """Make the batch sampler. It is not an option: options are stored with every checkpoint, and it holds columns."""
        if self._make_batches is not None:
            batches = self._make_batches(dataset, *args, **kwargs)
            self.add_callback(SetEpochCallback(batches))
            return batches
        return super().get_batch_sampler(dataset, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the trainer logs, and what this class adds.

        fp16 skips a step whose gradient overflows, as the first ones do until its loss scale has settled. Such a gradient
        norm is left out: JSON has no NaN.
        """
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            logs = {name: value for name, value in logs.items() if name != "grad_norm"}
        if "loss" in logs:
            logs = {**logs, **self._figures()}
        super().log(logs, start_time)

    def _tokens(self) -> int:
        return getattr(self.loss, "tokens", 0)

    def _figures(self) -> dict[str, float]:
        inner: Any = getattr(self.loss, "loss", self.loss)
        figures: dict[str, float] = inner.pop_statistics() if hasattr(inner, "pop_statistics") else {}
        now = (time.perf_counter(), self.state.global_step, self._tokens())
        seconds, steps, tokens = (after - before for after, before in zip(now, self._mark))
        self._mark = now
        if seconds <= 0 or not steps:
            return figures
        figures["examples_per_second"] = round(steps * self._rows_per_step / seconds, 3)
        rate = tokens * self.args.world_size / seconds
        if rate:
            figures["tokens_per_second"] = round(rate, 1)
        if rate and self._matrix_rate:
            world: int = self.args.world_size
            figures["mfu"] = round(rate * self._operations / (world * self._matrix_rate), 4)
        return figures


class EmbedderTrainer(ReportingTrainer, SentenceTransformerTrainer):
    """:class:`ReportingTrainer` of embedding models."""


class RerankerTrainer(ReportingTrainer, CrossEncoderTrainer):
    """:class:`ReportingTrainer` of rerankers, with a :class:`RerankerItemCollator`."""

    def compute_loss(self, model: Any, inputs: Features, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of one batch, which prepares its items."""
        collator = cast(RerankerItemCollator, self.data_collator)
        columns = [column for column in inputs.values() if isinstance(column, list)]
        with collator.naming_items(item for column in columns for item in column if isinstance(item, Item)):
            return super().compute_loss(model, inputs, *args, **kwargs)
