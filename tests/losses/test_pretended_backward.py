"""Losses and their gradients on a pretended CUDA device: no operator mixes devices, and values equal those of the CPU."""

from __future__ import annotations

from typing import Any

import loss_batches
import pytest
import torch
from pretended_devices import equal_dropout, on_both
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from tiny_pairs import ITEMS

from unime_st import Item, UniME, UniMEReranker
from unime_st.losses import RerankerLoss

LOSSES = ["similarity", "hard negatives", "info nce", "info nce, all", "soft labels, masked"]


@pytest.mark.parametrize("cached", [{}, {"mini_batch_size": 2}], ids=["plain", "cached"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients(name: str, cached: dict[str, int]) -> None:
    """Of a real model; also of truncated embeddings (Matryoshka) and with dropout, whose masks are drawn twice."""

    def run(device: str) -> list[Any]:
        model = UniME("unime-tiny", device=device).train()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = equal_dropout(0.2)
        loss, num_columns, labels = loss_batches.labelled_losses(model, 5, **cached)[name]
        loss.to(device)
        wrapped = MatryoshkaLoss(model, loss, matryoshka_dims=[128, 32])
        torch.manual_seed(0)
        features = loss_batches.features(model, ["mixed"] * num_columns, 5)
        moved = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in f.items()} for f in features]
        value = wrapped(moved, None if labels is None else labels.to(device))
        value.backward()
        found = {**loss_batches.gradients(model), **loss_batches.own_gradients(loss)}
        assert {gradient.device.type for gradient in found.values()} == {device}
        return [value.item(), {key: gradient.cpu() for key, gradient in found.items()}]

    on_both(run)


@pytest.mark.parametrize("size", [None, 2], ids=["plain", "cached"])
def test_reranker_loss_and_its_gradient(size: int | None) -> None:
    batch = (
        [Item("a red circle"), ITEMS[3]],
        [ITEMS[4], Item("blue")],
        [Item("a star"), ITEMS[5]],
        [ITEMS[7], ITEMS[1]],
    )

    def run(device: str) -> list[Any]:
        model = UniMEReranker("unime-tiny", template="tiny", device=device).train()
        torch.manual_seed(0)
        parts = RerankerLoss(model, mini_batch_size=size)(list(batch), torch.tensor([[2.0, -1.0, 0.0]] * 2))
        sum(parts.values()).backward()
        return [
            {name: part.item() for name, part in parts.items()},
            {name: gradient.cpu() for name, gradient in loss_batches.gradients(model).items()},
        ]

    on_both(run, 1e-4)
