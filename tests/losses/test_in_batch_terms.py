"""Value and gradient of the in-batch terms against loops over the formulas: mask, weights, directions, temperature."""

from __future__ import annotations

import math

import loss_reference as reference
import pytest
import torch
from loss_checks import CACHED, assert_same, expect, run
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from unime_st.losses import InfoNCELoss, SoftLabelDistillationLoss
from unime_st.losses.base import whole_columns
from unime_st.losses.quantization import fake_quantize

rows = reference.random_rows

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@CACHED
@pytest.mark.parametrize("margin", [None, 2.0, 0.1, -0.2])
@pytest.mark.parametrize(
    ("directions", "partition"),
    [(DIRECTIONS[:1], "joint"), (DIRECTIONS, "joint"), (DIRECTIONS[::2], "per_direction"), (DIRECTIONS[::3], "joint")],
)
@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
def test_info_nce(
    model: SentenceTransformer,
    cached: int | None,
    margin: float | None,
    directions: tuple[str, ...],
    partition: str,
    mode: str,
) -> None:
    columns = [rows(seed, 6, 5) for seed in range(4)]
    columns[2][0] = columns[1][3]  # row 3's positive is mined by row 0, ...
    columns[1][4] = columns[1][5] * 2.0  # ... and two rows share one
    options = {"directions": directions, "partition_mode": partition, "hardness_mode": mode, "hardness_strength": 3.0}
    loss = InfoNCELoss(model, 0.1, false_negative_margin=margin, mini_batch_size=cached, **options)
    wanted = expect(
        columns,
        lambda c: reference.info_nce(c, 0.1, margin, directions, (mode, 3.0), partition == "per_direction"),
    )
    found = run(loss, columns)
    assert_same(found, wanted)
    statistics = loss.pop_statistics()
    assert ("masked_candidates" in statistics) == (margin is not None)
    if margin is None:
        stock = MultipleNegativesRankingLoss(model, scale=10.0, **options)
        leaves = [column.detach().clone().requires_grad_() for column in columns]
        value = stock.compute_loss_from_embeddings(leaves, None)
        value.backward()
        assert_same(found, (value.detach(), [leaf.grad for leaf in leaves]))


@CACHED
def test_a_learnable_temperature_gets_the_gradient_of_the_formula(
    model: SentenceTransformer, cached: int | None
) -> None:
    columns = [rows(seed, 7, 5) for seed in range(3)]
    loss = InfoNCELoss(model, 0.1, learnable_temperature=True, mini_batch_size=cached).double()
    found = run(loss, columns)
    if cached:  # as in a step: the gradient is scaled by what the backward pass begins with
        assert loss.log_scale is not None and loss.log_scale.grad is None
        attached = loss.attach_own_gradients(found[0].clone().requires_grad_())
        assert attached == found[0]
        (0.5 * attached).backward()
        loss.log_scale.grad *= 2.0
    log_scale = torch.tensor(math.log(10.0), dtype=torch.float64, requires_grad=True)
    value = reference.info_nce(columns, torch.exp(-log_scale), 0.1)
    value.backward()
    assert_same(found, expect(columns, lambda c: reference.info_nce(c, 0.1, 0.1)))
    assert loss.log_scale is not None
    torch.testing.assert_close(loss.log_scale.grad, log_scale.grad, rtol=1e-6, atol=1e-12)
    assert loss.temperature == pytest.approx(0.1) and loss.get_config_dict()["learnable_temperature"]
    assert loss.pop_statistics()["temperature"] == pytest.approx(0.1, abs=1e-6)
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    run(loss, columns)
    assert loss.temperature == pytest.approx(0.01)  # not smaller
    assert not [name for name, _ in InfoNCELoss(model).named_parameters() if "model" not in name]


@CACHED
@pytest.mark.parametrize(("margin", "hardness"), [(0.1, 0.0), (None, 3.0), (-0.1, 3.0)])
def test_mask_and_hardness_of_the_soft_labels_in_batch_term(
    model: SentenceTransformer, cached: int | None, margin: float | None, hardness: float
) -> None:
    columns = [rows(seed, 7, 6) for seed in range(4)]
    columns[2][0] = columns[1][3]
    scores = torch.rand(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"false_negative_margin": margin, "hardness_strength": hardness, "mini_batch_size": cached}
    loss = SoftLabelDistillationLoss(model, 0.1, in_batch_weight=0.7, **options)
    wanted = expect(
        columns,
        lambda c: reference.soft_label_distillation(c, scores, 0.1, "symmetric_kl", 0.1, 0.7, margin, hardness),
    )
    assert_same(run(loss, columns, scores), wanted)


