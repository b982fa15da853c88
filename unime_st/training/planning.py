"""Cost estimate of a training: measured passes, the token budget that fits the memory, FLOPs and time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from sentence_transformers.base.model import BaseModel

from unime_st.durations import format_duration
from unime_st.memory import peak_resident
from unime_st.training.arguments import StageArguments
from unime_st.training.feed import Feed
from unime_st.training.mini_batches import MiniBatches
from unime_st.training.processes import partial_state
from unime_st.training.visual_tokens import autocast

logger = logging.getLogger(__name__)
_PROBES = (2048, 8192)  # token budgets at which memory is measured
_MEMORY_SHARE = 0.8  # of the free memory for a token budget; the rest is for fragmentation and the optimizer
_MAX_BUDGET = 1 << 20


@dataclass(frozen=True)
class MeasuredPass:
    """Measured forward and backward pass: tokens without padding, seconds with decoding, peak memory so far."""

    tokens: int
    seconds: float
    peak_bytes: int


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far, of the device or (CPU) of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available


def dry_run_step(model: BaseModel, feed: Feed, groups: Sequence[np.ndarray], dtype: torch.dtype) -> MeasuredPass:
    """Measure the forward and backward pass of mini-batches, given by the positions of items, as a step does."""

    def embed() -> tuple[torch.Tensor, int]:
        tokens, total = 0, torch.zeros((), device=model.device)
        for features in feed.stream([group.tolist() for group in groups], model.device):
            tokens += int(features["attention_mask"].sum())
            total = total + model(features)["sentence_embedding"].float().sum()
        return total, tokens

    return measure_pass(model, embed, dtype)


def measure_pass(model: BaseModel, run: Callable[[], tuple[torch.Tensor, int]], dtype: torch.dtype) -> MeasuredPass:
    """Measure a forward and backward pass. Weights and random state are kept.

    ``run`` runs the forward pass, under autocast with ``dtype``, and returns the loss and the number of tokens.
    """
    device = model.device
    began = time.perf_counter()
    was_training = model.training
    model.train()
    with torch.random.fork_rng(), autocast(model, dtype):
        total, tokens = run()
        total.backward()
        float(total.detach())  # synchronizes the device
    model.zero_grad()
    model.train(was_training)
    return MeasuredPass(tokens, time.perf_counter() - began, peak_bytes(device))


def fitting_budget(
    model: BaseModel, feed: Feed, cut: Callable[[int], MiniBatches], positions: np.ndarray, dtype: torch.dtype
) -> int:
    """Token budget of a mini-batch that fills the free memory, by linear extrapolation from two measured budgets.

    ``cut`` makes the mini-batches of a budget. The result is at least the tokens of the largest item.
    """
    free = _free_bytes(model.device)
    costs = cut(_PROBES[0]).costs
    longest = int(costs[positions].max())
    measured = []
    for budget in _PROBES:
        mini_batches = cut(budget)
        group = positions[mini_batches(positions)[0]]
        measured.append((len(group) * int(costs[group].max()), dry_run_step(model, feed, [group], dtype)))
    (small, first), (large, second) = measured
    if large <= small:  # few data: both budgets give the same mini-batch
        return max(_PROBES[-1], longest)
    slope = max(1.0, (second.peak_bytes - first.peak_bytes) / (large - small))
    budget = small + int(_MEMORY_SHARE * free / slope)
    return int(np.clip(budget, longest, _MAX_BUDGET))


def peak_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a plain matrix product, best of four: the reference of the model FLOPs utilization (MFU)."""
    side = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)  # leaves the random numbers of the training alone
    left, right = (torch.randn(side, side, device=device, generator=own).to(dtype) for _ in range(2))
    times = []
    for _ in range(4):
        began = time.perf_counter()
        float((left @ right)[0, 0])
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times)


def flops_per_token(model: BaseModel, *, cached: bool, recomputed: bool) -> float:
    """FLOPs of training per token: 2 per weight and pass, of which caching and gradient checkpointing add one each.

    Only the weights of the language model are counted: with images it is a lower bound.
    """
    weights = trained = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "visual" in name or "vision" in name:
            continue
        weights += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    # The backward pass computes gradients of the inputs, and of the trained weights.
    return 2.0 * (weights * (2 + cached + recomputed) + trained)


