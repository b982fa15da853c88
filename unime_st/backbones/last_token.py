"""Last-token shortcut: the MLP of the last decoder layer runs for the pooled tokens only.

Last-token pooling reads one token per input. Behind the last attention every token goes its own way, so the others'
MLP, two thirds of the last layer, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_POOLED: ContextVar[tuple[Tensor, tuple[int, ...]] | None] = ContextVar("pooled tokens", default=None)
"""Indices of the pooled tokens in the flattened batch, and the shape of the batch."""


def prepare_last_layer(model: Any) -> bool:
    """Let :func:`only_last_tokens` reach the last decoder layer of a model; adds hooks to it.

    Args:
        model: A model of transformers.

    Returns:
        bool: False if the model has no decoder layers with an MLP.

    Example:
        >>> from unime_st import UniME
        >>> prepare_last_layer(UniME("unime-tiny").transformers_model)
        True
    """
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    mlp: Any = getattr(layers[-1], "mlp", None) if layers else None
    if not isinstance(mlp, nn.Module):
        return False
    if "takes_last_tokens" not in mlp.__dict__:
        mlp.__dict__["takes_last_tokens"] = True
        mlp.register_forward_pre_hook(_select)
        mlp.register_forward_hook(_scatter)
    return True


@contextmanager
def only_last_tokens(mask: Tensor, *, packed: bool = False) -> Iterator[None]:
    """Forward passes within compute the last hidden states of the last tokens only; the others' are wrong.

    Args:
        mask: Attention mask of shape (batch, length).
        packed: The model receives all rows without padding as one row. Defaults to False.
    """
    batch, length = mask.shape
    if packed:
        lengths = mask.sum(1)
        rows, shape = lengths.cumsum(0) - 1, (1, int(lengths.sum()))
    else:
        last = length - 1 - mask.flip(1).long().argmax(1)
        rows, shape = torch.arange(batch, device=mask.device) * length + last, (batch, length)
    token = _POOLED.set((rows, shape))
    try:
        yield
    finally:
        _POOLED.reset(token)


def _select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    pooled = _POOLED.get()
    if pooled is None or args[0].shape[:-1] != pooled[1]:
        return None
    return (args[0].flatten(0, 1)[pooled[0]], *args[1:])


def _scatter(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    pooled = _POOLED.get()
    if pooled is None or output.ndim != 2:
        return None
    rows, shape = pooled
    return output.new_zeros(shape[0] * shape[1], output.shape[-1]).index_copy(0, rows, output).view(*shape, -1)
