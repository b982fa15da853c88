"""mteb's registries: one entry for each model, facts for mteb's filters, benchmarks that follow the data folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import mteb
import pytest
from sentence_transformers import SentenceTransformer

from benchmarks.synthetic_mmeb import write_synthetic_mmeb
from mteb_tasks.metadata import modalities_of
from mteb_tasks.mmeb.subsets import subset_named


def test_every_model_is_listed_once_and_with_its_size():
    ours = [meta for meta in mteb.get_model_metas() if str(meta.name).startswith("unime/")]
    names = [meta.name for meta in ours]
    assert len(names) == len(set(names)) and "unime/unime-v2-2b" in names and "unime/unime-v2-reranker" not in names
    for meta in ours:
        assert meta.embed_dim and meta.open_weights
        assert bool(meta.n_parameters) == bool(meta.memory_usage_mb) == ("unime-v1" not in str(meta.name))
    small = mteb.get_model_metas(n_parameters_range=(None, 3_000_000_000), open_weights=True)
    assert {"unime/unime-tiny", "unime/unime-v2-2b"} <= {meta.name for meta in small}


def test_the_size_of_the_8b_model_is_the_one_of_mteb_s_own_entry():
    ours, theirs = map(mteb.get_model_meta, ("unime/unime-v2", "TianchengGu/UniME-V2-LLaVA-OneVision-8B"))
    assert (ours.n_parameters, ours.embed_dim) == (theirs.n_parameters, theirs.embed_dim)
    assert ours.memory_usage_mb == pytest.approx(theirs.memory_usage_mb, rel=1e-4)
    assert ours.release_date == theirs.release_date and ours.license == theirs.license


@pytest.mark.parametrize("name", ["unime-v2-2b", "unime/unime-v2-2b", "TianchengGu/UniME-V2-Qwen2VL-2B"])
def test_all_names_of_a_model(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert mteb.get_model_meta(name).name == "unime/unime-v2-2b"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_model_whose_folder_is_named_late_or_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("UNIME_MODEL", raising=False)
    with pytest.raises(ValueError, match="set UNIME_MODEL"):
        mteb.get_model_meta("unime-local")
    monkeypatch.setenv("UNIME_MODEL", "unime-tiny")
    first = mteb.get_model_meta("unime-local")
    assert first.revision == mteb.get_model_meta("unime-tiny").revision
    SentenceTransformer("unime-tiny", device="cpu").save_pretrained(str(tmp_path / "other"))
    monkeypatch.setenv("UNIME_MODEL", str(tmp_path / "other"))
    for name in ("unime-local", "unime/unime-local"):
        assert mteb.get_model_meta(name).revision not in (None, first.revision)
    assert mteb.get_model("unime-local", device="cpu").mteb_model_meta.revision != first.revision
    with pytest.raises(ValueError, match="set UNIME_RERANKER"):
        mteb.get_model_meta("unime-local+reranker")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "takes_video"), [("unime-v2-2b", True), ("llava-1.6", False)])
def test_local_models_say_whether_they_take_videos(
    converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, takes_video: bool
):
    monkeypatch.setenv("UNIME_MODEL", str(converted(name)))
    found = mteb.get_model_meta("unime-local")
    model = SentenceTransformer(str(converted(name)), device="cpu")
    assert ("video" in found.modalities) == takes_video and found.modalities == modalities_of(model)
    assert found.embed_dim == model.get_embedding_dimension()


@pytest.mark.slow
def test_benchmark_that_was_asked_for_before_its_data_were_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: SentenceTransformer
):
    monkeypatch.delenv("MMEB_EVAL_DIR", raising=False)
    benchmark = mteb.get_benchmark("MMEB(eng, v1)")
    task = next(task for task in benchmark.tasks if task.metadata.name == "MMEB-OVEN")
    assert task.hf_subsets == ["default"]
    for folder, queries in (("first", 3), ("second", 4)):
        write_synthetic_mmeb(tmp_path / folder, subsets=[subset_named("OVEN")], queries=queries, candidates=3)
        monkeypatch.setenv("MMEB_EVAL_DIR", str(tmp_path / folder))
        monkeypatch.setattr(task, "run", ())  # the other subsets are not there
        found = mteb.evaluate(tiny_model, [task], cache=None, co2_tracker=False, show_progress_bar=False)
        assert 0 <= found.task_results[0].get_score() <= 1 and task.hf_subsets[0].startswith("local-")


@pytest.fixture(scope="module")
def tiny_model() -> SentenceTransformer:
    return SentenceTransformer("unime-tiny", device="cpu")
