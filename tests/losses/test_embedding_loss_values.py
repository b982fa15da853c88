"""Value and gradient of the embedding losses against loops over the papers' formulas."""

from __future__ import annotations

from collections.abc import Callable

import loss_reference as reference
import pytest
import torch
from loss_checks import CACHED, assert_same, expect, run
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unime_st.losses import (
    HardNegativeRankingLoss,
    SimilarityDistillationLoss,
    SoftLabelDistillationLoss,
)
from unime_st.losses.base import CachedEmbeddingLoss

rows = reference.random_rows


@CACHED
@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
@pytest.mark.parametrize("mask_diagonal", [False, True])
@pytest.mark.parametrize("temperature", [0.02, 0.3])
def test_similarity_distillation(
    model: SentenceTransformer, cached: int | None, direction: str, mask_diagonal: bool, temperature: float
) -> None:
    texts, teachers = rows(1, 7, 6), rows(2, 7, 11)
    loss = SimilarityDistillationLoss(
        model, temperature, direction, mask_diagonal=mask_diagonal, mini_batch_size=cached
    )
    wanted = expect(
        [texts], lambda c: reference.similarity_distillation(c[0], teachers, temperature, direction, mask_diagonal)
    )
    assert_same(run(loss, [texts], teachers), wanted)


@CACHED
@pytest.mark.parametrize("mask_diagonal", [False, True])
def test_similarity_distillation_at_the_extremes(
    model: SentenceTransformer, cached: int | None, mask_diagonal: bool
) -> None:
    loss = SimilarityDistillationLoss(model, 0.01, mask_diagonal=mask_diagonal, mini_batch_size=cached)
    cases = {
        "student sees no difference": (rows(3, 1, 5).repeat(6, 1), torch.eye(6, dtype=torch.float64)),
        "opposites": (torch.stack([rows(4, 5), -rows(4, 5), rows(5, 5), -rows(5, 5)]), rows(6, 4, 4).abs()),
        "the teacher itself": (rows(7, 5, 4), rows(7, 5, 4) * 3.0),
    }
    for texts, teachers in cases.values():
        wanted = expect(
            [texts],
            lambda c, t=teachers: reference.similarity_distillation(c[0], t, 0.01, "teacher_student", mask_diagonal),
        )
        assert_same(run(loss, [texts], teachers), wanted)
    value, (gradient,) = run(loss, [rows(8, 1, 5)], rows(9, 1, 3))  # a last batch of one text teaches nothing
    assert value == 0 and not gradient.any()


@CACHED
@pytest.mark.parametrize("num_columns", [2, 4])
@pytest.mark.parametrize("margin", [0.1, -0.1])
@pytest.mark.parametrize("num_negatives", [1, 4, 50])
def test_hard_negative_ranking(
    model: SentenceTransformer, cached: int | None, num_columns: int, margin: float, num_negatives: int
) -> None:
    columns = [rows(seed, 7, 6) for seed in range(num_columns)]
    loss = HardNegativeRankingLoss(model, 0.05, margin, num_negatives, mini_batch_size=cached)
    wanted = expect(columns, lambda c: reference.hard_negative_ranking(c, 0.05, margin, num_negatives))
    assert_same(run(loss, columns), wanted)


@CACHED
def test_hard_negatives_that_were_filtered_never_come_back(model: SentenceTransformer, cached: int | None) -> None:
    query = torch.tensor([[1.0, 0.0, 0.0]] * 3, dtype=torch.float64)
    # Row 0: both other positives are above cos = 0.5 + 0.1. Row 1: one above, one within. Row 2: both within.
    angles = torch.tensor([0.5, 0.62, 0.95], dtype=torch.float64).arccos()
    positive = torch.stack([angles.cos(), angles.sin(), angles * 0], dim=1)
    loss = HardNegativeRankingLoss(model, 0.02, 0.1, 8, mini_batch_size=cached)
    value, (_, gradient) = run(loss, [query, positive])
    at = lambda cos: torch.tensor(cos, dtype=torch.float64) / 0.02
    row1 = torch.logsumexp(torch.stack([at(0.62), *[at(0.5)] * 8]), 0) - at(0.62)
    row2 = torch.logsumexp(torch.stack([at(0.95), *[at(0.62), at(0.5)] * 4]), 0) - at(0.95)
    torch.testing.assert_close(value, (row1 + row2) / 3, rtol=1e-9, atol=0)
    assert gradient[2].abs().max() < 1e-3  # only its own row, nearly solved, pulls at the candidate filtered elsewhere


