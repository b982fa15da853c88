"""Reproduction matrix: the page is what published.json generates, and its numbers are those of the papers."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmarks.reproduction import page
from mteb_tasks.mmeb.location import HUB_REVISION
from mteb_tasks.mmeb.subsets import SUBSETS
from mteb_tasks.published import PUBLISHED
from unime_st.registry import known_aliases

ROOT = Path(__file__).resolve().parents[1]


def test_page_is_generated() -> None:
    """`python -m benchmarks.reproduction > docs/reproduce.md` mends a difference."""
    assert (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8") == "\n".join(page()).rstrip() + "\n"


def test_the_revision_is_the_one_that_is_evaluated() -> None:
    assert PUBLISHED["data"]["mmeb_eval"]["revision"] == HUB_REVISION


def test_every_score_belongs_to_a_model() -> None:
    for key in ("mmeb", "mmeb_tasks", "captions", "composition", "reranking", "measured"):
        assert {alias.removesuffix("+reranker") for alias in PUBLISHED[key]} <= set(PUBLISHED["models"]), key


def test_commands_name_models_that_exist() -> None:
    ours = [model["mteb"] for model in PUBLISHED["models"].values() if "/" not in model.get("mteb", "/")]
    assert set(ours) - {"unime-local"} <= set(known_aliases())


@pytest.mark.parametrize("alias", list(PUBLISHED["mmeb_tasks"]))
def test_subset_scores_have_the_published_means(alias: str) -> None:
    scores, means = PUBLISHED["mmeb_tasks"][alias], PUBLISHED["mmeb"][alias]
    for meta in ("classification", "vqa", "retrieval", "grounding"):
        own = [scores[subset.name] for subset in SUBSETS if subset.meta == meta]
        assert statistics.mean(own) == pytest.approx(means[meta], abs=0.06)


@pytest.mark.parametrize("alias", [alias for alias, means in PUBLISHED["mmeb"].items() if "vqa" in means])
def test_means_are_of_the_36_subsets_or_say_so(alias: str) -> None:
    """UniME's own table has the mean of the four meta-tasks; that of UniME-V2 the mean of the subsets."""
    means = PUBLISHED["mmeb"][alias]
    sizes = {"classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4}
    if "mean" in means:
        assert sum(means[key] * size for key, size in sizes.items()) / 36 == pytest.approx(means["mean"], abs=0.1)
        assert (20 * means["ind"] + 16 * means["ood"]) / 36 == pytest.approx(means["mean"], abs=0.1)
    else:
        assert statistics.mean(means[key] for key in sizes) == pytest.approx(means["mean_of_meta_tasks"], abs=0.08)
