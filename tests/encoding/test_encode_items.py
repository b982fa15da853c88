from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_embedder import tiny_embedder

from unime_st.data import BadImageError, Item, PairRecord, RecordSet
from unime_st.encoding import encode_items


def picture(seed: int, size: tuple[int, int] = (30, 40)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mixed() -> list[Item]:
    texts = ["a", "a longer text " * 5, "readme.png", "été ☃"]
    images = [picture(0), picture(1, (200, 90)), Image.new("RGB", (1, 1)), Image.new("RGB", (3000, 10))]
    return [*map(Item, texts), *(Item(image=image) for image in images), Item("both", picture(2)), Item("a")]


def test_vectors_equal_one_by_one_encoding_in_order():
    items, model = mixed(), tiny_embedder()
    alone = np.stack([model.encode([item.to_input()])[0] for item in items])
    for batch_size in (1, 3, 64):
        vectors = encode_items(model, items, batch_size=batch_size)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_equal_items_are_encoded_once(monkeypatch: pytest.MonkeyPatch):
    model, seen = tiny_embedder(), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda inputs, **options: seen.extend(inputs) or encode(inputs, **options))
    vectors = encode_items(model, [Item("a"), Item("b"), Item("a"), Item(image=picture(0)), Item(image=picture(0))])
    assert len(seen) == 3
    assert (vectors[0] == vectors[2]).all() and (vectors[3] == vectors[4]).all() and (vectors[0] != vectors[1]).any()


def test_bad_image_is_named_or_skipped(tmp_path: Path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    items = [Item("a"), Item(image=tmp_path / "bad.png"), Item(image=tmp_path / "absent.png"), Item("b")]
    with pytest.raises(BadImageError, match="item 1: .*bad.png"):
        encode_items(tiny_embedder(), items[:2])
    with pytest.raises(BadImageError, match="item 2: .*absent.png"):
        encode_items(tiny_embedder(), items)
    vectors, mask = encode_items(tiny_embedder(), items, on_error="skip")
    assert mask.tolist() == [True, False, False, True]
    assert np.isnan(vectors[~mask]).all() and np.isfinite(vectors[mask]).all()
    np.testing.assert_allclose(vectors[mask], encode_items(tiny_embedder(), [Item("a"), Item("b")]), atol=1e-5)


def test_nothing_and_nothing_readable(tmp_path: Path):
    assert encode_items(tiny_embedder(), []).shape == (0, 32)
    vectors, mask = encode_items(tiny_embedder(), [Item(image=tmp_path / "absent.png")], on_error="skip")
    assert vectors.shape == (1, 32) and not mask.any()
    with pytest.raises(ValueError, match="on_error"):
        encode_items(tiny_embedder(), [], on_error="ignore")


def test_items_of_a_record_set(tmp_path: Path):
    records = RecordSet.write(tmp_path, [PairRecord(item, Item("x")) for item in mixed()], {})
    vectors = encode_items(tiny_embedder(), [records.item(item_id) for item_id in records.item_ids])
    rows = {item_id: row for row, item_id in enumerate(records.item_ids)}
    expected = encode_items(tiny_embedder(), mixed())
    np.testing.assert_allclose(vectors[[rows[item.id] for item in mixed()]], expected, atol=1e-5)
