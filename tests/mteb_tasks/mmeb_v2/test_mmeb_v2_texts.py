"""Texts, file names, metrics and means of MMEB-V2 against what the released code computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mteb_tasks.mmeb_v2.comparison import compared_rows, comparison_table, published_models
from mteb_tasks.mmeb_v2.leaderboard import COLUMNS, LEADERBOARD, leaderboard_means
from mteb_tasks.mmeb_v2.ndcg import ndcg, official_ndcg
from mteb_tasks.mmeb_v2.profiles import PAGE, PAGE_QUERY, joined
from mteb_tasks.mmeb_v2.visdoc_sets import VISDOC_SETS
from mteb_tasks.scores import score_rows


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def test_texts_and_files_of_all_sets(golden_v2: Path) -> None:
    texts = _read(golden_v2 / "texts" / "texts.json")
    for row in VISDOC_SETS:
        official = texts[row.key.removesuffix("-fixed")]
        assert official["hub"] == [row.hub, None, row.split]
        assert official["image_root_or_frame_root"] == f"visdoc-tasks/{row.folder}"
        for found in official["rows"]:
            assert joined(PAGE_QUERY, found["row"]["query"]) == found["query_text"]
            for page in found["candidates"]:
                assert joined(PAGE, image=True).replace("<|image_1|>", "<|image_pad|>") == page["text"]
                assert page["media"] == [f"visdoc-tasks/{row.folder}/{row.page_file(str(page['name']))}"]


def test_ndcg(golden_v2: Path) -> None:
    for case in _read(golden_v2 / "metrics" / "rankings.json")["cases"]:
        grades = dict(zip(case["label"], case["rel_scores"] or [1] * len(case["label"])))
        for k in (1, 5, 10):
            assert ndcg(case["prediction"], grades, k) == pytest.approx(case[f"correct_ndcg@{k}"], abs=1e-12)
            if not isinstance(case["label"][0], str):
                official = official_ndcg(case["prediction"], grades, k)
                assert official == pytest.approx(case[f"official_ndcg_linear@{k}"], abs=1e-12)


def test_leaderboard_has_the_published_shape() -> None:
    sizes = {column: sum(task.column == column for task in LEADERBOARD) for row in COLUMNS.values() for column in row}
    assert list(sizes.values()) == [10, 10, 12, 4, 5, 5, 5, 3, 10, 4, 6, 4]
    assert len({task.key for task in LEADERBOARD}) == 78
    assert sum(row.queries for row in VISDOC_SETS) == 12590
    assert [row.key for row in VISDOC_SETS if row.graded] == [
        "ViDoRe_esg_reports_human_labeled_v2",
        "ViDoSeek-doc",
        "MMLongBench-doc",
    ]


def test_a_mean_with_a_missing_task_is_left_out() -> None:
    scores = {task.key: index / 100 for index, task in enumerate(LEADERBOARD)}
    assert list(leaderboard_means(scores)) == [
        *(name for row in COLUMNS.values() for name in row),
        *COLUMNS,
        "Overall",
    ]
    assert leaderboard_means(scores)["Overall"] == pytest.approx(0.385)
    del scores["K700"]
    assert {"Overall", "Video", "Video CLS"}.isdisjoint(leaderboard_means(scores))


def test_published_scores_follow_from_the_published_tasks() -> None:
    """Means over the published tasks are the published means."""
    models = {model.name: model.scores for model in published_models()}
    for name, overall, *modalities in (
        ("VLM2Vec-V2.0-2B", 59.1, 64.9, 34.7, 68.6),
        ("Qwen3-VL-Embedding-8B", 77.8, 80.1, 67.1, 82.4),
    ):
        assert [round(models[name][group], 1) for group in ("Overall", *COLUMNS)] == [overall, *modalities]
        assert set(models[name]) == {task.key for task in LEADERBOARD} | set(leaderboard_means(models[name]))


def test_scores_stand_beside_published_ones() -> None:
    """No overall score while tasks are missing; graded sets are compared by the official nDCG."""
    scores = {task.task_name: {"vlm2vec": {"main_score": 0.5, "profile": "vlm2vec"}} for task in LEADERBOARD}
    scores["MMEB-V2-ViDoSeek-doc"]["vlm2vec"]["ndcg_at_5_official"] = 0.4
    assert {row.name: row.score for row in compared_rows(scores, "vlm2vec")}["MMEB-V2 Overall"] == 50.0
    del scores["MMEB-V2-K700"]
    rows = {row.name: row for row in compared_rows(scores, "vlm2vec")}
    assert "MMEB-V2 Overall" not in rows and "MMEB-V2 Video CLS" not in rows
    assert (
        rows["MMEB-V2-ViDoSeek-doc"].official == 40.0 and rows["MMEB-V2-ViDoSeek-doc"].published["Qwen3-VL 8B"] == 86.1
    )
    assert rows["MMEB-V2 VisDoc OOD"].official == 47.5 and rows["MMEB-V2 VisDoc OOD"].published["Qwen3-VL 2B"] == 69.4
    assert "No overall score: 1 of 78 tasks are missing" in comparison_table(scores)
    scores["MMEB-V2-GQA"]["qwen3-vl"] = {"main_score": 0.9, "profile": "qwen3-vl"}
    assert [row.score for row in compared_rows(scores, "qwen3-vl")] == [90.0]  # profiles are never mixed
    assert comparison_table(scores).count("(profile ") == 2
    named = {row.name: row.score for row in score_rows(scores, "unime-v2")}
    assert (named["MMEB-V2-GQA (vlm2vec)"], named["MMEB-V2-GQA (qwen3-vl)"]) == (50.0, 90.0)