@CACHED
def test_all_negatives_filtered_gives_zero_and_zero_gradients(model: SentenceTransformer, cached: int | None) -> None:
    loss = HardNegativeRankingLoss(model, 0.02, -3.0, 8, mini_batch_size=cached)
    value, gradients = run(loss, [rows(1, 5, 4), rows(2, 5, 4), rows(3, 5, 4)])
    assert value == 0
    assert [gradient.shape for gradient in gradients] == [(5, 4)] * 3
    assert not any(gradient.any() for gradient in gradients)
    assert run(loss, [rows(1, 1, 4), rows(2, 1, 4)])[0] == 0  # a single pair has no candidates at all


@CACHED
@pytest.mark.parametrize("divergence", ["kl", "symmetric_kl"])
def test_log_odds_of_a_reranker_as_labels(model: SentenceTransformer, cached: int | None, divergence: str) -> None:
    columns = [rows(seed, 7, 6) for seed in range(4)]
    log_odds = 8.0 * torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = SoftLabelDistillationLoss(model, 0.1, divergence, labels="log_odds", mini_batch_size=cached)
    wanted = expect(
        columns, lambda c: reference.soft_label_distillation(c, log_odds, 0.1, divergence, 1.0, in_batch_weight=0.0)
    )
    assert_same(run(loss, columns, log_odds), wanted)
    with pytest.raises(ValueError, match="The log-odds of row 2, candidate 0 of this batch are not finite"):
        log_odds[2, 0] = float("nan")
        run(loss, columns, log_odds)
    with pytest.raises(ValueError, match="labels must be one of"):
        SoftLabelDistillationLoss(model, labels="logits")


@CACHED
@pytest.mark.parametrize("divergence", ["symmetric_kl", "js", "kl"])
@pytest.mark.parametrize(
    ("temperature", "label_temperature", "in_batch_weight"), [(0.02, None, 0.0), (0.1, 0.03, 0.0), (0.05, None, 0.7)]
)
def test_soft_label_distillation(
    model: SentenceTransformer,
    cached: int | None,
    divergence: str,
    temperature: float,
    label_temperature: float | None,
    in_batch_weight: float,
) -> None:
    columns = [rows(seed, 7, 6) for seed in range(5)]
    scores = torch.rand(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = SoftLabelDistillationLoss(
        model,
        temperature,
        divergence,
        label_temperature=label_temperature,
        in_batch_weight=in_batch_weight,
        mini_batch_size=cached,
    )
    wanted = expect(
        columns,
        lambda c: reference.soft_label_distillation(
            c, scores, temperature, divergence, label_temperature or temperature, in_batch_weight
        ),
    )
    assert_same(run(loss, columns, scores), wanted)


@CACHED
def test_a_positive_that_is_mined_elsewhere_is_no_negative(model: SentenceTransformer, cached: int | None) -> None:
    columns = [rows(seed, 5, 6) for seed in range(4)]
    columns[2][0] = columns[1][3]  # row 3's positive is mined by row 0, and row 1's by row 4
    columns[3][4] = columns[1][1]
    scores = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = SoftLabelDistillationLoss(model, 0.05, in_batch_weight=0.5, mini_batch_size=cached)
    wanted = expect(
        columns,
        lambda c: reference.soft_label_distillation(c, scores, 0.05, "symmetric_kl", 0.05, in_batch_weight=0.5),
    )
    assert_same(run(loss, columns, scores), wanted)


def gap(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Positives at cosine -0.6, negatives at 0.9 and 0.5: at temperature 0.01 the positive's probability is e-150."""
    query = torch.tensor([[1.0, 0.0]] * 3, dtype=dtype)
    angles = torch.tensor([-0.6, 0.9, 0.5], dtype=torch.float64).arccos()
    return [query, *(torch.tensor([[angle.cos(), angle.sin()]] * 3, dtype=dtype) for angle in angles)], torch.tensor(
        [[1.0, 0.0, 0.0], [0.9, 0.2, 0.1], [0.0, 0.0, 1.0]]
    )


@CACHED
@pytest.mark.parametrize("divergence", ["symmetric_kl", "js", "kl"])
def test_soft_labels_at_the_extremes(model: SentenceTransformer, cached: int | None, divergence: str) -> None:
    loss = SoftLabelDistillationLoss(model, 0.01, divergence, mini_batch_size=cached)
    columns = [rows(seed, 3, 5) for seed in range(4)]
    same = rows(9, 3, 5)
    cases = {
        "all scores equal": (columns, torch.full((3, 3), 0.37)),
        "scores 0 and 1": (columns, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])),
        "all similarities equal": ([columns[0], same, same, same], torch.tensor([[0.9, 0.1, 0.0]] * 3)),
        "integer labels": (columns, torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 0]])),
        "similarity gap": gap(torch.float64),
    }
    for inputs, scores in cases.values():
        wanted = expect(
            inputs,
            lambda c, s=scores: reference.soft_label_distillation(c, s.double(), 0.01, divergence, 0.01, 0.0),
        )
        assert_same(run(loss, inputs, scores), wanted)