@dataclass(frozen=True)
class TrainingEstimate:
    """Expected cost of a training run, see :func:`estimate_training`.

    Args:
        rows: Rows of the data.
        set_aside: Rows set aside because an image cannot be read.
        steps: Optimizer steps.
        rows_per_step: Rows of a step, on all devices.
        passes: Epochs: rows of all steps over rows of the data.
        tokens: Tokens of all steps.
        largest_item: Tokens of the most expensive item.
        mini_batch: Description of the mini-batches.
        trained: Trained weights.
        weights: All weights.
        flops: Floating-point operations of all steps (language model).
        hours: Expected duration, from the measured passes.
        peak_gib: Peak memory of the measured passes, of the device or (CPU) of the process.
        device: Device that they were measured on.
        vision_cache: Description of the vision cache. None (default): there is none.
    """

    rows: int
    set_aside: int
    steps: int
    rows_per_step: int
    passes: float
    tokens: int
    largest_item: int
    mini_batch: str
    trained: int
    weights: int
    flops: float
    hours: float
    peak_gib: float
    device: str
    vision_cache: str | None = None

    def __str__(self) -> str:
        lines = [
            f"rows           {self.rows:,}" + (f" ({self.set_aside:,} set aside)" if self.set_aside else ""),
            f"steps          {self.steps:,} of {self.rows_per_step:,} rows: {self.passes:.2f} passes over the data",
            f"tokens         {self.tokens:,}; the largest item has {self.largest_item:,}",
            f"mini-batches   {self.mini_batch}",
            f"weights        {self.trained:,} of {self.weights:,} are trained",
            f"FLOPs          {self.flops:.2e} (language model)",
        ]
        if self.vision_cache is not None:
            lines.append(f"vision cache   {self.vision_cache}")
        lines.append(f"time           about {format_duration(self.hours * 3600)} on this device ({self.device})")
        lines.append(f"peak memory    {self.peak_gib:.2f} GiB, measured with the largest mini-batch")
        return "\n".join(f"  {line}" for line in lines)


def count_steps(arguments: StageArguments, rows: int, *, accumulates: bool = False) -> int:
    """Number of optimizer steps of a run.

    If a step accumulates small batches to the large one, it does so across the ends of epochs. Otherwise the batches
    that are left for the last step of an epoch form a smaller step.
    """
    a = arguments
    if a.max_steps > 0:
        return a.max_steps
    rounded = math.floor if a.dataloader_drop_last else math.ceil
    batch = a.per_device_train_batch_size * partial_state().num_processes
    if accumulates:
        return math.ceil(rounded(rows / (batch * a.gradient_accumulation_steps)) * a.num_train_epochs)
    return math.ceil(math.ceil(rounded(rows / batch) / a.gradient_accumulation_steps) * a.num_train_epochs)


def estimate_training(
    arguments: StageArguments,
    model: BaseModel,
    row_costs: np.ndarray,
    measured: Sequence[MeasuredPass],
    *,
    steps: int,
    unmeasured: float = 0.0,
    flops_per_token: float,
    **facts: Any,
) -> TrainingEstimate:
    """Estimate the cost of a training run from the tokens of each row and two measured passes.

    ``measured`` are the most expensive pass and a typical one; ``unmeasured`` is the time of a step that they lack,
    relative to theirs. ``facts`` are further fields of :class:`TrainingEstimate`.
    """
    world, rows = partial_state().num_processes, len(row_costs)
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world
    tokens = int(row_costs.mean() * steps * per_step)
    largest, usual = measured
    parameters = list(model.parameters())
    return TrainingEstimate(
        rows=rows,
        steps=steps,
        rows_per_step=per_step,
        passes=steps * per_step / rows,
        tokens=tokens,
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        weights=sum(p.numel() for p in parameters),
        flops=tokens * flops_per_token,
        hours=tokens / world * usual.seconds / max(usual.tokens, 1) * (1 + unmeasured) / 3600,
        peak_gib=largest.peak_bytes / 2**30,
        device=str(model.device),
        **facts,
    )
