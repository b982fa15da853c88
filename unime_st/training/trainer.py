"""The stock trainers with the figures of contrastive training in their logs, and an end to runs that diverge."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.cross_encoder import CrossEncoderTrainer
from transformers import TrainerCallback, TrainerControl, TrainerState


class _TellsTheEpoch(TrainerCallback):
    """A resumed run on several processes wraps the batch sampler so deep that the trainer does not reach it."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.batches.set_epoch(int(state.epoch or 0))


class ReportingMixin:
    """Adds to the log: the loss's own statistics, examples and tokens per second, the share of the matrix rate.

    Counts are those of this process; rates are times the number of processes.

    Args:
        *args: Of the trainer.
        make_batches: Makes the batch sampler; None (default) leaves it to the trainer's options.
        rows_per_step: Rows of an optimiser step, on all devices.
        operations_per_token: Floating-point operations that a token takes.
        matrix_rate: Operations per second that the device could do; 0 leaves MFU out.
        **kwargs: Of the trainer.
    """

    def __init__(
        self,
        *args: Any,
        make_batches: Callable[..., Any] | None = None,
        rows_per_step: int = 0,
        operations_per_token: float = 0.0,
        matrix_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._make_batches = make_batches
        self._rows_per_step, self._operations, self._matrix_rate = rows_per_step, operations_per_token, matrix_rate
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

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the batch sampler. It is no option: those are stored with every checkpoint, and it holds whole columns."""
        if self._make_batches is not None:
            batches = self._make_batches(dataset, *args, **kwargs)
            self.add_callback(_TellsTheEpoch(batches))  # type: ignore[attr-defined]
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
