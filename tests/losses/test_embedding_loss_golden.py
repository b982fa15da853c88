"""The embedding losses against values of the authors' code, or of the paper's rule where that code is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from unime_st.losses import HardNegativeRankingLoss, SoftLabelDistillationLoss


def golden_losses(folder: Path, name: str) -> tuple[dict, dict[str, np.ndarray]]:
    folder = folder / "losses"
    with np.load(folder / f"{name}.npz") as arrays:
        return json.loads((folder / f"{name}.json").read_text()), dict(arrays)


def tangential(gradient: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """The stored gradients treat the unit vectors as free; ours go through the normalization, which removes the part
    along the vector."""
    return gradient - (gradient * unit).sum(axis=-1, keepdims=True) * unit


def assert_close(found: torch.Tensor, wanted: np.ndarray, case: str) -> None:
    # The floor of 1e-12 is for exact optima, where both sides hold nothing but rounding.
    atol = max(1e-9 * float(np.abs(wanted).max()), 1e-12)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=atol, err_msg=case)


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_hard_negative_ranking(golden_cases: Path, model: SentenceTransformer, mini_batch_size: int | None) -> None:
    cases, arrays = golden_losses(golden_cases, "v1_hard_negative")
    for name, case in cases.items():
        query = torch.tensor(arrays[f"{name}.query"], requires_grad=True)
        positive = torch.tensor(arrays[f"{name}.candidates"], requires_grad=True)
        loss = HardNegativeRankingLoss(
            model, case["temperature"], case["threshold"], case["topk"], mini_batch_size=mini_batch_size
        )
        value = loss.calculate_loss([[query], [positive]], with_backward=mini_batch_size is not None)
        if mini_batch_size is None:
            value.backward()
        assert value.item() == pytest.approx(case["paper_cyclic_loss"], rel=1e-9), name
        for column, key in ((query, "query"), (positive, "candidates")):
            wanted = tangential(arrays[f"{name}.paper_cyclic_grad_{key}"], arrays[f"{name}.{key}"])
            assert_close(column.grad, wanted, f"{name}: gradient of {key}")


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_soft_label_distillation(golden_cases: Path, model: SentenceTransformer, mini_batch_size: int | None) -> None:
    cases, arrays = golden_losses(golden_cases, "v2_soft_kl")
    values = {"symmetric_kl": "exact_symmetric_kl_loss", "js": "true_js", "kl": "kl_judge_to_model"}
    for name, case in cases.items():
        if "exact_symmetric_kl_loss" not in case:
            continue  # the distributed runs repeat a case to show how the official class scales its loss
        scores = torch.tensor(arrays[f"{name}.judge_scores"])
        for divergence, key in values.items():
            query = torch.tensor(arrays[f"{name}.query"], requires_grad=True)
            candidates = torch.tensor(arrays[f"{name}.candidates"], requires_grad=True)
            columns = [[query], *([column] for column in candidates.unbind(1))]
            loss = SoftLabelDistillationLoss(model, case["temperature"], divergence, mini_batch_size=mini_batch_size)
            if mini_batch_size is None:
                value = loss.calculate_loss(columns, scores)
                value.backward()
            else:
                columns = [[query], *([column.detach().requires_grad_()] for (column,) in columns[1:])]
                value = loss.calculate_loss(columns, scores, with_backward=True)
                candidates.grad = torch.stack([column.grad for (column,) in columns[1:]], dim=1)
            assert value.item() == pytest.approx(case[key], rel=1e-9, abs=1e-15), f"{name}: {divergence}"
            if divergence == "symmetric_kl":
                for column, part in ((query, "query"), (candidates, "candidates")):
                    wanted = tangential(arrays[f"{name}.exact_grad_{part}"], arrays[f"{name}.{part}"])
                    assert_close(column.grad, wanted, f"{name}: gradient of {part}")
