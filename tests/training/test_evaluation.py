"""Evaluation while training: right figures, the best model is saved, early stopping, resumption."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.programs import Program
from unime_st import Item, UniME, UniMEReranker
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.stages import InBatchArguments, RerankerArguments, train_in_batch, train_reranker
from unime_st.training.evaluation import RankingEvaluator, RetrievalEvaluator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Records to train on, and held-out ones of two datasets."""
    folder = tmp_path_factory.mktemp("data")
    held_out = [
        PairRecord(pair.query, pair.positive, f"set {number % 2}")
        for number, pair in enumerate(training_records(30, seed=11))
    ]
    RecordSet.write(folder / "records", training_records(24, seed=3), {})
    RecordSet.write(folder / "held_out", held_out, {})
    return str(folder / "records"), str(folder / "held_out")


def _best_ranks(model: UniME, rows: list[PairRecord]) -> list[int]:
    """Ranks by brute force: of every distinct query in a dataset, its best positive among the dataset's positives."""
    ranks = []
    for dataset in {row.dataset for row in rows}:
        mine = [row for row in rows if row.dataset == dataset]
        corpus = list({row.positive.id: row.positive for row in mine}.values())
        vectors = np.stack([model.encode(item.to_input()) for item in corpus]).astype(np.float64)
        for query in {row.query.id: row.query for row in mine}.values():
            right = {row.positive.id for row in mine if row.query.id == query.id}
            similarity = vectors @ model.encode(query.to_input()).astype(np.float64)
            order = [
                i for i in np.argsort(-similarity, kind="stable") if corpus[i].id in right or corpus[i].id != query.id
            ]
            ranks.append(1 + next(rank for rank, i in enumerate(order) if corpus[i].id in right))
    return ranks


def test_retrieval_is_that_of_brute_force(folders: tuple[str, str], tmp_path: Path) -> None:
    rows = list(RecordSet.load(folders[1]))
    rows += [PairRecord(rows[0].query, rows[4].positive, rows[0].dataset)]  # a query with two positives
    rows += [PairRecord(rows[2].positive, rows[6].positive, rows[2].dataset)]  # a query that is in the corpus
    model = UniME("unime-tiny", device="cpu")
    found = RetrievalEvaluator(RecordSet.write(tmp_path / "rows", rows, {}))(model)
    ranks = np.array(_best_ranks(model, rows))
    assert found["hit@1"] == pytest.approx((ranks == 1).mean())
    assert found["mrr@10"] == pytest.approx(np.where(ranks <= 10, 1 / ranks, 0).mean())
    assert 0 < found["hit@1"] < found["mrr@10"] < 1


def test_an_unreadable_image_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = []
    for number, pair in enumerate(training_records(8, seed=2)):
        image = pair.query.image or pair.positive.image
        (tmp_path / f"{number}.png").write_bytes(image.read())
        rows.append(PairRecord(Item(f"image {number}"), Item(image=tmp_path / f"{number}.png")))
    records = RecordSet.write(tmp_path / "rows", rows, {}, image_root=tmp_path)
    (tmp_path / "3.png").write_bytes(b"no image")
    evaluator = RetrievalEvaluator(records)
    assert len(evaluator.ranks(UniME("unime-tiny", device="cpu"))) == 7
    assert "1 rows with unreadable images left out" in caplog.text


@pytest.mark.parametrize("judged", [False, True])
def test_ranking_is_that_of_the_scores(folders: tuple[str, str], tmp_path: Path, judged: bool) -> None:
    rows = list(RecordSet.load(folders[1]))[:12]
    if judged:
        rows = [
            PairRecord(r.query, r.positive, r.dataset, (rows[i - 1].positive, r.positive)) for i, r in enumerate(rows)
        ]
    model = UniMEReranker("unime-tiny", template="tiny", device="cpu")
    evaluator = RankingEvaluator(RecordSet.write(tmp_path / "rows", rows, {}), num_negatives=5)
    expected = []
    for query, candidates in evaluator._rows:
        assert len(candidates) == (3 if judged else 6)
        item = evaluator.records.item
        scores = model.predict([(item(query), item(candidate)) for candidate in candidates])
        expected.append(1 + int((scores[1:] >= scores[0]).sum()))
    assert evaluator.ranks(model).tolist() == expected
    assert not judged or min(expected) > 1  # a negative that is equal to the positive stands before it


