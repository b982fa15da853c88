"""Mini-batches of a batch: which distinct items are embedded together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unime_st.encoding import pack, split_by_pixels


@dataclass(frozen=True)
class MiniBatches:
    """How the items of a batch are cut up: like lengths together, the largest first.

    Args:
        costs: Tokens of every stored item.
        size: Items of a mini-batch.
        budget: Instead: tokens of a mini-batch, padding included. With neither, items of like length are together.
        pixels: Pixels of every stored item's image, before it is processed. None counts none.
        most_pixels: Those that a mini-batch may decode; a larger image stands alone.
    """

    costs: np.ndarray
    size: int | None = None
    budget: int | None = None
    pixels: np.ndarray | None = None
    most_pixels: int = 0

    def __call__(self, positions: np.ndarray) -> list[np.ndarray]:
        """Return the mini-batches of the items at ``positions``, as places in it, by falling tokens with padding."""
        costs = self.costs[positions]
        if self.size is None:
            groups = pack(costs, self.budget or max(1, int(costs.max()) * len(costs)))
        else:
            order = np.argsort(-costs, kind="stable")
            groups = [order[begin : begin + self.size] for begin in range(0, len(order), self.size)]
        if self.pixels is not None:
            groups = split_by_pixels(groups, self.pixels[positions], self.most_pixels)
        return sorted(groups, key=lambda group: -len(group) * int(costs[group].max()))
