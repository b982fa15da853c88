"""The embedding losses in the stock trainer, and their errors for wrong inputs and options."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loss_batches as batches
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from unime_st.losses import HardNegativeRankingLoss, SimilarityDistillationLoss, SoftLabelDistillationLoss

Embedder = Callable[..., SentenceTransformer]


def train(
    model: SentenceTransformer, loss: torch.nn.Module, data: dict[str, list], folder: Path, **options: Any
) -> Any:
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-3,
        eval_strategy="epoch",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    dataset = Dataset.from_dict(data)
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=dataset, eval_dataset=dataset, loss=loss
    )
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("name", ["similarity", "hard negatives", "soft labels, in batch"])
def test_stock_trainer(embedder: Embedder, name: str, tmp_path: Path) -> None:
    model = embedder()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = 5  # leaves a last batch of one
    cached = {} if name == "hard negatives" else {"mini_batch_size": 2}
    loss, num_columns, labels = batches.labelled_losses(model, rows, **cached)[name]
    names = ["text"] if num_columns == 1 else ["query", "positive", "first", "second"][:num_columns]
    data: dict[str, list] = {column: batches.column("text", rows, seed) for seed, column in enumerate(names)}
    if labels is not None:
        data["label"] = labels.tolist()
    history = train(model, loss, data, tmp_path, bf16=name == "soft labels, in batch")
    assert [step for step in history if "loss" in step] and [step for step in history if "eval_loss" in step]
    assert all(torch.isfinite(torch.tensor(step["loss"])) for step in history if "loss" in step)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert loss.citation.strip() in {citation.strip() for citation in model.model_card_data.citations.values()}


COLUMN = [torch.ones(2, 4)]


@pytest.mark.parametrize(
    ("make", "columns", "labels", "message"),
    [
        (SimilarityDistillationLoss, 2, torch.ones(2, 3), "one text column, but got 2"),
        (SimilarityDistillationLoss, 1, None, "teacher's embeddings as labels.*no labels"),
        (SimilarityDistillationLoss, 1, torch.ones(3, 3), r"\(2, any\), but got labels of shape \(3, 3\)"),
        (SimilarityDistillationLoss, 1, torch.ones(2), r"labels of shape \(2,\)"),
        (SimilarityDistillationLoss, 1, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), r"row\(s\) \[1\]"),
        (SimilarityDistillationLoss, 1, torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), r"row\(s\) \[0\]"),
        (HardNegativeRankingLoss, 1, None, "query, positive and optionally negatives"),
        (SoftLabelDistillationLoss, 2, torch.ones(2, 1), "at least one negative"),
        (SoftLabelDistillationLoss, 4, None, r"\(2, 3\), but got no labels"),
        (SoftLabelDistillationLoss, 4, torch.ones(2, 2), r"\(2, 3\), but got labels of shape \(2, 2\)"),
        (SoftLabelDistillationLoss, 3, torch.tensor([[0.5, 0.5], [0.5, 1.01]]), "row 1, candidate 1 .* is 1.00"),
        (SoftLabelDistillationLoss, 3, torch.tensor([[0.5, -0.5], [0.5, 0.1]]), "row 0, candidate 1 .* is -0.5"),
        (SoftLabelDistillationLoss, 3, torch.tensor([[torch.nan, 0.5], [0.5, 0.1]]), "row 0, candidate 0 .* is nan"),
    ],
)
def test_wrong_inputs(
    model: SentenceTransformer, make: Callable, columns: int, labels: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(model).calculate_loss([COLUMN] * columns, labels)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (SimilarityDistillationLoss, {"temperature": 0.0}, "temperature must be a positive"),
        (SimilarityDistillationLoss, {"direction": "both"}, "direction must be one of"),
        (SimilarityDistillationLoss, {"mini_batch_size": 0}, "mini_batch_size must be at least 1"),
        (HardNegativeRankingLoss, {"temperature": float("nan")}, "temperature must be a positive"),
        (HardNegativeRankingLoss, {"temperature": None}, "temperature must be a positive finite number, but is None"),
        (HardNegativeRankingLoss, {"false_negative_margin": float("nan")}, "false_negative_margin"),
        (HardNegativeRankingLoss, {"num_negatives": 0}, "num_negatives must be at least 1"),
        (HardNegativeRankingLoss, {"mini_batch_num_tokens": -1}, "mini_batch_num_tokens must be at least 1"),
        (SoftLabelDistillationLoss, {"divergence": "jensen"}, "divergence must be one of"),
        (SoftLabelDistillationLoss, {"label_temperature": -1.0}, "label_temperature must be a positive"),
        (SoftLabelDistillationLoss, {"in_batch_weight": -0.1}, "in_batch_weight must be a finite number"),
    ],
)
def test_wrong_options(model: SentenceTransformer, make: Callable, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(model, **options)


def test_config_and_citation(model: SentenceTransformer) -> None:
    losses = [SimilarityDistillationLoss(model), HardNegativeRankingLoss(model), SoftLabelDistillationLoss(model)]
    assert [loss.get_config_dict() for loss in losses] == [
        {"temperature": 0.02, "direction": "teacher_student", "mask_diagonal": False, **DEFAULTS},
        {"temperature": 0.02, "false_negative_margin": 0.1, "num_negatives": 8, **DEFAULTS},
        {
            "temperature": 0.02,
            "divergence": "symmetric_kl",
            "labels": "scores",
            "label_temperature": 0.02,
            "in_batch_weight": 0.0,
            "false_negative_margin": None,
            "hardness_strength": 0.0,
            **DEFAULTS,
        },
    ]
    assert [re.search(r"eprint=\{(.*)\}", loss.citation)[1] for loss in losses] == ["2504.17432"] * 2 + ["2510.13515"]


DEFAULTS = {"mini_batch_size": None, "mini_batch_num_tokens": None, "gather_across_devices": False}
