"""The stock trainers with the figures of contrastive training in their logs, and an end to runs that diverge."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.cross_encoder import CrossEncoderTrainer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from unime_st.training.adapters import load_adapter_weights
from unime_st.training.distinct_items import COLUMNS
from unime_st.training.resume import seal_checkpoint


class SetEpochCallback(TrainerCallback):
    """A resumed run on several processes wraps the batch sampler so deep that the trainer does not reach it."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the batch sampler its epoch."""
        self.batches.set_epoch(int(state.epoch or 0))


class ReduceUnusedGradientsCallback(TrainerCallback):
    """Under FSDP2 a device whose mini-batch has no image has no gradients for the vision tower; they count as zero."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell every shard to reduce missing gradients as zeros."""
        model = kwargs["model"]
        if not hasattr(model, "set_requires_gradient_sync"):  # not sharded
            return
        if not hasattr(model, "set_reduce_scatter_unused_params"):
            raise RuntimeError(
                "This torch cannot shard a model of which devices use different weights, as images and texts do: "
                "update torch, or use DDP."
            )
        model.set_reduce_scatter_unused_params(True)


WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full disk raises, as Python, torch and safetensors put it."""


def write_error(what: str, folder: Path, intact: str, error: BaseException) -> OSError:
    """Say that a model could not be written, why, and what to do.

    Args:
        what: What could not be written.
        folder: Where to.
        intact: What a run that is started again goes on from.
        error: The cause.
    """
    free = shutil.disk_usage(folder).free / 2**30 if folder.exists() else 0.0
    return OSError(
        f"{what} could not be written to {folder} ({free:.1f} GiB are free there): {error}. {intact} is intact: make "
        "room and run the same command again."
    )


class ReportingMixin:
    """Adds to the log: the loss's own statistics, examples and tokens per second, the share of the matrix rate.

    Counts are those of this process; rates are times the number of processes.

    Args:
        *args: Of the trainer.
        make_batches: Makes the batch sampler; None (default) leaves it to the trainer's options.
        rows_per_step: Rows of an optimiser step, on all devices.
        flops_per_token: Floating-point operations that a token takes.
        peak_matmul_flops: Operations per second that the device could do; 0 leaves MFU out.
        mean_over_rows: The loss of a step is the mean over its rows, so forward passes count by their rows, on all
            processes. Defaults to False: all passes count the same, as they do for the trainer.
        **kwargs: Of the trainer.
    """

    def __init__(
        self,
        *args: Any,
        make_batches: Callable[..., Any] | None = None,
        rows_per_step: int = 0,
        flops_per_token: float = 0.0,
        peak_matmul_flops: float = 0.0,
        mean_over_rows: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(ReduceUnusedGradientsCallback())  # type: ignore[attr-defined]
        self._make_batches = make_batches
        self._mean_over_rows = mean_over_rows
        self._shares: list[float] = []
        self._rows_per_step, self._operations, self._matrix_rate = rows_per_step, flops_per_token, peak_matmul_flops
        self._mark = (0.0, 0, 0)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass; a loss that is no number ends the run before it reaches the weights."""
        if not self._mark[0]:
            self._mark = (time.perf_counter(), self.state.global_step, self._tokens())  # type: ignore[attr-defined]
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not math.isfinite(float(loss)):
            state, options = self.state, self.args  # type: ignore[attr-defined]
            raise FloatingPointError(
                f"The loss of step {state.global_step + 1} is {float(loss)}. The weights do not have it yet, and the "
                f"last checkpoint in {options.output_dir} is intact: lower learning_rate, or look at the rows of that "
                "step."
            )
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
            if self.is_world_process_zero():  # type: ignore[attr-defined]
                seal_checkpoint(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"))  # type: ignore[attr-defined]
        except WRITE_ERRORS as error:
            folder, step = Path(self.args.output_dir), self.state.global_step  # type: ignore[attr-defined]
            raise write_error(f"The checkpoint of step {step}", folder, "The one before it", error) from error

    def _save_rng_state(self, output_dir: str) -> None:
        """Random states of all processes are there before the first one writes what makes the checkpoint whole."""
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if dist.is_initialized():
            dist.barrier()

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        """Load an adapter alone, whose base may be quantized; leave a sharded checkpoint to transformers."""
        if self.is_fsdp_enabled:  # type: ignore[attr-defined]
            Trainer._load_from_checkpoint(self, checkpoint_path, model)  # type: ignore[arg-type]
        elif not load_adapter_weights(self.model, checkpoint_path):  # type: ignore[attr-defined]
            super()._load_from_checkpoint(checkpoint_path)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        """Load the best checkpoint; Sentence Transformers logs a failure and goes on with the last weights."""
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        self.model.model_card_data.set_best_model_step(int(best.rsplit("-", 1)[1]))  # type: ignore[attr-defined]
        self._load_from_checkpoint(best)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the batches of a step, and find out how much each of them counts."""
        state = self.state  # type: ignore[attr-defined]
        if state.global_step >= state.max_steps:  # killed after its last checkpoint: transformers would do a step more
            self.control.should_training_stop = True  # type: ignore[attr-defined]
            return [], None
        samples, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._shares = self._shares_of(samples) if self._mean_over_rows else []
        return samples, items

    def _shares_of(self, samples: list[dict[str, Any]]) -> list[float]:
        """Rows of a batch over the mean rows of a batch, where a step is all batches of all processes."""
        rows = [sample[f"bucket0_{COLUMNS}"].shape[1] for sample in samples]
        total = torch.tensor([sum(rows), len(rows)], device=self.args.device)  # type: ignore[attr-defined]
        if dist.is_initialized():
            dist.all_reduce(total)
        all_rows, batches = total.tolist()
        return [count * batches / all_rows for count in rows]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of one batch; the trainer takes the mean over the batches of a step."""
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        return loss * self._shares.pop(0) if self._shares else loss

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the batch sampler. It is no option: those are stored with every checkpoint, and it holds whole columns."""
        if self._make_batches is not None:
            batches = self._make_batches(dataset, *args, **kwargs)
            self.add_callback(SetEpochCallback(batches))  # type: ignore[attr-defined]
            return batches
        return super().get_batch_sampler(dataset, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the trainer logs, and what this class adds."""
        if "loss" in logs:
            logs = {**logs, **self._figures()}
        super().log(logs, start_time)  # type: ignore[misc]

    def _tokens(self) -> int:
        return getattr(self.loss, "tokens", 0)  # type: ignore[attr-defined]

    def _figures(self) -> dict[str, float]:
        inner: Any = getattr(self.loss, "loss", self.loss)  # type: ignore[attr-defined]
        figures: dict[str, float] = inner.pop_statistics() if hasattr(inner, "pop_statistics") else {}
        now = (time.perf_counter(), self.state.global_step, self._tokens())  # type: ignore[attr-defined]
        seconds, steps, tokens = (after - before for after, before in zip(now, self._mark))
        self._mark = now
        if seconds <= 0 or not steps:
            return figures
        figures["examples_per_second"] = round(steps * self._rows_per_step / seconds, 3)
        rate = tokens * self.args.world_size / seconds  # type: ignore[attr-defined]
        if rate:
            figures["tokens_per_second"] = round(rate, 1)
        if rate and self._matrix_rate:
            world: int = self.args.world_size  # type: ignore[attr-defined]
            figures["mfu"] = round(rate * self._operations / (world * self._matrix_rate), 4)
        return figures


class EmbedderTrainer(ReportingMixin, SentenceTransformerTrainer):
    """:class:`ReportingMixin` over the trainer of embedding models."""


class RerankerTrainer(ReportingMixin, CrossEncoderTrainer):
    """:class:`ReportingMixin` over the trainer of rerankers."""