def test_float32_keeps_the_gradient_across_a_similarity_gap(model: SentenceTransformer) -> None:
    columns, scores = gap(torch.float64)
    wanted = expect(
        columns, lambda c: reference.soft_label_distillation(c, scores.double(), 0.01, "symmetric_kl", 0.01, 0)
    )
    loss = SoftLabelDistillationLoss(model, 0.01)
    found = run(loss, gap(torch.float32)[0], scores)
    assert found[0].dtype == torch.float32
    assert_same(found, wanted, rtol=1e-4)
    assert all(gradient[0].abs().max() > 1 for gradient in found[1][:2])  # log(p + 1e-8) leaves about 1e-9


def all_losses(model: SentenceTransformer, **options: object) -> list[tuple[CachedEmbeddingLoss, int, Tensor | None]]:
    """Each loss with its number of columns and labels for a batch of 6."""
    scores = torch.rand(6, 3, generator=torch.Generator().manual_seed(1))
    return [
        (SimilarityDistillationLoss(model, **options), 1, rows(5, 6, 9).float()),
        (HardNegativeRankingLoss(model, num_negatives=3, **options), 3, None),
        (SoftLabelDistillationLoss(model, in_batch_weight=0.5, **options), 4, scores),
    ]


def test_half_precision_embeddings_are_widened_and_autocast_does_not_narrow(model: SentenceTransformer) -> None:
    for loss, num_columns, labels in all_losses(model):
        columns = [rows(seed, 6, 8).bfloat16() for seed in range(num_columns)]
        plain = loss.calculate_loss([[column.float()] for column in columns], labels)
        assert plain.dtype == torch.float32
        assert loss.calculate_loss([[column] for column in columns], labels) == plain
        with torch.autocast("cpu", torch.bfloat16):
            assert loss.calculate_loss([[column.float()] for column in columns], labels) == plain


def test_evaluation_needs_no_gradients(model: SentenceTransformer) -> None:
    for (loss, num_columns, labels), (cached, _, _) in zip(all_losses(model), all_losses(model, mini_batch_size=2)):
        reps = [[rows(seed, 6, 8)] for seed in range(num_columns)]
        with torch.no_grad():
            torch.testing.assert_close(cached.calculate_loss(reps, labels), loss.calculate_loss(reps, labels))


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_of_the_cached_loss_does_not_grow_with_the_square_of_the_batch(model: SentenceTransformer) -> None:
    batch, dim, negatives, chunk = 96, 4, 2, 4
    scores = torch.rand(batch, 1 + negatives)
    for loss, num_columns, labels in (
        (SimilarityDistillationLoss(model, mini_batch_size=chunk), 1, rows(1, batch, dim)),
        (HardNegativeRankingLoss(model, mini_batch_size=chunk), 2 + negatives, None),
        (SoftLabelDistillationLoss(model, in_batch_weight=1.0, mini_batch_size=chunk), 2 + negatives, scores),
    ):
        columns = [rows(seed, batch, dim) for seed in range(num_columns)]
        with LargestTensor() as largest:
            run(loss, columns, labels)
        embeddings = batch * num_columns * dim
        assert largest.elements <= max(embeddings, chunk * batch * (1 + negatives)) < batch * batch
