"""A run on pairs of one's own: import, arms, seeds, the judge's pair order, and what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from tests import programs
from train_scripts.demo.own_data_run import MODELS, judge_table, own_table
from unime_st.data.logits import CERTAIN_LOGIT
from unime_st.data.records import RecordSet
from unime_st.judging.score_store import Scores

pytestmark = pytest.mark.slow


def _own_data(folder: Path, count: int) -> Path:
    """Transparent, palette and odd-sized images with names, and two invalid rows."""
    lines = []
    for number in range(count):
        color = ("red", "green", "blue")[number % 3]
        mode = ("RGBA", "P", "RGB", "L")[number % 4]
        image = Image.new("RGBA", (40 + 9 * number, 60), (0, 0, 0, 0))
        ImageDraw.Draw(image).ellipse((5, 5, 35, 50), fill=color)
        image.convert(mode).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "name": f"{color} ellipse number {number}"})
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    lines += [{"image": "broken.png", "name": "broken"}, {"image": "0.png", "name": None}]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _command(folder: Path, config: str, train: Path, test: Path) -> list[str]:
    """Command of a run with a configuration; its output is "run" in the folder."""
    file = folder / "own.yaml"
    file.write_text(config)
    options = ["--data", str(train), "--test", str(test), "--output", str(folder / "run")]
    return ["-m", "train_scripts.demo.own_data", str(file), *options]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return programs.run(command)


def test_own_images_train_and_bad_ones_are_set_aside(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    train, test = _own_data(tmp_path / "train", 24), _own_data(tmp_path / "test", 12)
    config = (
        "pairs:\n"
        "  - {dataset: name-to-image, query: {text: name}, positive: {image: image}}\n"
        "  - {dataset: image-to-name, query: {image: image}, positive: {text: name}}\n"
        "warm_steps: 3\nsteps: 1\nbatch_size: 8\njudge_steps: 1\nnum_candidates: 6\nnum_negatives: 3\n"
        "seeds: 2\ncandidate_first: [name-to-image]\n"
    )
    command = _command(tmp_path, config, train, test)
    done = _run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert list(results) == list(MODELS)
    assert all(
        set(scores) == {"name-to-image", "image-to-name", "mean"} for seeds in results.values() for scores in seeds
    )
    assert all(len(seeds) == 2 for seeds in results.values())
    assert results["base"][0] == results["base"][1]
    weights = [(tmp_path / "run" / f"seed-{seed}" / "warm" / "model.safetensors").read_bytes() for seed in (42, 43)]
    assert weights[0] != weights[1]
    judged = json.loads((tmp_path / "run" / "results.json").read_text())["judge"]
    assert {(row["dataset"], row["pair_order"], row["seed"]) for row in judged} == {
        (name, order, seed)
        for name, order in (("name-to-image", "candidate_first"), ("image-to-name", "query_first"))
        for seed in (42, 43)
    }
    folder = tmp_path / "run" / "seed-42"
    _check_unjudged(folder, RecordSet.load(tmp_path / "run" / "records"))
    _check_judge_quality(folder, judged)
    _check_rows(folder)
    averaged, *parts = (load_file(folder / name / "model.safetensors") for name in ("soup", "trusted", "in_batch"))
    for name, weights in averaged.items():
        torch.testing.assert_close(weights, (parts[0][name] + parts[1][name]) / 2)
    _check_second_start(command, tmp_path / "run")
    rejected = [
        json.loads(line) for line in (tmp_path / "run" / "records" / "rejected.jsonl").read_text().splitlines()
    ]
    assert len(rejected) == 4 and all(entry["reason"] for entry in rejected)


def _check_rows(folder: Path) -> None:
    """The judge is believed or the pairs are trusted: the positives' scores are the judge's, or 1."""
    scores = {}
    for order in ("query_first", "candidate_first"):
        for row in Scores(folder / f"scores-records-{order}").row_shards.rows():
            scores[row["query"], row["positive"]] = row["positive_logit"]
    for name in ("believed", "trusted"):
        rows = list(RecordSet.load(folder / f"rows-{name}").row_shards.rows())
        assert len(rows) == len(scores)
        for row in rows:
            expected = CERTAIN_LOGIT if name == "trusted" else scores[row["query"], row["positive"]]
            assert row["positive_logit"] == pytest.approx(expected, abs=1e-5)


def _check_second_start(command: list[str], output: Path) -> None:
    """Another start does nothing again, and other kinds asked candidate first need another output."""
    kept = [*output.rglob("model.safetensors"), *output.rglob("eval/*/results.json")]
    stamps = {path: path.stat().st_mtime_ns for path in kept if path.parent.name != "soup"}
    before = (output / "results.json").read_text()
    done = _run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps} and len(stamps) == 2 * 4 + 13
    assert (output / "results.json").read_text() == before
    done = _run([*command, "--candidate_first", "image-to-name"])
    assert done.returncode == 1 and "records-" in done.stderr.splitlines()[-1]


def test_pairs_without_a_kind_all_asked_candidate_first(tmp_path: Path) -> None:
    """One kind without a name, an unadapted judge, and no pairs that are asked query first."""
    data = _own_data(tmp_path, 24)
    config = (
        "pairs: [{query: {text: name}, positive: {image: image}}]\ncandidate_first: [default]\njudge_steps: 0\n"
        "warm_steps: 1\nsteps: 1\nbatch_size: 8\nnum_candidates: 6\nnum_negatives: 3\n"
    )
    done = _run(_command(tmp_path, config, data, data))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(set(scores) == {"default", "mean"} for seeds in found["results"].values() for scores in seeds)
    (judged,) = found["judge"]
    assert (judged["dataset"], judged["pair_order"]) == ("default", "candidate_first")
    assert not (tmp_path / "run" / "seed-42" / "judge").exists()


def _check_unjudged(folder: Path, records: RecordSet) -> None:
    """The judge learns the pairs as it will be asked: those asked candidate first are turned, with false texts."""
    asked = {record.positive.id: record.query.id for record in records if record.dataset == "name-to-image"}
    rows = list(RecordSet.load(folder / "unjudged"))
    assert len(rows) == len(records)
    for row in rows:
        modality = "text" if row.query.image else "image"
        assert {item.modality for item in (row.positive, *row.negatives)} == {modality}
        if row.dataset == "name-to-image":
            negatives = [item.id for item in row.negatives]
            assert asked[row.query.id] == row.positive.id and row.positive.id not in negatives
            assert 1 <= len(set(negatives)) == len(negatives) <= 4 and set(negatives) <= set(asked.values())


def _check_judge_quality(folder: Path, judged: list[dict[str, Any]]) -> None:
    """The AUC by kind of pair is scikit-learn's, on all held-out pairs."""
    for entry in judged:
        if entry["seed"] != 42:
            continue
        rows = list(Scores(folder / f"scores-test-{entry['pair_order']}").row_shards.rows())
        own = [row for row in rows if row["dataset"] == entry["dataset"]]
        odds = [row["positive_logit"] for row in own] + [odd for row in own for odd in row["logits"]]
        labels = [1] * len(own) + [0] * (len(odds) - len(own))
        assert len(own) == 12 and entry["auc"] == pytest.approx(roc_auc_score(labels, odds), abs=1e-6)


