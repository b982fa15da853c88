"""Matrix products on a CPU by the library that is faster there: PyTorch's or NumPy's."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

_CLEARLY = 1.5
"""How many times faster NumPy has to be: its threads wait for work on cores that PyTorch needs for what comes next."""
_LARGE = 1 << 20
"""Number of products from which the choice matters."""
_WAIT_SECONDS = 0.05
"""Time after which NumPy's threads no longer wait."""


def product(left: torch.Tensor, right: np.ndarray, out: torch.Tensor) -> torch.Tensor:
    """Products of all rows of two matrices.

    Args:
        left: Tensor of shape (n, dim) on the CPU.
        right: Array of shape (m, dim) of the same type; may be read-only memory.
        out: Tensor of shape (n, m) for the result.

    Returns:
        torch.Tensor: ``out``. Overflow gives infinity or NaN.

    Example:
        >>> import numpy as np, torch
        >>> from unime_st.retrieval.products import product
        >>> product(torch.ones(1, 2), np.ones((3, 2), dtype=np.float32), torch.empty(1, 3))
        tensor([[2., 2., 2.]])
    """
    if out.numel() >= _LARGE and _numpy_is_faster():
        _by_numpy(left, right, out)
        return out
    # PyTorch cannot share memory that is read-only.
    shared = torch.from_numpy(right) if right.flags.writeable else torch.tensor(right)
    return torch.mm(left, shared.T, out=out)


def _by_numpy(left: torch.Tensor, right: np.ndarray, out: torch.Tensor) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        np.matmul(left.numpy(), right.T, out=out.numpy())


@cache
def _numpy_is_faster() -> bool:
    """Whether NumPy is clearly faster on this processor, by products of a few milliseconds."""
    # No random numbers: a search between two training steps must not change those of the next step.
    left, right, out = torch.ones(256, 256), torch.ones(2048, 256), torch.empty(256, 2048)
    time.sleep(_WAIT_SECONDS)
    torch_seconds = _least_seconds(lambda: torch.mm(left, right.T, out=out))
    return _CLEARLY * _least_seconds(lambda: _by_numpy(left, right.numpy(), out)) < torch_seconds


def _least_seconds(work: Callable[[], object]) -> float:
    found = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)
