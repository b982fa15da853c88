"""What mteb's own tests ask of a task: metadata, citations, statistics and their plausibility.

Written after ``tests/test_tasks/test_metadata.py``, ``test_task_quality.py`` and
``tests/test_validate_metadata/test_citation_formatting.py`` of mteb.
"""

from __future__ import annotations

import re

import pytest

from benchmarks.synthetic_mmeb import write_synthetic_mmeb
from mteb_tasks.catalog import registered_tasks
from mteb_tasks.mmeb.benchmark import make_benchmark
from mteb_tasks.mmeb.subsets import subset_named
from mteb_tasks.mmeb.tasks import MMEB_TASKS
from mteb_tasks.sugarcrepe import SugarCrepeByCategory

TASKS = registered_tasks()
EACH = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.metadata.name)
# By construction: answers of one word, questions, crops and captions that fit several drawings, two captions to an image.
# mteb keeps such a list, too, with every VQA set and SugarCrepe on it.
KNOWN = {
    "ScenesVQA": {"short_text", "duplicate_text"},
    "ScenesGrounding": {"duplicate_image", "duplicate_text"},
    "ScenesComposedRetrieval": {"duplicate_text"},
    "ScenesTwinsT2IRetrieval": {"duplicate_text"},
    "ScenesTwinsI2TRetrieval": {"duplicate_text"},
    "ScenesCompositional": {"impossible_unique_count"},
}


@pytest.fixture(autouse=True)
def _official_data(monkeypatch):
    monkeypatch.delenv("MMEB_EVAL_DIR", raising=False)
    monkeypatch.delenv("UNIME_EVAL_DIR", raising=False)
    monkeypatch.delenv("MMEB_V2_DIR", raising=False)


@EACH
def test_metadata_are_filled_and_valid(task):
    made = task()
    metadata = made.metadata
    metadata._validate_metadata()
    assert metadata.is_filled()
    assert not metadata.dataset.get("trust_remote_code", False)
    assert isinstance(metadata.simplified_task_type, str)
    assert metadata.description.endswith(".") and metadata.main_score in (
        "hit_rate_at_1",
        "text_acc",
        "ndcg_at_5",
        "ndcg_at_10",
        "overall",
    )
    assert metadata.intext_citation().startswith("\\cite{")
    if made.is_aggregate:
        assert set(metadata.hf_subsets_to_langscripts) == {"vlm2vec" if metadata.name == "MMEB-V2" else "default"}
    else:
        assert metadata.descriptive_stats is not None and metadata.n_samples is not None
        assert metadata.descriptive_stat_path.parent.parent.name == "mteb_tasks"


@pytest.mark.parametrize(
    "citation", sorted({str(task.metadata.bibtex_citation) for task in TASKS} | {str(make_benchmark().citation)})
)
def test_citations_are_formatted_as_bibtexparser_writes_them(citation):
    lines = citation.strip().splitlines()
    assert re.fullmatch(r"@[a-z]+\{\w+,", lines[0]) and lines[-1] == "}"
    fields = [re.fullmatch(r"  (\w+) = \{(.*)\},", line) for line in lines[1:-1]]
    assert all(fields), citation
    assert [field[1] for field in fields] == sorted(field[1] for field in fields)


def _findings(statistics):
    """Kinds of doubt that mteb's quality test would raise."""
    counts = {"documents": statistics.get("num_documents"), "queries": statistics.get("num_queries")}
    for name, found in statistics.items():
        if not isinstance(found, dict) or name == "hf_subset_descriptive_stats":
            continue
        expected = counts.get(name.split("_")[0], statistics.get("num_samples"))
        for kind in ("text", "image"):
            unique = found.get(f"unique_{kind}s")
            if unique is not None and expected is not None:
                if unique < 0.99 * expected:
                    yield f"duplicate_{kind}"
                elif unique > expected:
                    yield "impossible_unique_count"
        if found.get("min_text_length", 4) <= 3:
            yield "short_text"
        if min(found.get("min_image_width", 9), found.get("min_image_height", 9)) <= 8:
            yield "small_image"
        if 0 in (found.get("min_relevant_docs_per_query"), found.get("min_top_ranked_per_query")):
            yield "zero_documents"
        if (found.get("unique_relevant_docs") or 0) > (statistics.get("num_documents") or 10**9):
            yield "relevant_docs_exceed_corpus"
    for subset in statistics.get("hf_subset_descriptive_stats", {}).values():
        yield from _findings(subset)


@EACH
def test_statistics_raise_no_doubt_that_is_not_known(task):
    if not task().is_aggregate:
        kinds = {kind for split in task.metadata.descriptive_stats.values() for kind in _findings(split)}
        assert kinds == KNOWN.get(task.metadata.name, set())


def test_published_sizes():
    stats = {task.metadata.name: task.metadata.descriptive_stats for task in TASKS if not task().is_aggregate}
    sizes = {name: found["test"]["num_samples"] for name, found in stats.items()}
    assert sizes["SugarCrepeByCategory"] == 7511 and sizes["Flickr30k1kI2TRetrieval"] == 6000
    assert sizes["COCO5kT2IRetrieval"] == 30000 and sizes["MMEB-GQA"] == 7850
    assert all(stats[task.metadata.name]["test"]["num_queries"] == 1000 for task in MMEB_TASKS)


def test_statistics_of_local_data_are_kept_apart(tmp_path, monkeypatch):
    subset = subset_named("CIRR")
    monkeypatch.setenv("MMEB_EVAL_DIR", str(write_synthetic_mmeb(tmp_path, subsets=[subset], queries=3, candidates=3)))
    monkeypatch.setenv("UNIME_HOME", str(tmp_path / "home"))
    task = next(task for task in MMEB_TASKS if task.subset == subset)()
    assert task.metadata.descriptive_stats is None
    found = task.calculate_descriptive_statistics()["test"]
    assert (found["num_queries"], found["relevant_docs_statistics"]["num_relevant_docs"]) == (3, 3)
    assert task.metadata.descriptive_stat_path.is_relative_to(tmp_path / "home")
    assert task.metadata.n_samples == {"test": found["num_samples"]}
    assert SugarCrepeByCategory.metadata.descriptive_stat_path.parent.parent.name == "mteb_tasks"
