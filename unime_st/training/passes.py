"""Forward passes of a batch: token budget, rows of a pass, gradient caching, and a trial of the most expensive one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sentence_transformers.base.model import BaseModel

from unime_st.encoding import pixel_budget
from unime_st.files import read_json, write_json
from unime_st.training.adapters import computation_dtype
from unime_st.training.arguments import TrainArguments
from unime_st.training.feed import Feed
from unime_st.training.mini_batches import MiniBatches
from unime_st.training.planning import MeasuredPass, dry_run_step, fitting_budget
from unime_st.training.processes import partial_state

logger = logging.getLogger(__name__)
BUDGET = "token_budget.json"


@dataclass(frozen=True)
class Passes:
    """How a batch is embedded.

    Args:
        mini_batches: How items are cut into mini-batches.
        rows: Rows of a forward pass on one device; the passes of a batch are accumulated.
        in_batch: Rows are compared with each other, so a batch is one pass.
        cached: Gradients are cached: mini-batches are embedded one by one, twice.
        description: The same in words, for the plan.
    """

    mini_batches: MiniBatches
    rows: int
    in_batch: bool
    cached: bool
    description: str

    @classmethod
    def of(
        cls,
        args: TrainArguments,
        model: BaseModel,
        feed: Feed,
        indices: np.ndarray,
        tokens: np.ndarray,
        pixels: np.ndarray | None,
        frames: np.ndarray | None = None,
        *,
        in_batch: bool,
        resumes: bool,
        sides: int = 1,
    ) -> Passes:
        """Passes by the options, with the token budget measured where it is ``auto``.

        ``indices`` (rows, columns) are the positions of the rows' items; ``tokens`` and ``pixels`` (None: nothing is
        decoded) are those of every stored item on all ``sides``, ``frames`` (None: the videos of a pass may differ) those
        of every stored item. If rows are not compared with each other (``in_batch``), the loss is a mean over rows: small
        batches accumulated are the large one exactly, and no second forward pass is needed.
        """
        cut = partial(
            MiniBatches, tokens, pixels=pixels, max_pixels=pixel_budget(model.device), frames=frames, sides=sides
        )
        budget = _token_budget(args, model, feed, lambda size: cut(budget=size), np.unique(indices), resumes)
        rows = args.per_device_train_batch_size
        if not in_batch:
            rows = _rows_per_pass(args, budget, tokens[indices].sum(axis=1), indices.shape[1])
        split = in_batch and (budget or args.mini_batch_size) is not None
        cached = split and args.gradient_caching
        size = f"{budget:,} tokens" if budget else f"{args.mini_batch_size} items"
        how = "gradients cached" if cached else "the activations of all kept"
        words = f"{size} at a time, {how}" if split else "the whole batch in one pass"
        if not in_batch:
            words = f"{rows} rows at a time, accumulated to {args.per_device_train_batch_size}: one forward pass"
        mini_batches = cut(size=args.mini_batch_size if in_batch else None, budget=budget)
        return cls(mini_batches, rows, in_batch, cached, words)

    def measure(self, model: BaseModel, feed: Feed, indices: np.ndarray, dtype: torch.dtype) -> list[MeasuredPass]:
        """Try the most expensive pass, so that it fails now if it fails; then a usual one for the time."""
        if self.cached:
            distinct = np.unique(indices)
            groups = self.mini_batches(distinct)
            passes = [[distinct[group]] for group in (groups[0], groups[len(groups) // 2])]
        else:
            order = np.argsort(-self.mini_batches.costs[indices].sum(axis=1), kind="stable")
            middle = len(order) // 2
            usual = order[middle : middle + self.rows]
            # Without in-batch term the sampler deals rows out by cost: one of the most expensive, otherwise usual ones.
            worst = order[: self.rows] if self.in_batch else np.concatenate([order[:1], usual[: self.rows - 1]])
            items = [np.unique(indices[rows]) for rows in (worst, usual)]
            passes = [[positions[group] for group in self.mini_batches(positions)] for positions in items]
        return [dry_run_step(model, feed, groups, dtype) for groups in passes]


def _token_budget(
    args: TrainArguments,
    model: BaseModel,
    feed: Feed,
    cut: Callable[[int], MiniBatches],
    positions: np.ndarray,
    resumes: bool,
) -> int | None:
    if args.token_budget != "auto":
        return None if args.token_budget is None else int(args.token_budget)
    path = Path(args.output) / BUDGET
    if path.is_file() and resumes:
        # Other mini-batches would draw other dropout masks: a resumed run keeps those of its checkpoints.
        return int(read_json(path)["token_budget"])
    budget = fitting_budget(model, feed, cut, positions, computation_dtype(args))
    # Processes may share a device, and all should take the smallest.
    state = partial_state()
    if state.num_processes > 1:
        smallest = torch.tensor([budget // (1 if model.device.type == "cuda" else state.num_processes)])
        smallest = smallest.to(state.device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        budget = max(int(smallest), int(cut(budget).costs[positions].max()))
    logger.info("token_budget auto: %d tokens fit.", budget)
    if state.is_main_process and not args.dry_run:
        write_json(path, {"token_budget": budget})
    return budget


def _rows_per_pass(args: TrainArguments, budget: int | None, row_tokens: np.ndarray, columns: int) -> int:
    """Rows that are embedded in one pass: a divisor of the batch, so that accumulating them gives the batch."""
    batch = args.per_device_train_batch_size
    if budget is not None:
        most = budget / float(row_tokens.mean())
    elif args.mini_batch_size is not None:
        most = args.mini_batch_size / columns
    else:
        return batch
    return max(rows for rows in range(1, batch + 1) if batch % rows == 0 and (rows <= most or rows == 1))
