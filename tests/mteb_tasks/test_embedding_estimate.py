"""Estimates of what embedding a task will cost."""

from __future__ import annotations

import logging
import re

import mteb
import pytest
from PIL import Image

from benchmarks.synthetic_mmeb import write_synthetic_mmeb
from mteb_tasks import evaluate, item_embedder, wrap
from mteb_tasks.catalog import registered_tasks
from mteb_tasks.columns import to_dataset
from mteb_tasks.embedding_estimate import EmbeddingEstimate, estimate_embedding
from mteb_tasks.mmeb.subsets import SUBSETS
from unime_st.data.items import Item
from unime_st.encoding import TokenCounter, encode_stream


@pytest.fixture(scope="module")
def every_subset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("every-subset")
    return write_synthetic_mmeb(folder, subsets=SUBSETS, queries=2, candidates=2, documents=3)


def test_items_distinct_ones_and_tokens_are_counted(tiny, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (56, 56), "red").save(path)
    queries = {f"q{i}": Item(text=f"number {i % 5}", image=path) for i in range(10)}
    corpus = {f"d{i}": Item(text=f"number {i % 4}") for i in range(8)}
    tables = [to_dataset(queries, ["text", "image"]), to_dataset(corpus, ["text"])]
    embedded = []
    found = estimate_embedding(tiny, tables, lambda item: item.image is None, embedded.extend)
    assert (found.items, found.distinct, found.new) == (18, 9, 5)
    assert embedded == list(queries.values())[:5]
    assert found.tokens == TokenCounter(tiny)(embedded).sum() and found.seconds >= 0
    assert estimate_embedding(tiny, tables, lambda item: True, embedded.extend).new == 0


def test_an_estimate_in_words():
    assert str(EmbeddingEstimate(1, 1, 1, 1, 150.0)).endswith("1 tokens, 2.5 minutes")
    assert str(EmbeddingEstimate(2, 1, 0, 0, 0.0)).endswith("all embedded before")


FULL = {"ScenesVQA", "ScenesCompositional", "Flickr30k1kI2TRetrieval", "SugarCrepeByCategory", "MMEB-CIRR"}
"""One task of each kind, evaluated by mteb; of the others the search is run alone."""


WITH_DATA = [
    task
    for task in registered_tasks()
    if task.metadata.name != "MMEB" and not task.metadata.name.startswith("MMEB-V2")  # tests of its own
]


@pytest.mark.parametrize("task", WITH_DATA, ids=lambda task: task.metadata.name)
def test_every_task_logs_its_estimate_first(tiny, official, every_subset, monkeypatch, caplog, task):
    monkeypatch.setenv("MMEB_EVAL_DIR", str(every_subset))
    monkeypatch.setenv("UNIME_EVAL_DIR", str(official / "eval"))
    forwards = []

    def watched(model, items, results, **how):
        items = list(items)
        forwards.append((len(items), len(caplog.records)))
        return encode_stream(model, items, results, **how)

    monkeypatch.setattr(item_embedder, "encode_stream", watched)
    name = task.metadata.name
    made = task(size=3) if name.startswith("Scenes") else task()
    with caplog.at_level(logging.INFO, "mteb_tasks.item_embedder"):
        evaluate(wrap(tiny), [made]) if name in FULL else search(wrap(tiny), made)
        (line,) = [record.getMessage() for record in caplog.records if record.name == "mteb_tasks.item_embedder"]
    told = re.fullmatch(
        rf"{name}: ([\d,]+) items, ([\d,]+) distinct, about ([\d,]+) to embed: [\d,]+ tokens, [\d.]+ \w+", line
    )
    assert told, line
    items, distinct, new = (int(number.replace(",", "")) for number in told.groups())
    assert items >= distinct >= new >= sum(count for count, _ in forwards)  # nothing twice, the sample included


def search(model, task):
    """Search as mteb does in an evaluation, without its metrics."""
    task.load_data()
    (splits,) = task.dataset.values()
    data = splits["test"]
    model.index(data["corpus"])
    model.search(
        data["queries"], task_metadata=task.metadata, hf_split="test", hf_subset="default", top_k=10,
        encode_kwargs={"batch_size": 64}, top_ranked=data["top_ranked"],
    )  # fmt: skip


def test_every_item_is_embedded_once_and_a_second_run_says_so(tiny, caplog):
    wrapped = wrap(tiny)
    with caplog.at_level(logging.INFO, "mteb_tasks.item_embedder"):
        for _ in range(2):
            evaluate(wrapped, [mteb.get_task("ScenesCompositional").__class__(size=3)])
    first, second = (record.getMessage() for record in caplog.records if record.name == "mteb_tasks.item_embedder")
    assert "to embed" in first and second.endswith("all embedded before")
