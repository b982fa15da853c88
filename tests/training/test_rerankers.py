"""The reranker's plan: its tokens are those that training computes, and making it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unime_st import UniMEReranker
from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.losses import RerankerLoss
from unime_st.stages import RerankerArguments, train_reranker
from unime_st.training.planning import TrainingEstimate
from unime_st.training.rerankers import RerankerStage
from unime_st.training.rows import rows_with_negatives

SMALL: dict[str, Any] = {
    "template": "tiny",
    "num_negatives": 4,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "lora_dropout": 0.0,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> RecordSet:
    """Queries and candidates with and without images, whose files can be spoilt."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "images").mkdir()
    found, pairs = list(training_records(24, seed=3)), []
    for number, record in enumerate(found):
        image = record.query.image or record.positive.image
        path = folder / "images" / f"{number}.png"
        path.write_bytes(image.read())
        text = record.query.text or record.positive.text
        negatives = [Item(f"{other.query.text or other.positive.text}, {n}") for n, other in enumerate(found[:4])]
        pairs.append(
            PairRecord(Item(text, path), Item(text), "", [*negatives[:3], negatives[number % 4]], 2.0, [0.0] * 4)
        )
    return RecordSet.write(folder / "records", pairs, {}, image_root=folder / "images")


def _rows(records: RecordSet) -> Any:
    return rows_with_negatives(records, 4)


class _Planned(RerankerStage):
    """A stage that ends with its plan."""

    def fit(self, model: Any, rows: Any, loss: Any, collator: Any, plan: TrainingEstimate, **options: Any) -> None:
        self.plan = plan


def _plan(
    options: RerankerArguments, records: RecordSet, model: UniMEReranker, loss: RerankerLoss
) -> TrainingEstimate:
    stage = _Planned("reranker", options)
    stage.records = records
    stage.train(model, _rows(records), loss)
    return stage.plan


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_the_planned_tokens_are_those_of_the_prompts(
    rows: RecordSet, tmp_path: Path, weights: tuple[float, float]
) -> None:
    options = RerankerArguments(**SMALL, output=str(tmp_path), dry_run=True, min_list_length=None)
    model = UniMEReranker("unime-tiny", template="tiny", device="cpu")
    loss = RerankerLoss(model, *weights)
    plan = _plan(options, rows, model, loss)
    loss.tokens = 0
    table = _rows(rows)
    names = [name for name in table.column_names if name != "label"]
    columns = [[rows.item(item_id) for item_id in table[name]] for name in names]
    with torch.no_grad():
        loss(columns, torch.tensor(table["label"]))
    assert plan.tokens / plan.rows_per_step / plan.steps * len(table) == pytest.approx(
        loss.tokens,
        rel=0.05,  # two tokens around an image are not counted
    )


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_a_plan_changes_nothing(rows: RecordSet, tmp_path: Path, mini_batch_size: int | None) -> None:
    options = RerankerArguments(**SMALL, output=str(tmp_path), dry_run=True, mini_batch_size=mini_batch_size)
    model = UniMEReranker("unime-tiny", template="tiny", device="cpu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    loss = RerankerLoss(model, min_list_length=2, mini_batch_size=mini_batch_size)
    plan = _plan(options, rows, model, loss)
    assert torch.equal(torch.get_rng_state(), state) and loss.min_list_length == 2
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert plan.rows == 24 and plan.steps == 2 and plan.hours > 0 and plan.peak_gib > 0
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    rows: RecordSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="unime_st"):
        train_reranker(RerankerArguments(**SMALL, data=str(rows.folder), output=str(tmp_path / "out"), dry_run=True))
    assert not (tmp_path / "out").exists()
    for word in (
        "rows           24",
        "2 of 4 rows",
        "FLOPs",
        "on this device (cpu)",
        "GiB, measured with the largest mini-batch",
    ):
        assert word in caplog.text


def test_rows_with_an_unreadable_image_are_set_aside_and_the_curves_are_whole(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    pairs = []
    for number, record in enumerate(training_records(12, seed=5)):
        path = tmp_path / "images" / f"{number}.png"
        path.write_bytes((record.query.image or record.positive.image).read())
        pairs.append(
            PairRecord(Item(f"image {number}"), Item(image=path), "", [Item("a"), Item("b")], 1.0, [0.0, 0.0])
        )
    records = RecordSet.write(tmp_path / "records", pairs, {}, image_root=tmp_path / "images")
    (tmp_path / "images" / "7.png").write_bytes(b"no image")
    options = {
        **SMALL,
        "num_negatives": 2,
        "logging_steps": 1,
        "data": str(records.folder),
        "output": str(tmp_path / "out"),
    }
    folder = train_reranker(RerankerArguments(**options))
    plan = json.loads((folder / "manifest.json").read_text())["plan"]
    assert (plan["rows"], plan["set_aside"]) == (11, 1)
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in rejected] == [7] and "7.png" in rejected[0]["reason"]
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(entry["loss"]) and entry["tokens_per_second"] > 0 and entry["mfu"] > 0 for entry in logged)
