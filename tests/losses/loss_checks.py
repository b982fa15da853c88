"""Value and gradient of an embedding loss, and their comparison with a formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unime_st.losses.base import CachedEmbeddingLoss


def run(loss: CachedEmbeddingLoss, columns: list[Tensor], labels: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients as ``forward`` gets them: in mini-batches if gradients are cached, else in one piece."""
    leaves = [column.detach().clone().requires_grad_() for column in columns]
    if loss.embeds_in_mini_batches:
        pieces = [[part.detach().requires_grad_() for part in leaf.split(2)] for leaf in leaves]
        value = loss.calculate_loss(pieces, labels, with_backward=True)
        assert not value.requires_grad
        return value, [torch.cat([part.grad for part in column]) for column in pieces]
    value = loss.calculate_loss([[leaf] for leaf in leaves], labels)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


def expect(columns: list[Tensor], formula: Callable[[list[Tensor]], Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [column.detach().clone().requires_grad_() for column in columns]
    value = formula(leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


def assert_same(found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]], rtol: float = 1e-6) -> None:
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=rtol, atol=1e-12)
    scale = max(float(gradient.abs().max()) for gradient in wanted[1])
    for gradient, other in zip(found[1], wanted[1]):
        torch.testing.assert_close(gradient.double(), other, rtol=rtol, atol=max(rtol * scale, 1e-12))


CACHED = pytest.mark.parametrize("cached", [None, 3], ids=["plain", "cached"])
