"""Random lists of listwise training: which candidates a list has, in which order, and which one is the answer."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def training_seed(device: torch.device) -> int:
    """Seed of a batch's lists in training; all processes take that of the first.

    It is a number of torch's global generator, whose state the trainer keeps in its checkpoints: a resumed training
    draws the lists of an uninterrupted one.
    """
    seed = torch.randint(2**62, (1,))
    if dist.is_available() and dist.is_initialized():
        seed = seed.to(device)
        dist.broadcast(seed, src=0)
    return int(seed)


def evaluation_seed(queries: Sequence[object]) -> int:
    """Seed of a batch's lists in evaluation, from the texts of its queries (texts, dicts or items).

    Nothing is drawn from the global generator, so that evaluating does not change the training, and every evaluation
    has the same lists.

    Example:
        >>> evaluation_seed(["a", {"text": "b"}]) == evaluation_seed(["a", "b"]) != evaluation_seed(["c"])
        True
    """
    texts = [
        query.get("text") if isinstance(query, dict) else getattr(query, "text", None) or query for query in queries
    ]
    return zlib.crc32("\n".join(text for text in texts if isinstance(text, str)).encode())


def draw_lists(rows: int, count: int, shortest: int, seed: int) -> list[list[int]]:
    """Draw a list of candidates for each row of this process, as indices of candidates, 0 being the positive.

    The negatives of a list are drawn without replacement and stay in their order. The position of the positive is
    uniform. Lists are drawn for the rows of all processes, so that several processes train on the lists of one.

    Args:
        rows: Rows of this process, the same number on every process.
        count: Candidates of a row, the positive included.
        shortest: Least length of a list; lengths are uniform from this to ``count``.
        seed: The same on every process.

    Example:
        >>> lists = draw_lists(3, 4, shortest=4, seed=1)
        >>> [sorted(indices) for indices in lists]
        [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    """
    world, rank = 1, 0
    if dist.is_available() and dist.is_initialized():
        world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, count + 1, (world * rows,), generator=generator)
    order = torch.rand(world * rows, count - 1, generator=generator).argsort(1) + 1
    slots = (torch.rand(world * rows, generator=generator, dtype=torch.float64) * lengths).long()
    lists = []
    for row in range(rank * rows, (rank + 1) * rows):
        indices = sorted(order[row, : lengths[row] - 1].tolist())
        indices.insert(int(slots[row]), 0)
        lists.append(indices)
    return lists


def list_targets(lists: list[list[int]], count: int, scores: Tensor | None, temperature: float | None) -> Tensor:
    """Probability of each position of each list to be the answer, ``(rows, count)``, 0 behind the end of a list.

    With a temperature it is ``softmax(scores / temperature)`` over the list, without one the positive is the answer.

    Raises:
        ValueError: If a temperature is given without scores.

    Example:
        >>> list_targets([[1, 0], [0, 1, 2]], 3, None, None).tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    targets = torch.zeros(len(lists), count)
    if temperature is None:
        for row, indices in enumerate(lists):
            targets[row, indices.index(0)] = 1.0
        return targets
    if scores is None:
        raise ValueError("target_temperature needs the judge's scores as labels; judge first, or leave it None.")
    for row, indices in enumerate(lists):
        targets[row, : len(indices)] = (scores[row, indices].float() / temperature).softmax(0)
    return targets
