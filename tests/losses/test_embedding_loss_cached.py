"""Gradient caching gives the plain value and gradient, on a real vision-language model."""

from __future__ import annotations

from collections.abc import Callable

import loss_batches as batches
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from unime_st.losses import SimilarityDistillationLoss

LOSSES = [
    *("similarity", "hard negatives", "all filtered", "info nce", "info nce, all"),
    *("soft labels", "soft labels, masked", "soft labels, in batch"),
]
ROWS = 5  # not a multiple of the mini-batch size


def backward(model: SentenceTransformer, loss: torch.nn.Module, features: list, labels: torch.Tensor | None) -> tuple:
    model.zero_grad()
    value = loss(features, labels)
    value.backward()
    return value.item(), batches.gradients(model)


@pytest.mark.parametrize("kind", ["text", "image", "mixed"])
@pytest.mark.parametrize("name", LOSSES)
def test_cached_equals_plain(embedder: Callable[..., SentenceTransformer], name: str, kind: str) -> None:
    model = embedder()
    results = []
    # The token budget packs differently but takes the same path: once is enough.
    for options in ({}, {"mini_batch_size": 2}, {"mini_batch_num_tokens": 30})[: 3 if kind == "mixed" else 2]:
        loss, num_columns, labels = batches.labelled_losses(model, ROWS, **options)[name]
        inputs = batches.features(model, [kind] * num_columns, ROWS)
        results.append(backward(model, loss, inputs, labels))
    (value, wanted), *cached = results
    assert (value == 0) == (name == "all filtered")
    for other, found in cached:
        assert other == pytest.approx(value, rel=1e-5)
        assert batches.largest_difference(found, wanted) < 2e-5


@pytest.mark.parametrize("name", LOSSES)
def test_dropout_masks_are_the_same_in_both_passes(embedder: Callable[..., SentenceTransformer], name: str) -> None:
    model = embedder(dropout=0.3)
    loss, num_columns, labels = batches.labelled_losses(model, ROWS, mini_batch_size=2)[name]
    kinds = ["text", "mixed", "image", "text"][:num_columns]
    torch.manual_seed(1)
    value, found = backward(model, loss, batches.features(model, kinds, ROWS), labels)

    # The same mini-batches in the same order from the same random state, but in one graph.
    torch.manual_seed(1)
    model.zero_grad()
    reps = [
        [rep for rep, _ in loss.embed_minibatch_iter(column, with_grad=True, copy_random_state=False)]
        for column in batches.features(model, kinds, ROWS)
    ]
    wanted = loss.calculate_loss(reps, labels)
    wanted.backward()
    assert value == pytest.approx(wanted.item(), rel=1e-5)
    assert batches.largest_difference(found, batches.gradients(model)) < 2e-5


@pytest.mark.parametrize("name", LOSSES)
def test_matryoshka_wraps_both(embedder: Callable[..., SentenceTransformer], name: str) -> None:
    model = embedder()
    results = []
    for options in ({}, {"mini_batch_size": 2}):
        loss, num_columns, labels = batches.labelled_losses(model, ROWS, **options)[name]
        wrapped = MatryoshkaLoss(model, loss, matryoshka_dims=[32, 8], matryoshka_weights=[1.0, 0.5])
        results.append(backward(model, wrapped, batches.features(model, ["text"] * num_columns, ROWS), labels))
    (value, wanted), (other, found) = results
    assert other == pytest.approx(value, rel=1e-5)
    assert batches.largest_difference(found, wanted) < 2e-5

    # ... and is the weighted sum over the truncated embeddings.
    loss, num_columns, labels = batches.labelled_losses(model, ROWS)[name]
    columns = [model(column)["sentence_embedding"] for column in batches.features(model, ["text"] * num_columns, ROWS)]
    parts = [loss.calculate_loss([[column[:, :dim]] for column in columns], labels).item() for dim in (32, 8)]
    assert value == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-5)


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_matryoshka_leaves_a_teacher_of_the_same_dimension_whole(
    embedder: Callable[..., SentenceTransformer], mini_batch_size: int | None
) -> None:
    model = embedder()
    teacher = torch.randn(ROWS, model.get_embedding_dimension(), generator=torch.Generator().manual_seed(0))
    loss = SimilarityDistillationLoss(model, 0.1)
    inputs = batches.features(model, ["text"], ROWS)
    model.zero_grad()
    column = model(inputs[0])["sentence_embedding"]
    parts = [loss.calculate_loss([[column[:, :dim]]], teacher) for dim in (32, 8)]
    expected = parts[0] + 0.5 * parts[1]
    expected.backward()
    wanted = batches.gradients(model)

    cached = SimilarityDistillationLoss(model, 0.1, mini_batch_size=mini_batch_size)
    wrapped = MatryoshkaLoss(model, cached, matryoshka_dims=[32, 8], matryoshka_weights=[1.0, 0.5])
    value, found = backward(model, wrapped, inputs, teacher)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert batches.largest_difference(found, wanted) < 2e-5
    with torch.no_grad():
        assert wrapped(inputs, teacher).item() == pytest.approx(value, rel=1e-5)
