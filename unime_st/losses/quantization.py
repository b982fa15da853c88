"""Fake quantization of embeddings with straight-through gradients, for quantization-aware training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from unime_st.losses.base import normalize_rows

Precision = Literal["int8", "binary"]
_LEVELS = 255  # steps between the smallest and the largest value of a dimension


def fake_quantize(columns: Sequence[Tensor], precision: Precision) -> list[Tensor]:
    """Round embeddings to a precision; the gradient passes as if they had not been rounded.

    Args:
        columns: ``(rows, dim)`` each, the input columns of a batch. They are normalized first.
        precision: ``"int8"``, 256 levels between the smallest and the largest value of each dimension in the batch, as
            :func:`sentence_transformers.util.quantize_embeddings` and the index kind ``sq8`` have them; or ``"binary"``,
            the sign of each dimension, times 1 / sqrt(dim).

    Returns:
        list[Tensor]: Columns of the same shape.

    Raises:
        ValueError: If the precision is unknown.

    References:
        - Straight-through estimator: https://arxiv.org/abs/1308.3432
        - Qwen3-VL-Embedding, quantization-aware training: https://arxiv.org/abs/2601.04720. Its step sizes are learned
          (LSQ); here they follow the batch.

    Example:
        >>> import torch
        >>> [column.tolist() for column in fake_quantize([torch.tensor([[0.6, -0.8]])], "binary")]
        [[[0.7071067690849304, -0.7071067690849304]]]
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)}, but is {precision!r}.")
    units = [normalize_rows(column) for column in columns]
    with torch.no_grad():
        every = torch.cat(units)
        low, high = every.min(dim=0).values, every.max(dim=0).values
        step = ((high - low) / _LEVELS).clamp(min=torch.finfo(every.dtype).tiny)
        if precision == "int8":
            rounded = [low + ((unit - low) / step).round() * step for unit in units]
        else:
            rounded = [torch.where(unit >= 0, 1.0, -1.0).to(unit) / unit.shape[1] ** 0.5 for unit in units]
    return [unit + (value - unit).detach() for unit, value in zip(units, rounded, strict=True)]
