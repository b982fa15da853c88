"""`encode_items` and `encode_to_shards`: options, errors, resumption."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tiny_embedder import tiny_embedder, write_tiny_embedder

from tests.mteb_tasks.foreign import text_model
from unime_st import UniME
from unime_st.data import BadImageError, Item, PairRecord, RecordSet
from unime_st.data.manifest import StageConflictError
from unime_st.encoding import encode_items, encode_to_shards, engine


def make_image(seed: int, size: tuple[int, int] = (30, 40)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mixed() -> list[Item]:
    texts = ["a", "a longer text " * 5, "readme.png", "été ☃"]
    images = [make_image(0), make_image(1, (200, 90)), Image.new("RGB", (1, 1)), Image.new("RGB", (3000, 10))]
    return [*map(Item, texts), *(Item(image=image) for image in images), Item("both", make_image(2)), Item("a")]


def test_vectors_equal_one_by_one_encoding_in_order():
    items, model = mixed(), tiny_embedder()
    alone = np.stack([model.encode([item.to_input()])[0] for item in items])
    for options in ({}, {"token_budget": 1}, {"token_budget": 100, "workers": 3}, {"device": ["cpu", "cpu"]}):
        vectors = encode_items(model, items, **options)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def rows_embedded(model: SentenceTransformer, items: Iterable[Item], **options: object) -> tuple[int, np.ndarray]:
    seen: list[int] = []
    hook = model[0].register_forward_pre_hook(lambda module, given: seen.append(len(given[0]["input_ids"])))
    try:
        vectors = encode_items(model, items, **options)
    finally:
        hook.remove()
    return sum(seen), vectors


def test_equal_items_are_encoded_once(monkeypatch: pytest.MonkeyPatch):
    items = [Item("a"), Item("b"), Item("a"), Item(image=make_image(0)), Item(image=make_image(0))]
    model = tiny_embedder()
    count, vectors = rows_embedded(model, items)
    assert count == 3
    assert (vectors[0] == vectors[2]).all() and (vectors[3] == vectors[4]).all() and (vectors[0] != vectors[1]).any()
    monkeypatch.setattr(engine, "WINDOW", 2)
    count, again = rows_embedded(model, iter(items * 3))
    assert count == 3
    np.testing.assert_allclose(again, np.tile(vectors, (3, 1)), atol=1e-6)


@pytest.mark.parametrize("window", [3, 4096])
def test_stream_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int):
    monkeypatch.setattr(engine, "WINDOW", window)
    model, items = tiny_embedder(), mixed()
    expected = encode_items(model, items)
    shards = encode_to_shards(model, (item for item in items), tmp_path / "vectors", workers=2)
    assert len(shards) == len(items) and len(shards.shards()) == -(-len(items) // window)
    np.testing.assert_allclose(shards[:], expected, atol=1e-6)
    np.testing.assert_allclose(shards[[8, 0, 3]], expected[[8, 0, 3]], atol=1e-6)
    np.testing.assert_allclose(shards[-1], expected[-1], atol=1e-6)
    assert len(encode_to_shards(model, iter(items), tmp_path / "vectors")) == len(items), "a finished folder is kept"
    with pytest.raises(StageConflictError):
        encode_to_shards(model, items, tmp_path / "vectors", dtype="float16")
    half = encode_to_shards(model, items, tmp_path / "vectors", dtype="float16", overwrite=True)
    assert half.shards()[0].dtype == np.float16
    np.testing.assert_allclose(half[:], expected, atol=1e-3)


@pytest.mark.parametrize("workers", [1, 8])
def test_a_killed_stream_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int):
    """Also where a later item repeats an earlier one, and where an earlier one has no vector."""
    monkeypatch.setattr(engine, "WINDOW", 2)
    model, items = tiny_embedder(), [Item(image=b"no image"), *mixed()] * 2
    expected, readable = encode_items(model, items, on_error="skip")

    def killed(after: int) -> Iterator[Item]:
        yield from items[:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_to_shards(model, killed(9), tmp_path / "vectors", on_error="skip", workers=workers)
    kept = len(list((tmp_path / "vectors").glob("vectors-*.npy")))
    assert kept == 4, "what came before the end of the stream is kept, however many batches were under way"
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "vectors").glob("vectors-*.npy"))]
    encode_to_shards(model, iter(items), tmp_path / "vectors", on_error="skip")
    after = [path.stat().st_mtime_ns for path in sorted((tmp_path / "vectors").glob("vectors-*.npy"))]
    assert after[:kept] == before and len(after) == len(items) / 2
    shards = encode_to_shards(model, iter(items), tmp_path / "vectors", on_error="skip")
    np.testing.assert_allclose(shards[:], expected, atol=1e-6)
    lines = (tmp_path / "vectors" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == np.flatnonzero(~readable).tolist()


def test_leading_dimensions(tmp_path: Path):
    items, whole = mixed(), tiny_embedder()
    model = UniME(modules=list(whole.children()), device="cpu", truncate_dim=8)
    expected = whole.encode([item.to_input() for item in items])[:, :8]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(model.encode(iter(items)), expected, atol=1e-5)
    np.testing.assert_allclose(encode_items(model, items), expected, atol=1e-5)
    np.testing.assert_allclose(encode_items(whole, items, truncate_dim=8), expected, atol=1e-5)
    shards = encode_to_shards(model, items, tmp_path / "vectors")
    assert shards.dim == 8
    np.testing.assert_allclose(shards[:], expected, atol=1e-5)
    assert encode_to_shards(whole, items, tmp_path / "vectors", truncate_dim=8)[:].shape == expected.shape
    wider = encode_to_shards(model, items, tmp_path / "wider", truncate_dim=16)[:]
    np.testing.assert_allclose(wider, encode_items(whole, items, truncate_dim=16), atol=1e-5)
    assert encode_items(model, [], truncate_dim=16).shape == (0, 16)
    with pytest.raises(StageConflictError, match="dim: 8 there, 32 now"):
        encode_to_shards(whole, items, tmp_path / "vectors")
    absent = Item(image=tmp_path / "absent.png")
    assert encode_items(model, [absent], on_error="skip")[0].shape == (1, 8)
    assert encode_to_shards(model, [absent], tmp_path / "none", on_error="skip")[:].shape == (1, 8)


def test_half_precision(tmp_path: Path):
    folder, items = write_tiny_embedder(tmp_path / "model"), mixed()
    model = UniME(folder, device="cpu", model_kwargs={"dtype": torch.bfloat16})
    vectors = encode_items(model, items)
    assert vectors.dtype == np.float32 and model.encode(["a"], convert_to_tensor=True).dtype == torch.bfloat16
    assert (vectors * encode_items(tiny_embedder(), items)).sum(1).min() > 0.99
    shards = encode_to_shards(model, items, tmp_path / "vectors", dtype="float16", truncate_dim=16)
    assert shards.shards()[0].dtype == np.float16
    cut = vectors[:, :16] / np.linalg.norm(vectors[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(shards[:], cut, atol=0.01)
    assert np.abs(model.encode(["a", "b"], precision="int8", truncate_dim=16)).max() > 1


def test_shards_name_what_has_no_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "WINDOW", 2)
    bad = Item(image=b"no image")
    items = [bad, bad, Item("a"), bad, Item("b"), Item("a")]
    with pytest.raises(BadImageError, match="item 0: "):
        encode_to_shards(tiny_embedder(), items, tmp_path / "vectors")
    shards = encode_to_shards(tiny_embedder(), items, tmp_path / "vectors", on_error="skip")
    assert np.isnan(shards[:]).all(axis=1).tolist() == [True, True, False, True, False, False]
    rejected = [json.loads(line) for line in (tmp_path / "vectors" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in rejected] == [0, 1, 3] and "no image" not in rejected[0]["reason"]
    assert "not an image" in rejected[0]["reason"]
    np.testing.assert_array_equal(shards[2], shards[5])


def test_bad_image_is_named_or_skipped(tmp_path: Path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    items = [Item("a"), Item(image=tmp_path / "bad.png"), Item(image=tmp_path / "absent.png"), Item("b")]
    with pytest.raises(BadImageError, match=r"item 1: .*bad.png"):
        encode_items(tiny_embedder(), items[:2])
    with pytest.raises(BadImageError, match=r"item 2: .*absent.png"):
        encode_items(tiny_embedder(), items)
    reasons: dict[int, str] = {}
    vectors, mask = encode_items(tiny_embedder(), items, on_error="skip", reasons=reasons)
    assert mask.tolist() == [True, False, False, True]
    assert sorted(reasons) == [1, 2] and "bad.png" in reasons[1] and "absent.png" in reasons[2]
    assert np.isnan(vectors[~mask]).all() and np.isfinite(vectors[mask]).all()
    np.testing.assert_allclose(vectors[mask], encode_items(tiny_embedder(), [Item("a"), Item("b")]), atol=1e-5)


def test_nothing_and_nothing_readable(tmp_path: Path):
    assert encode_items(tiny_embedder(), []).shape == (0, 32)
    vectors, mask = encode_items(tiny_embedder(), [Item(image=tmp_path / "absent.png")], on_error="skip")
    assert vectors.shape == (1, 32) and not mask.any()
    with pytest.raises(ValueError, match="on_error"):
        encode_items(tiny_embedder(), [], on_error="ignore")


def test_a_static_embedding_encodes_texts_and_refuses_images_and_videos(tmp_path: Path):
    model = text_model()
    texts = ["a red circle", "a red circle", *(f"{'blue ' * (n % 17)}star on the ring {n}" for n in range(100))]
    for prompt in (None, "the left "):
        expected = model.encode(texts, prompt=prompt)
        np.testing.assert_array_equal(encode_items(model, texts, prompt=prompt), expected)
        np.testing.assert_array_equal(encode_items(model, map(Item, texts), prompt=prompt), expected)
    shards = encode_to_shards(model, map(Item, texts), tmp_path / "vectors", show_progress_bar=False)
    np.testing.assert_array_equal(shards[:], model.encode(texts))
    for items in ([Item(image=make_image(0))], [Item("a"), Item(image=make_image(0))]):
        with pytest.raises(ValueError, match=rf"item {len(items) - 1}: Modality 'image' is not supported"):
            encode_items(model, items)
    with pytest.raises(ValueError, match=r"item 0: this model .* takes no video"):
        encode_items(model, [Item(video=[make_image(0), make_image(1)])])


def test_items_of_a_record_set(tmp_path: Path):
    records = RecordSet.write(tmp_path, [PairRecord(item, Item("x")) for item in mixed()], {})
    vectors = encode_items(tiny_embedder(), [records.item(item_id) for item_id in records.item_ids])
    rows = {item_id: row for row, item_id in enumerate(records.item_ids)}
    expected = encode_items(tiny_embedder(), mixed())
    np.testing.assert_allclose(vectors[[rows[item.id] for item in mixed()]], expected, atol=1e-5)
