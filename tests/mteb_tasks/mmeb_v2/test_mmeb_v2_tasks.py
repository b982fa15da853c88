"""The tasks of MMEB-V2 end to end: embeddings, rankings and scores of the released code, aggregate and benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from mteb_tasks.columns import Setting, iter_items, setting_of
from mteb_tasks.loader import UniMELoader, wrap
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb_v2.aggregate import MMEB_V2_TASKS, MMEBV2, make_v2_benchmark, mmeb_v2_tasks
from mteb_tasks.mmeb_v2.leaderboard import LEADERBOARD
from mteb_tasks.mmeb_v2.profiles import PAGE, PAGE_QUERY
from mteb_tasks.mmeb_v2.visdoc_tasks import VISDOC_TASKS, VisDocTask


def _tasks(golden_v2: Path) -> list[VisDocTask]:
    folders = [folder.name for folder in (golden_v2 / "results").iterdir()]
    return [task() for task in VISDOC_TASKS if task.key in folders]


@pytest.fixture
def golden_data(golden_v2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The golden data set as `$MMEB_V2_DIR`."""
    monkeypatch.setenv("MMEB_V2_DIR", str(golden_v2 / "data"))
    return golden_v2


def test_embeddings_rankings_and_scores(golden_data: Path, golden_model: SentenceTransformer, tmp_path: Path) -> None:
    """Rankings are equal to the last page; no ranking of the golden sets has a tie."""
    loader = wrap(golden_model, "unime/golden")
    for task in _tasks(golden_data):
        official = json.loads((golden_data / "results" / task.key / "result.json").read_text())
        vectors = [np.load(golden_data / "results" / task.key / f"{side}.npy") for side in ("queries", "candidates")]
        result = mteb.evaluate(loader, task, cache=None, prediction_folder=tmp_path / task.key)
        found = result.task_results[0].scores["test"][0]
        (saved,) = (tmp_path / task.key).rglob("*_predictions.json")
        rankings = json.loads(saved.read_text())[task.hf_subsets[0]]["test"]
        assert len(rankings) == len(official["queries"])
        for ranked, query in zip(rankings.values(), official["queries"]):
            assert sorted(ranked, key=ranked.get, reverse=True) == list(map(str, query["ranking_names"]))[:10]
        task.load_data()
        split = task.dataset[task.hf_subsets[0]]["test"]
        for side, expected in zip(("queries", "corpus"), vectors):
            ours = loader.embed(iter_items(split[side]), setting=setting_of(split[side]))
            names = split[side]["id"]
            if side == "corpus":
                expected = expected[[list(map(str, official["candidate_names"])).index(name) for name in names]]
            assert np.abs(ours - expected).max() < 1e-5
        assert found["ndcg_at_5"] == pytest.approx(official["correct_ndcg@5"], abs=1e-12)
        assert found["main_score"] == found["ndcg_at_5"]
        assert found["hit_rate_at_1"] == pytest.approx(
            np.mean([query["hit@1"] for query in official["queries"]]), abs=1e-5
        )
        assert ("ndcg_at_5_official" in found) == task.row.graded
        if task.row.graded:
            assert found["ndcg_at_5_official"] == pytest.approx(official["official_main"], abs=1e-12)
        assert (found["profile"], found["pixels"]) == ("vlm2vec", "3136-1003520")
        assert found["hf_subset"].startswith("vlm2vec-local-")


def test_token_ids(golden_data: Path, golden_model: SentenceTransformer) -> None:
    """Token ids and image grids of every row, which the released code fed to the model."""
    from mteb_tasks.pixel_rule import PixelRule
    from mteb_tasks.ruled_images import RuledItem, prescribed_model

    for task in _tasks(golden_data):
        inputs = json.loads((golden_data / "results" / task.key / "inputs.json").read_text())
        data = task.retrieval_data(task.hf_subsets[0], "test")
        rule = task.profile.pixels or PixelRule(0, 0)
        model = prescribed_model(golden_model, rule, None)
        named = {str(row["name"]): row for row in inputs["candidates"]}
        pairs = [(data.corpus[name], row) for name, row in named.items()]
        pairs += list(zip(data.queries.values(), inputs["queries"]))
        for item, row in pairs:
            features = model.preprocess([RuledItem.of(item, rule).to_input()])
            assert features["input_ids"][0].tolist() == row["token_ids"]
            if row["grid_thw"] is not None:
                assert features["image_grid_thw"].tolist() == row["grid_thw"]