def test_kinds_that_the_data_lack_are_refused(tmp_path: Path) -> None:
    data = _own_data(tmp_path, 4)
    config = "pairs:\n  - {dataset: names, query: {text: name}, positive: {image: image}}\ncandidate_first: [name]\n"
    done = _run(_command(tmp_path, config, data, data))
    assert done.returncode == 1
    assert "candidate_first" in done.stderr and "no pairs of name; there are names." in done.stderr


def test_tables_are_means_and_paired_differences() -> None:
    def scores(*values: float) -> list[dict[str, float]]:
        return [{"a": value, "mean": value} for value in values]

    results = {"base": scores(0.1, 0.1), "in_batch": scores(0.2, 0.4), "trusted": scores(0.3, 0.6)}
    head, *rows = own_table(results)
    assert head == ["hit@1 in percent", "a", "mean", "− control"]
    assert [row[1:] for row in rows] == [
        ["10.0", "10.0", "−20.0 ± 10.0"],
        ["30.0", "30.0", "–"],
        ["45.0", "45.0", "+15.0 ± 5.0"],
    ]
    assert judge_table([{"dataset": "a", "auc": 0.5}, {"dataset": "b", "auc": None}, {"dataset": "a", "auc": 0.7}])[
        1:
    ] == [["a", "0.60"], ["b", "–"]]


@pytest.mark.parametrize("missing", ["--data", "--test"])
def test_own_data_names_what_is_missing(tmp_path: Path, missing: str) -> None:
    given = "--test" if missing == "--data" else "--data"
    done = _run(["-m", "train_scripts.demo.own_data", given, str(tmp_path)])
    assert done.returncode == 1 and "--data TRAIN --test TEST" in done.stderr
    assert len(done.stderr.splitlines()) == 1