def _log(folder: Path) -> tuple[list[float], dict[int, float]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    return losses, {entry["step"]: entry["eval_mrr@10"] for entry in entries if "eval_mrr@10" in entry}


OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "mini_batch_size": 6, "learning_rate": 2e-2, "lr_scheduler_type": "constant",
    "warmup_steps": 0, "logging_steps": 1, "save_steps": 1, "eval_steps": 1, "max_steps": 8,
    "load_best_model_at_end": True,
}  # fmt: skip


@pytest.mark.parametrize("own", [{}, {"lora_rank": 0}, {"quantize": "nf4"}], ids=["lora", "full", "nf4"])
@pytest.mark.slow
def test_the_best_model_is_saved(folders: tuple[str, str], tmp_path: Path, own: dict[str, Any]) -> None:
    output = tmp_path / "out"
    options = {**OPTIONS, **own, "max_steps": 6, "lora_dropout": 0.0}
    train_in_batch(InBatchArguments(data=folders[0], eval_data=folders[1], output=str(output), **options))
    losses, evaluations = _log(output)
    manifest = json.loads((output / "manifest.json").read_text())
    best = manifest["best"]["step"]
    assert len(losses) == 6 and list(evaluations) == [1, 2, 3, 4, 5, 6]
    assert manifest["best"]["mrr@10"] == evaluations[best] == max(evaluations.values())
    assert evaluations[6] < evaluations[best], "the last model is the best one, so nothing is proved"
    found = RetrievalEvaluator(RecordSet.load(folders[1]))(UniME(str(output), device="cpu"))
    tolerance = 0.05 if own.get("quantize") else 1e-6  # the adapter goes into weights that are not quantized
    assert found["mrr@10"] == pytest.approx(evaluations[best], abs=tolerance)


@pytest.mark.slow
def test_training_stops_early_and_a_killed_run_chooses_the_same_model(
    folders: tuple[str, str], tmp_path: Path
) -> None:
    common = {**OPTIONS, "data": folders[0], "eval_data": folders[1], "early_stopping_patience": 2, "max_steps": 30}
    words = [str(word) for name, value in common.items() for word in (f"--{name}", value)]
    outputs = [tmp_path / "cut", tmp_path / "whole"]
    script = ["-m", "unime_st.cli", "in_batch", *words, "--output", str(outputs[0])]
    with Program(script, cwd=ROOT) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not list(outputs[0].glob("checkpoints/checkpoint-2/files.json")):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not (outputs[0] / "manifest.json").exists(), "the run ended before it could be killed"
    for output in outputs:
        train_in_batch(InBatchArguments(**common, output=str(output)))
    (cut, found), (whole, expected) = map(_log, outputs)
    assert cut == pytest.approx(whole, rel=1e-5) and found == pytest.approx(expected, abs=1e-6)
    assert 3 <= len(expected) < 30
    best = max(expected, key=lambda step: expected[step])
    assert len(expected) == best + 2
    weights = [load_file(output / "model.safetensors") for output in outputs]
    assert all(torch.allclose(weights[0][name], weight, atol=1e-6) for name, weight in weights[1].items())


@pytest.mark.slow
def test_a_reranker_is_evaluated_while_it_trains(tmp_path: Path) -> None:
    pairs = list(training_records(16, seed=5))
    rows = [
        PairRecord(p.query, p.positive, p.dataset, (pairs[i - 1].positive, pairs[i - 2].positive), 2.0, (-1.0, 0.5))
        for i, p in enumerate(pairs)
    ]
    data = str(RecordSet.write(tmp_path / "rows", rows, {}).folder)
    options = {
        **OPTIONS,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "mini_batch_size": None,
        "per_device_train_batch_size": 4,
    }
    output = tmp_path / "out"
    train_reranker(RerankerArguments(data=data, eval_data=data, output=str(output), num_negatives=2, **options))
    losses, evaluations = _log(output)
    assert len(losses) == 3 and list(evaluations) == [1, 2, 3]
    model = UniMEReranker(str(output), device="cpu")
    assert RankingEvaluator(RecordSet.load(data))(model)["mrr@10"] == pytest.approx(
        max(evaluations.values()), abs=1e-6
    )


def test_without_an_interval_every_checkpoint_is_evaluated(folders: tuple[str, str], tmp_path: Path) -> None:
    options = InBatchArguments(data=folders[0], eval_data=folders[1], output=str(tmp_path / "out"), save_steps=7)
    assert (options.eval_strategy, options.eval_steps, options.metric_for_best_model) == ("steps", 7, "mrr@10")
