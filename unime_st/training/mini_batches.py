"""Mini-batches: how the distinct items of a batch are grouped for embedding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unime_st.encoding import pack, split_by_pixels


@dataclass(frozen=True)
class MiniBatches:
    """Splits the items of a batch into mini-batches of similar length, the most expensive first.

    Args:
        costs: Tokens of each stored item, of shape (items,).
        size: Items of a mini-batch. None (default): by ``budget``.
        budget: Tokens of a mini-batch, padding included. With neither ``size`` nor ``budget`` items are grouped by
            similar length only.
        pixels: Pixels of each stored item's image before processing, of shape (items,). None (default): no limit.
        max_pixels: Most pixels that a mini-batch decodes. A larger image is a mini-batch of its own. Used with
            ``pixels``.
        frames: Frames of each stored item's video, 0 without one, of shape (items,). Videos of a mini-batch have
            equally many. None (default): they need not.
        sides: Prompts of the items: ``costs`` and ``pixels`` have every item once per side. Defaults to 1.

    Example:
        >>> split = MiniBatches(np.array([9, 2, 8, 3]), size=2)
        >>> [group.tolist() for group in split(np.array([0, 1, 2, 3]))]
        [[0, 2], [3, 1]]
    """

    costs: np.ndarray
    size: int | None = None
    budget: int | None = None
    pixels: np.ndarray | None = None
    max_pixels: int = 0
    frames: np.ndarray | None = None
    sides: int = 1

    def __call__(self, positions: np.ndarray) -> list[np.ndarray]:
        """Split items, given by their positions: indices into ``positions``, each once. A group has one side."""
        side = positions // (len(self.costs) // self.sides)
        groups: list[np.ndarray] = []
        for number in np.unique(side):
            own = np.flatnonzero(side == number)
            groups += [own[group] for group in self._split(positions[own])]
        return sorted(groups, key=lambda group: -len(group) * int(self.costs[positions[group]].max()))

    def count_kept(self, mini_batches: list[np.ndarray]) -> int:
        """Number of first mini-batches that take no more tokens together than one may: 1 where no limit cut them."""
        longest = [int(self.costs[positions].max()) for positions in mini_batches]
        padded = np.cumsum([most * len(positions) for most, positions in zip(longest, mini_batches)])
        size = self.size or sum(map(len, mini_batches))
        limit = self.budget if self.size is None and self.budget else size * max(longest)
        return max(1, int(np.searchsorted(padded, limit, side="right")))

    def _split(self, positions: np.ndarray) -> list[np.ndarray]:
        costs = self.costs[positions]
        if self.size is None:
            groups = pack(costs, self.budget or max(1, int(costs.max()) * len(costs)))
        else:
            order = np.argsort(-costs, kind="stable")
            groups = [order[begin : begin + self.size] for begin in range(0, len(order), self.size)]
        if self.pixels is not None:
            groups = split_by_pixels(groups, self.pixels[positions], self.max_pixels)
        if self.frames is not None:
            frames = self.frames[positions % len(self.frames)]
            groups = [part for group in groups for part in _split_by_frames(group, frames[group])]
        return groups


def _split_by_frames(group: np.ndarray, frames: np.ndarray) -> list[np.ndarray]:
    """Parts of a group whose videos have equally many frames; what has no video stays with the first part."""
    first, *others = np.unique(frames[frames > 0]).tolist() or [0]
    return [group[(frames == 0) | (frames == first)], *(group[frames == count] for count in others)]
