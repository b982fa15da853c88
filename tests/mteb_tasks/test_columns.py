"""Conversion of items to the columns of mteb, and the ranking of candidates."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mteb_tasks.columns import category_modalities, iter_items, to_dataset
from mteb_tasks.ranking import rank_candidates, tie_order
from unime_st.data.items import Item


def _image(color: str) -> Image.Image:
    return Image.new("RGB", (9, 7), color)


def test_items_survive_the_table_byte_for_byte(tmp_path):
    path = tmp_path / "red.png"
    _image("red").save(path)
    items = {
        "text": Item(text="<|image_1|>\nkeep the newline\n"),
        "bytes": Item(image=path.read_bytes()),
        "path": Item(text=" both ", image=path),
    }
    table = to_dataset(items, ["image"])
    found = [item for window in iter_items(table, window=2) for item in window]
    assert [item.id for item in found] == [item.id for item in items.values()]
    assert found[0].text == "<|image_1|>\nkeep the newline\n"
    assert "text" not in table.column_names  # the category gives this side no text for foreign models
    assert table[1]["image"].size == (9, 7)  # but mteb decodes images for them


def test_category_modalities_follow_mteb():
    assert category_modalities("it2t") == (["text", "image"], ["text"])
    assert category_modalities("i2it") == (["image"], ["text", "image"])


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_ranking_equals_a_full_sort(chunk):
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(40, 5)).astype(np.float32)
    lists = [rng.permutation(40)[: 3 + i * 5] for i in range(7)]
    names = [f"d{i}" for i in rng.permutation(40)]
    for row, (best, scores) in enumerate(rank_candidates(queries, documents, lists, tie_order(names), 6, chunk=chunk)):
        similar = queries[row] @ documents[lists[row]].T
        expected = lists[row][np.argsort(-similar)][:6]
        assert best.tolist() == expected.tolist()
        np.testing.assert_allclose(scores, np.sort(similar)[::-1][:6], rtol=1e-6, atol=1e-6)


def test_ties_are_broken_by_name_and_not_by_position():
    ones = np.ones((1, 2), dtype=np.float32)
    names = ["b", "a", "d", "c"]
    ((best, _),) = rank_candidates(ones, np.ones((4, 2), dtype=np.float32), None, tie_order(names), 2)
    assert [names[row] for row in best] == ["d", "c"]


def test_invalid_embeddings_are_refused():
    bad = np.array([[np.nan, 1.0]], dtype=np.float32)
    with pytest.raises(ValueError, match=r"query 0 .* NaN"):
        rank_candidates(bad, bad, None, tie_order(["a"]), 1)
