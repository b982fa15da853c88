"""What the embedding stages share: from rows of item ids to a loss, a collator, a sampler and a plan."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers.base.model import BaseModel
from torch import nn

from unime_st.data.items import Item
from unime_st.data.records import RecordSet
from unime_st.encoding import pixel_budget
from unime_st.files import read_json, write_json
from unime_st.losses.base import CachedEmbeddingLoss
from unime_st.training.adapters import computation_dtype
from unime_st.training.arguments import TrainArguments
from unime_st.training.batches import sampler
from unime_st.training.distinct_items import DistinctItemsLoss, ItemCollator
from unime_st.training.feed import Feed
from unime_st.training.frozen_tower import FrozenTowerCache
from unime_st.training.item_tokens import counted_costs, usable_rows
from unime_st.training.mini_batches import MiniBatches
from unime_st.training.planning import (
    MeasuredPass,
    count_steps,
    dry_run_step,
    estimate_training,
    fitting_budget,
    flops_per_token,
    peak_matmul_flops,
)
from unime_st.training.processes import processes
from unime_st.training.run import CHECKPOINTS, Setup
from unime_st.training.vision_cache import VisionCache, image_keys, largest_size
from unime_st.training.visual_tokens import check_frozen

logger = logging.getLogger(__name__)
IMAGES = "images.npy"
BUDGET = "token_budget.json"


@dataclass
class EmbedderSetup:
    """Makes the :class:`~unime_st.training.run.Setup` of an embedding stage.

    Args:
        arguments: Options.
        records: Where the item ids lead.
        loss: Makes the loss for the model.
        in_batch: Whether rows are compared with each other. If not, the loss is a mean over rows, small batches
            accumulated are the large one exactly, and no second forward pass is needed.
        distinct: No query and no positive comes twice in a batch.
    """

    arguments: TrainArguments
    records: RecordSet
    loss: Callable[[Any], nn.Module]
    in_batch: bool = True
    distinct: bool = True

    def __call__(self, model: BaseModel, rows: Dataset) -> Setup:
        """Count tokens, set rows aside that cannot be used, find the mini-batch and rehearse it."""
        a = self.arguments
        _check_prefixes(model, a.matryoshka_dims)
        if a.vision_cache is not None:
            check_frozen(model)
        costs, pixels = counted_costs(a, self.records, model)
        rows, indices, aside = usable_rows(a, self.records, rows, costs)
        datasets = list(rows["dataset"]) if "dataset" in rows.column_names else None
        rows = rows.remove_columns("dataset") if datasets else rows
        dtype = computation_dtype(a)
        vision = self._vision(model, costs, pixels, indices, dtype)
        reader: Any = vision or model
        open_item = vision.open_item if vision else Item.to_input
        feed = Feed(self.records, reader.preprocess, a.workers, open_item)
        # Stored visual tokens need no decoding.
        decoded = None if vision else pixels
        cut = partial(MiniBatches, costs, pixels=decoded, most_pixels=pixel_budget(model.device))
        distinct = np.unique(indices)
        budget = self._budget(model, feed, lambda budget: cut(budget=budget), distinct)
        mini_batches = cut(size=a.mini_batch_size if self.in_batch else None, budget=budget)
        row_costs = costs[indices].sum(axis=1)
        per_pass = a.batch_size if self.in_batch else self._rows_per_pass(indices.shape[1], row_costs, budget)
        lazy = self.in_batch and (budget or a.mini_batch_size) is not None
        state = processes()
        balanced = 1 if self.in_batch else a.batch_size // per_pass * a.gradient_accumulation_steps
        operations = flops_per_token(model, cached=lazy, recomputed=a.gradient_checkpointing)
        rehearsals = self._rehearse(model, feed, mini_batches, indices, per_pass, dtype, lazy)
        once = _frozen_tower_cache(model, dtype) if lazy and vision is None else None
        loss = DistinctItemsLoss(self.loss(model), feed if lazy else None, a.matryoshka_dims, once)
        gathers = bool(getattr(loss.loss, "gather_across_devices", False))
        return Setup(
            rows=rows,
            loss=loss,
            collator=ItemCollator(
                reader.preprocess, records=self.records, mini_batches=mini_batches, lazy=lazy, open_item=open_item
            ),
            make_batches=sampler(
                world_size=state.num_processes,
                datasets=datasets,
                temperature=a.dataset_temperature,
                sub_batch_size=a.sub_batch_size,
                distinct=self.distinct,
                costs=None if self.in_batch else row_costs,
                balanced=balanced,
                drop_last=a.drop_last,
                # Of the losses that gather, ours alone let shards differ in size.
                even=gathers and not isinstance(loss.loss, CachedEmbeddingLoss),
            ),
            batch_size=per_pass,
            accumulation=a.gradient_accumulation_steps * (a.batch_size // per_pass),
            plan=estimate_training(
                a,
                model,
                row_costs,
                rehearsals,
                steps=count_steps(a, len(rows), accumulates=not self.in_batch),
                # A rehearsal is a forward and a backward pass; caching adds a forward pass, a third of both.
                passes_more=1 / 3 if lazy else 0.0,
                operations=operations,
                set_aside=aside,
                largest_item=int(costs[indices].max()),
                mini_batch=self._words(lazy, per_pass, budget),
                vision_cache=str(vision) if vision else self._expected(model, costs, indices),
            ),
            flops_per_token=operations,
            peak_matmul_flops=peak_matmul_flops(model.device, dtype),
            # A loss that gathers weighs the rows of all processes itself; without a smaller batch all weigh the same.
            mean_over_rows=not gathers and not a.drop_last,
            cached=lazy,
        )

    def _vision(
        self, model: BaseModel, costs: np.ndarray, pixels: np.ndarray, indices: np.ndarray, dtype: torch.dtype
    ) -> VisionCache | None:
        a = self.arguments
        if a.vision_cache is None or a.dry_run:
            return None
        with processes().main_process_first():  # which leaves the keys to the others
            keys = image_keys(self.records, indices, Path(a.output) / IMAGES)
        vision = VisionCache(model, self.records, keys, a.vision_cache, dtype)
        vision.fill(model, Feed(self.records, model.preprocess, a.workers), costs, pixels)
        return vision

    def _expected(self, model: BaseModel, costs: np.ndarray, indices: np.ndarray) -> str | None:
        if self.arguments.vision_cache is None:
            return None
        return f"at most {largest_size(model, self.records, indices, costs) / 2**30:.2f} GiB"

    def _budget(
        self, model: BaseModel, feed: Feed, cut: Callable[[int], MiniBatches], positions: np.ndarray
    ) -> int | None:
        wanted = self.arguments.token_budget
        if wanted != "auto":
            return None if wanted is None else int(wanted)
        path = Path(self.arguments.output) / BUDGET
        if path.is_file() and any((path.parent / CHECKPOINTS).glob("checkpoint-*")):
            # Other mini-batches would draw other dropout masks: a resumed run keeps those of its checkpoints.
            return int(read_json(path)["token_budget"])
        budget = fitting_budget(model, feed, cut, positions, computation_dtype(self.arguments))
        # Processes may share a device, and all should take the smallest.
        state = processes()
        if state.num_processes > 1:
            smallest = torch.tensor([budget // (1 if model.device.type == "cuda" else state.num_processes)])
            smallest = smallest.to(state.device)
            torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
            budget = max(int(smallest), int(cut(budget).costs[positions].max()))
        logger.info("token_budget auto: %d tokens fit.", budget)
        if state.is_main_process and not self.arguments.dry_run:
            write_json(path, {"token_budget": budget})
        return budget

    def _rows_per_pass(self, columns: int, row_costs: np.ndarray, budget: int | None) -> int:
        """Rows that are embedded in one pass: a divisor of the batch, so that accumulating them gives the batch."""
        a = self.arguments
        if budget is not None:
            most = budget / float(row_costs.mean())
        elif a.mini_batch_size is not None:
            most = a.mini_batch_size / columns
        else:
            return a.batch_size
        return max(
            rows for rows in range(1, a.batch_size + 1) if a.batch_size % rows == 0 and (rows <= most or rows == 1)
        )

    def _rehearse(
        self,
        model: BaseModel,
        feed: Feed,
        cut: MiniBatches,
        indices: np.ndarray,
        per_pass: int,
        dtype: torch.dtype,
        lazy: bool,
    ) -> list[MeasuredPass]:
        """The most expensive pass that can come, so that it fails now if it fails; then a usual one for the time."""
        if lazy:
            distinct = np.unique(indices)
            groups = cut(distinct)
            passes = [[distinct[group]] for group in (groups[0], groups[len(groups) // 2])]
        else:
            order = np.argsort(-cut.costs[indices].sum(axis=1), kind="stable")
            middle = len(order) // 2
            usual = order[middle : middle + per_pass]
            # Without in-batch term the sampler deals rows out by cost: one of the most expensive, otherwise usual ones.
            worst = order[:per_pass] if self.in_batch else np.concatenate([order[:1], usual[: per_pass - 1]])
            items = [np.unique(indices[rows]) for rows in (worst, usual)]
            passes = [[positions[group] for group in cut(positions)] for positions in items]
        return [dry_run_step(model, feed, groups, dtype) for groups in passes]

    def _words(self, lazy: bool, per_pass: int, budget: int | None) -> str:
        a = self.arguments
        if not self.in_batch:
            return f"{per_pass} rows at a time, accumulated to {a.batch_size}: one forward pass"
        size = f"{budget:,} tokens" if budget else f"{a.mini_batch_size} items"
        return f"{size} at a time, gradients cached" if lazy else "the whole batch in one pass"


def _check_prefixes(model: Any, dims: list[int] | None) -> None:
    width = model.get_embedding_dimension()
    for dim in dims or ():
        if not 0 < dim <= width:
            raise ValueError(f"matryoshka_dims: {dim} is no prefix of this model's embeddings of {width} numbers.")


def _frozen_tower_cache(model: BaseModel, dtype: torch.dtype) -> FrozenTowerCache | None:
    try:
        return FrozenTowerCache(model, dtype)
    except ValueError:  # a vision tower that is trained, or of another kind, is run in both passes
        return None