@pytest.fixture
def kept_data(kept_golden: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two sets kept with the tests as `$MMEB_V2_DIR`, other tasks left out."""
    monkeypatch.setenv("MMEB_V2_DIR", str(kept_golden / "v2" / "data"))
    monkeypatch.setenv("MMEB_ALLOW_MISSING", "1")
    return kept_golden / "v2"


def test_the_aggregate(
    kept_data: Path, square_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No overall score while tasks are missing; a second run takes all embeddings from the first one."""
    first = UniMELoader("unime/tiny", "1", model=square_model, cache_folder=tmp_path / "embeddings")
    cache = mteb.ResultCache(tmp_path / "results")
    row = mteb.evaluate(first, MMEBV2(), cache=cache).task_results[-1].scores["test"][0]
    assert row["main_score"] is None and row["overall"] is None and row["num_tasks"] == 2
    assert len(row["left_out"]) == 76 and "K700" in row["left_out"]
    written = cache.load_task_result("MMEB-V2-VisRAG_ChartQA", first.mteb_model_meta)
    assert written is not None and written.scores["test"][0]["num_documents"] == 4
    second = UniMELoader("unime/tiny", "1", model=square_model, cache_folder=tmp_path / "embeddings")
    monkeypatch.setattr(type(square_model), "forward", None)
    assert mteb.evaluate(second, MMEBV2(), cache=None).task_results[-1].scores["test"][0] == row


def test_missing_tasks_are_named(kept_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tasks of a run are checked before the first one is encoded."""
    monkeypatch.delenv("MMEB_ALLOW_MISSING")
    with pytest.raises(
        MMEBDataError, match=r"(?s)76 MMEB-V2 tasks cannot.*MMEB_ALLOW_MISSING=1.*ViDoRe_tabfquad is missing"
    ):
        mmeb_v2_tasks()[-1].load_data()


def test_profiles(kept_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every profile has its own texts, settings and subset name."""
    (task_class,) = (task for task in VISDOC_TASKS if task.key == "VisRAG_ChartQA")
    monkeypatch.setenv("MMEB_V2_PROFILE", "qwen3-vl")
    task = task_class()
    data = task.retrieval_data(task.hf_subsets[0], "test")
    assert task.hf_subsets[0].startswith("qwen3-vl-local-")
    assert data.queries["0-416990"].text == "Which bar is the tallest?"
    assert {item.text for item in data.corpus.values()} == {None}
    tables = task.split_tables(data)
    queries, pages = setting_of(tables["queries"]), setting_of(tables["corpus"])
    assert queries.system == "Find a document image that matches the given query."
    assert (pages.system, pages.pixels) == ("Represent the user's input.", "4096-1843200-0")
    monkeypatch.setenv("MMEB_V2_PROFILE", "model")
    assert setting_of(task_class().split_tables(data)["corpus"]) == Setting()
    monkeypatch.setenv("MMEB_V2_PROFILE", "mine")
    with pytest.raises(ValueError, match="expected one of vlm2vec, qwen3-vl, model"):
        task_class()


def test_the_profile_is_that_of_the_run(
    kept_data: Path, square_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mteb makes the tasks of a benchmark once in a process: another profile, named later, makes them anew."""
    (task,) = (task() for task in VISDOC_TASKS if task.key == "VisRAG_ChartQA")
    aggregate, loader = MMEBV2(), wrap(square_model, "unime/tiny")
    for profile, pixels in (("vlm2vec", "3136-1003520"), ("qwen3-vl", "4096-1843200"), ("model", "model")):
        monkeypatch.setenv("MMEB_V2_PROFILE", profile)
        row = mteb.evaluate(loader, task, cache=None).task_results[0].scores["test"][0]
        assert (row["profile"], row["pixels"]) == (profile, pixels) and row["hf_subset"].startswith(
            f"{profile}-local-"
        )
    (row,) = mteb.evaluate(loader, aggregate, cache=None).task_results[-1].scores["test"]
    assert row["profile"] == "model" and row["hf_subset"].startswith("model-local-")


def test_foreign_models_get_instruction_and_text_apart(kept_data: Path) -> None:
    seen: dict[str, Any] = {}

    class Foreign:
        mteb_model_meta = mteb.get_model_meta("mteb/baseline-random-encoder")

        def encode(self, inputs, *, task_metadata, prompt_type, **kwargs):
            seen[prompt_type.value] = [row for batch in inputs for row in batch.get("text", batch.get("image"))]
            seen["prompt"] = task_metadata.prompt
            return np.eye(len(seen[prompt_type.value]), 8, dtype=np.float32)

        def similarity(self, first, second):
            return np.asarray(first) @ np.asarray(second).T

        similarity_pairwise = similarity

    (task,) = (task() for task in VISDOC_TASKS if task.key == "VisRAG_ChartQA")
    mteb.evaluate(Foreign(), task, cache=None)
    assert seen["query"] == ["Which bar is the tallest?", "What is the sum?", "Which line falls?"]
    assert seen["prompt"] == {"query": PAGE_QUERY, "document": PAGE}
    assert all(isinstance(page, Image.Image) for page in seen["document"])


def test_means_are_those_of_the_leaderboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every subset of the leaderboard's tasks in the right column, by the plain mean."""
    monkeypatch.delenv("MMEB_V2_DIR", raising=False)
    aggregate = MMEBV2()
    parts: list[Any] = list(aggregate.tasks)
    assert [task.key for task in parts] == [row.key for row in LEADERBOARD]
    assert len(MMEB_V2_TASKS) == 78
    benchmark = make_v2_benchmark()
    groups = {group.label: len(group.tasks) for grouping in benchmark.aggregations for group in grouping.groups}
    assert groups == {
        "Image CLS": 10, "Image QA": 10, "Image RET": 12, "Image VG": 4,
        "Video CLS": 5, "Video QA": 5, "Video RET": 5, "Video MRET": 3,
        "ViDoRe-v1": 10, "ViDoRe-v2": 4, "VisRAG": 6, "VisDoc OOD": 4,
        "Image": 36, "Video": 18, "VisDoc": 24,
    }  # fmt: skip
