"""Before a long run: what items cost, the mini-batch that fits, a rehearsal of the worst one, and what it will take."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from sentence_transformers.base.model import BaseModel
from tqdm.auto import tqdm

from unime_st.data.images import BadImageError
from unime_st.data.items import Item
from unime_st.data.records import ItemFolder
from unime_st.encoding import CostModel
from unime_st.training.feed import Feed
from unime_st.training.items import MiniBatches

logger = logging.getLogger(__name__)
UNREADABLE = -1
_AT_ONCE = 1024
_PROBES = (2048, 8192)  # token budgets at which memory is measured
_SHARE = 0.8  # of the free memory that a budget may take; the rest is for fragments and the optimiser
_LARGEST = 1 << 20


def item_costs(records: ItemFolder, model: Any, path: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Count the tokens of every stored item, and the pixels that decoding it makes; nothing is decoded.

    Args:
        records: The items.
        model: The model to train.
        path: ``.npy`` file that keeps the counts for the next start.

    Returns:
        tuple[np.ndarray, np.ndarray]: int64 of shape (items,) each; :data:`UNREADABLE` tokens where the header of a
            picture cannot be read.
    """
    if path is not None and path.is_file():
        tokens, pixels = np.load(path, allow_pickle=False)
        return tokens, pixels
    count = CostModel(model)
    parts = []
    items = iter(records.items)
    with tqdm(total=len(records.items), desc="counting tokens", unit="item") as progress:
        while chunk := list(islice(items, _AT_ONCE)):
            parts.append(_costs(chunk, count))
            progress.update(len(chunk))
    costs = np.concatenate(parts, axis=1)
    if path is not None:
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, costs, allow_pickle=False)
        temporary.replace(path)
    return costs[0], costs[1]


def _costs(items: Sequence[Item], count: CostModel) -> np.ndarray:
    costs = count([{"text": item.text or ""} for item in items])
    pixels = np.zeros_like(costs)
    pictured, sizes = [], []
    for place, item in enumerate(items):
        if item.image is None:
            continue
        try:
            sizes.append(item.image.size())
            pictured.append(place)
        except BadImageError:
            costs[place] = UNREADABLE
    if sizes:
        costs[pictured] += np.asarray(count.picture_tokens(sizes))
        pixels[pictured] = [width * height for width, height in sizes]
    return np.stack([costs, pixels])


@dataclass(frozen=True)
class Rehearsal:
    """What mini-batches took that are embedded in one pass.

    Args:
        tokens: Their tokens, padding not counted.
        seconds: Forward and backward pass, decoding included.
        peak_bytes: Highest memory of the device so far, or of the process where it computes on the CPU.
    """

    tokens: int
    seconds: float
    peak_bytes: int


