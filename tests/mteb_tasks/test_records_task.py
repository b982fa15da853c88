"""Retrieval task on a record folder."""

from __future__ import annotations

import mteb
import pytest
from PIL import Image

from mteb_tasks import RecordsRetrieval, evaluate, wrap
from mteb_tasks.local_data import without_digest
from mteb_tasks.retrieval_task import retrieval_split
from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import RetrievalData


def _records():
    red, blue = (Item(image=Image.new("RGB", (8, 8), color)) for color in ("red", "blue"))
    return [
        PairRecord(Item(text="red?"), red, "names"),
        PairRecord(Item(text="blue?"), blue, "names"),
        PairRecord(Item(text="blue?"), Item(text="same", image=Image.new("RGB", (8, 8), "navy")), "names"),
        PairRecord(red, Item(text="red"), "captions"),
        PairRecord(blue, Item(text="blue"), "captions"),
    ]


def test_a_record_folder_becomes_a_task_with_one_subset_per_dataset(tiny, tmp_path):
    RecordSet.write(tmp_path / "mine", _records(), {})
    task = RecordsRetrieval(tmp_path / "mine")
    scores = evaluate(tiny, [task], tmp_path / "out")
    assert task.metadata.name == "Records-mine"
    assert {without_digest(subset) for subset in scores["Records-mine"]} == {"names", "captions"}
    names = next(tables for subset, tables in task.dataset.items() if without_digest(subset) == "names")["test"]
    assert len(names["queries"]) == 2 and len(names["corpus"]) == 3
    blue = next(query for query in names["queries"]["id"] if len(names["relevant_docs"][query]) == 2)
    assert names["relevant_docs"][blue].keys() < set(names["corpus"]["id"])


def test_other_records_are_evaluated_anew_though_there_is_a_result(tiny, tmp_path):
    runs = {}
    for name, records in (("a", _records()), ("b", _records()[:-1]), ("c", _records())):
        RecordSet.write(tmp_path / name / "test", records, {})
        task = RecordsRetrieval(tmp_path / name / "test")
        runs[name] = task.metadata.revision, set(task.hf_subsets)
        found = mteb.evaluate(wrap(tiny), task, cache=mteb.ResultCache(tmp_path / "results"))[0]
        assert {row["hf_subset"] for row in found.scores["test"]} >= set(task.hf_subsets)
    assert runs["a"] == runs["c"] and not runs["a"][1] & runs["b"][1]


def test_an_empty_folder_is_refused(tmp_path):
    RecordSet.write(tmp_path / "none", [], {})
    with pytest.raises(ValueError, match="holds no records"):
        RecordsRetrieval(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relevant": {}}, "'q' has no relevant document"),
        ({"candidates": {"q": []}}, "'q' has an empty candidate list"),
        ({"candidates": {"q": ["d", "gone"]}}, "the first is 'gone'"),
    ],
)
def test_broken_retrieval_data_are_named(change, message):
    good = {"queries": {"q": Item(text="a")}, "corpus": {"d": Item(text="b")}, "relevant": {"q": {"d"}}}
    with pytest.raises(ValueError, match=message):
        retrieval_split(RetrievalData(**{"candidates": None, **good, **change}), "t2t")