@CACHED
def test_a_margin_that_masks_everything_is_refused(model: SentenceTransformer, cached: int | None) -> None:
    columns = [rows(seed, 4, 5) for seed in range(3)]
    close = [columns[0], columns[0] + 1e-3 * columns[1], columns[2]]
    with pytest.raises(
        ValueError, match=r"InfoNCELoss: false_negative_margin -1.9 masks every candidate of this batch"
    ):
        run(InfoNCELoss(model, false_negative_margin=-1.9, mini_batch_size=cached), close)
    with pytest.raises(ValueError, match="masks every candidate of this batch"):
        loss = SoftLabelDistillationLoss(
            model, in_batch_weight=1.0, false_negative_margin=-1.9, mini_batch_size=cached
        )
        run(loss, close, torch.rand(4, 2))
    run(InfoNCELoss(model, false_negative_margin=0.1, mini_batch_size=cached), [column[:1] for column in columns[:2]])


def test_options_of_in_batch_terms_that_are_refused(model: SentenceTransformer) -> None:
    for options, message in (
        ({"false_negative_margin": -2.0}, "above -2"),
        ({"false_negative_margin": float("nan")}, "above -2"),
        ({"hardness_strength": -1.0}, "hardness_strength must be a finite number >= 0"),
        ({"hardness_mode": "all"}, "hardness_mode must be one of"),
        ({"directions": ("doc_to_query",)}, "must contain 'query_to_doc'"),
        ({"directions": ("query_to_doc", "up")}, r"got \['up'\]"),
        ({"directions": ("query_to_doc", "doc_to_doc"), "partition_mode": "per_direction"}, "use 'joint'"),
        ({"partition_mode": "none"}, "partition_mode must be one of"),
        ({"temperature": 0.0}, "temperature must be a positive"),
        (
            {"temperature": 0.005, "learnable_temperature": True},
            "a learnable temperature must begin at 0.01 or more, but is 0.005.",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            InfoNCELoss(model, **options)
    with pytest.raises(ValueError, match="set in_batch_weight"):
        SoftLabelDistillationLoss(model, false_negative_margin=0.1)


@CACHED
def test_roundings_are_masked_by_the_whole_embeddings(model: SentenceTransformer, cached: int | None) -> None:
    """Documents of equal signs are different ones, and stay negatives in binary precision."""
    columns = [rows(seed, 5, 6) for seed in range(2)]
    columns[1][1] = (
        columns[1][0].abs() * columns[1][0].sign() + 0.3 * columns[1][0].sign()
    )  # other values, equal signs
    columns[1][4] = columns[1][3] * 2.0  # the same document
    rounded = [column.detach() for column in fake_quantize(columns, "binary")]
    assert torch.equal(rounded[1][0], rounded[1][1])
    loss = InfoNCELoss(model, 0.1, false_negative_margin=2.0, mini_batch_size=cached)
    with whole_columns(loss, columns):
        found = run(loss, rounded)
    assert loss.pop_statistics()["masked_candidates"] == pytest.approx(2 / 20)
    similarities = rounded[0] @ rounded[1].T / 0.1
    positives = similarities.diagonal().clone()
    similarities[3, 4] = similarities[4, 3] = -math.inf
    torch.testing.assert_close(found[0], (similarities.logsumexp(dim=1) - positives).mean())
    run(loss, rounded)  # by the roundings alone, which is all that is known without the whole embeddings
    assert loss.pop_statistics()["masked_candidates"] == pytest.approx(4 / 20)

    scores = torch.rand(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    soft = SoftLabelDistillationLoss(
        model, 0.1, in_batch_weight=1.0, false_negative_margin=2.0, mini_batch_size=cached
    )
    with whole_columns(soft, [*columns, columns[0]]):
        run(soft, [*rounded, rounded[0]], scores)
    assert soft.pop_statistics()["masked_candidates"] == pytest.approx(2 / 40)
