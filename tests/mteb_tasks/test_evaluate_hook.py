"""Plain SentenceTransformers handed to ``mteb.evaluate`` together with tasks of this package."""

from __future__ import annotations

import mteb
import pytest
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.synthetic_mmeb import write_synthetic_mmeb
from mteb_tasks import RecordsRetrieval, register, wrap
from mteb_tasks.mmeb.subsets import subset_named
from mteb_tasks.scenes import ScenesCompositional, ScenesShortI2TRetrieval, ScenesShortT2IRetrieval, ScenesVQA
from tests.mteb_tasks.foreign import ForeignRetrieval, ForeignSTS, text_model
from unime_st import UniMEReranker
from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordSet

STOCK = mteb.evaluate
NAMES = ["ScenesVQA", "ScenesShortT2IRetrieval", "ScenesShortI2TRetrieval", "ScenesCompositional"]


@pytest.fixture(autouse=True)
def registered():
    register()


@pytest.fixture(scope="module")
def embedded():
    return SentenceTransformer("unime-tiny", device="cpu")


def scores(model, tasks, cache=None):
    result = mteb.evaluate(model, tasks, cache=cache, co2_tracker=False, show_progress_bar=False)
    return [(found.task_name, float(found.get_score())) for found in result.task_results]


@pytest.mark.slow
def test_plain_model_scores_as_the_wrapped_one(embedded):
    tasks = [
        ScenesVQA(),
        ScenesShortT2IRetrieval(size=40),
        ScenesShortI2TRetrieval(size=40),
        ScenesCompositional(size=40),
    ]
    found = scores(embedded, tasks)
    assert found[0] == ("ScenesVQA", 0.4)
    assert found == scores(wrap(embedded), tasks)


def test_plain_model_on_mmeb_as_tasks_aggregate_and_benchmark(tiny, tmp_path, monkeypatch):
    subsets = [subset_named(name) for name in ("OK-VQA", "VisDial", "MSCOCO_i2t")]
    monkeypatch.setenv("MMEB_EVAL_DIR", str(write_synthetic_mmeb(tmp_path, subsets=subsets, queries=5, candidates=4)))
    monkeypatch.setenv("MMEB_ALLOW_MISSING", "1")
    tasks = mteb.get_tasks([subset.task_name for subset in subsets])
    expected = scores(wrap(tiny), tasks)
    assert scores(tiny, tasks) == expected
    ((name, mean),) = scores(tiny, mteb.get_task("MMEB"))
    assert name == "MMEB" and mean == pytest.approx(sum(score for _, score in expected) / 3)


def test_in_a_mixed_list_tasks_of_others_are_evaluated_by_mteb_s_rules(embedded):
    tasks = [ForeignRetrieval(), mteb.get_task("ScenesVQA"), ForeignSTS()]
    stock = STOCK.__wrapped__ if hasattr(STOCK, "__wrapped__") else STOCK
    others = stock(embedded, [tasks[0], tasks[2]], cache=None, co2_tracker=False, show_progress_bar=False)
    alone = [(found.task_name, float(found.get_score())) for found in others.task_results]
    mixed = scores(embedded, tasks)
    assert mixed == [alone[0], ("ScenesVQA", 0.4), alone[1]]
    assert scores(embedded, [tasks[0], tasks[2]]) == alone


def test_mteb_s_cache_tells_two_plain_models_apart(embedded, tmp_path):
    broken = SentenceTransformer("unime-tiny", device="cpu")
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    cache, task = mteb.ResultCache(tmp_path), mteb.get_task("ScenesVQA")
    for model in (lambda each: each, wrap):
        assert scores(model(embedded), task, cache)[0][1] == 0.4
        assert scores(model(broken), task, cache)[0][1] < 0.2


def test_mteb_s_own_wrapper_keeps_the_images(embedded):
    wrapper = mteb.SentenceTransformerEncoderWrapper(embedded)
    assert scores(wrapper, mteb.get_task("ScenesVQA")) == [("ScenesVQA", 0.4)]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_model_is_refused_where_there_are_images(name, monkeypatch):
    model = text_model()
    monkeypatch.setattr(SentenceTransformer, "encode", lambda *args, **kwargs: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=f"{name} has images, and this SentenceTransformer takes only text"):
        scores(model, [ForeignSTS(), mteb.get_task(name)])


def test_a_plain_reranker_is_refused_where_mteb_would_hide_the_images():
    with pytest.raises(ValueError, match="mteb hands UniMEReranker the texts only: evaluate rerankers in two"):
        scores(UniMEReranker("unime-tiny", template="tiny", device="cpu"), mteb.get_task("ScenesVQA"))


def test_records_of_one_s_own(embedded, tmp_path):
    pairs = [PairRecord(Item(text=text), Item(text=f"{text} circle"), "color") for text in ("red", "blue")]
    RecordSet.write(tmp_path / "records", pairs, {})
    task = RecordsRetrieval(tmp_path / "records")
    assert scores(embedded, task) == scores(wrap(embedded), task)