def peak_bytes(device: torch.device) -> int:
    """Highest memory so far: of the device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available


def rehearse(model: BaseModel, feed: Feed, groups: Sequence[np.ndarray], dtype: torch.dtype) -> Rehearsal:
    """Embed mini-batches and go back through them, as one pass will; no weight and no random state changes.

    Args:
        model: The model, with its adapter.
        feed: Where its items come from.
        groups: Positions of the items of each mini-batch.
        dtype: What autocast computes in.
    """
    device = model.device
    began = time.perf_counter()
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    was_training = model.training
    model.train()
    with torch.random.fork_rng(), autocast:
        tokens, total = 0, torch.zeros((), device=device)
        for features in feed.stream([group.tolist() for group in groups], device):
            tokens += int(features["attention_mask"].sum())
            total = total + model(features)["sentence_embedding"].float().sum()
        total.backward()
        float(total.detach())  # waits for the device
    model.zero_grad()
    model.train(was_training)
    return Rehearsal(tokens, time.perf_counter() - began, peak_bytes(device))


def fitting_budget(
    model: BaseModel, feed: Feed, cut: Callable[[int], MiniBatches], positions: np.ndarray, dtype: torch.dtype
) -> int:
    """Find the token budget that fills the memory: measured at two budgets, drawn out in a straight line.

    Args:
        model: The model, with its adapter.
        feed: Where its items come from.
        cut: Makes of a budget how items are cut up.
        positions: The items.
        dtype: What autocast computes in.

    Returns:
        Tokens of a mini-batch, at least those of the largest item.
    """
    free = _free_bytes(model.device)
    costs = cut(_PROBES[0]).costs
    longest = int(costs[positions].max())
    measured = []
    for budget in _PROBES:
        mini_batches = cut(budget)
        group = positions[mini_batches.largest(mini_batches(positions), positions)]
        measured.append((len(group) * int(costs[group].max()), rehearse(model, feed, [group], dtype)))
    (small, first), (large, second) = measured
    if large <= small:  # so little data that one mini-batch holds everything alike
        return max(_PROBES[-1], longest)
    slope = max(1.0, (second.peak_bytes - first.peak_bytes) / (large - small))
    budget = small + int(_SHARE * free / slope)
    return int(np.clip(budget, longest, _LARGEST))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a plain matrix product on this device: what MFU compares with."""
    side = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)  # training's random numbers stay what they are
    left, right = (torch.randn(side, side, device=device, generator=own).to(dtype) for _ in range(2))
    times = []
    for _ in range(4):
        began = time.perf_counter()
        float((left @ right)[0, 0])
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times)


def operations_per_token(model: BaseModel, *, cached: bool, recomputed: bool) -> float:
    """Floating-point operations that training spends on a token: 2 per weight and pass.

    Only the weights of the language model are counted, so it is a lower bound where there are pictures.

    Args:
        model: The model, with its adapter.
        cached: Gradient caching: one forward pass more.
        recomputed: Gradient checkpointing: another one.
    """
    weights = trained = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "visual" in name or "vision" in name:
            continue
        weights += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    # Backward: one pass to the inputs, and one to the weights that are trained.
    return 2.0 * (weights * (2 + cached + recomputed) + trained)


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        rows: Rows of the data.
        set_aside: Rows left out because an image cannot be read.
        steps: Optimiser steps.
        rows_per_step: Rows of a step, on all devices.
        passes: Rows of all steps over rows of the data.
        tokens: Tokens of all steps.
        largest_item: Tokens of the most expensive item.
        mini_batch: How the batch is cut up, in words.
        trained: Weights that are trained.
        weights: Weights in all.
        flops: Floating-point operations of all steps (language model).
        hours: Estimated from the rehearsal; None where there was none.
        peak_gib: Highest memory in the rehearsal, of the device or (CPU) the process.
        device: What it was measured on.
        vision_cache: What is kept of pictures, in words; None: nothing.
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
    hours: float | None
    peak_gib: float | None
    device: str
    vision_cache: str | None = None

    def __str__(self) -> str:
        lines = [
            f"rows           {self.rows:,}" + (f" ({self.set_aside:,} set aside)" if self.set_aside else ""),
            f"steps          {self.steps:,} of {self.rows_per_step:,} rows: {self.passes:.2f} passes over the data",
            f"tokens         {self.tokens:,}; the largest item has {self.largest_item:,}",
            f"mini-batches   {self.mini_batch}",
            f"weights        {self.trained:,} of {self.weights:,} are trained",
            f"operations     {self.flops:.2e} (language model)",
        ]
        if self.vision_cache is not None:
            lines.append(f"vision cache   {self.vision_cache}")
        if self.hours is not None:
            lines.append(f"time           about {self.hours:.2g} hours on this device ({self.device})")
        if self.peak_gib is not None:
            lines.append(f"peak memory    {self.peak_gib:.2f} GiB in the rehearsal of the largest mini-batch")
        return "\n".join(f"  {line}" for line in lines)

    def facts(self) -> dict[str, Any]:
        """The plan for the manifest."""
        return asdict(self)
