"""Record folders: round trip, shards, relative image paths, workers."""

from __future__ import annotations

import json
import multiprocessing
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unime_st.data import BadImageError, ImageRef, Item, PairRecord, RecordSet, is_complete
from unime_st.data import parquet_shards as tables_module
from unime_st.data.images import png_bytes
from unime_st.data.manifest import link_items
from unime_st.data.parquet_shards import ItemReader
from unime_st.data.records import RecordWriter


def noise(seed: int, size: int = 8) -> bytes:
    return png_bytes(Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)))


def pairs(count: int = 20) -> list[PairRecord]:
    return [
        PairRecord(
            Item(f"query {index}"),
            Item(image=noise(index % 7)),
            dataset=f"set {index % 2}",
            negatives=(Item("shared"), Item(f"query {index}", noise(index))),
            positive_logit=0.1 * index,
            negative_logits=(-1.5, float(-index)),
        )
        for index in range(count)
    ]


def test_round_trip_and_each_item_once(tmp_path: Path):
    written = RecordSet.write(tmp_path / "set", pairs(), {"source": "test"})
    records = RecordSet.load(tmp_path / "set")
    for stored, record in zip(records, pairs(), strict=True):
        assert (stored.query, stored.positive, stored.negatives) == (record.query, record.positive, record.negatives)
        assert stored.dataset == record.dataset
        assert stored.positive_logit == np.float32(record.positive_logit)
        assert stored.negative_logits == record.negative_logits
    assert records[3] == list(written)[3] and records[-1] == records[19]
    assert len(records) == 20 and len(set(records.item_ids)) == len(records.item_ids) == 20 + 7 + 1 + 20
    assert records.manifest["items"] == 48 and records.manifest["rows"] == 20 and records.manifest["source"] == "test"
    assert records.rows.column_names[:4] == ["query", "positive", "dataset", "negatives"]
    assert records.item(records.rows["positive"][5].as_py()) == pairs()[5].positive
    assert all(item.id == Item(item.text, item.image).id for item in records.items)


def test_positions_outside_and_unknown_items(tmp_path: Path):
    records = RecordSet.write(tmp_path, pairs(2), {})
    for index in (2, -3):
        with pytest.raises(IndexError):
            records[index]
    for item_id in ("", "f" * 32, "nonsense", "é"):
        with pytest.raises(KeyError):
            records.item(item_id)


def test_many_row_groups_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables_module, "_GROUP_BYTES", 2000)
    monkeypatch.setattr(tables_module, "_SHARD_BYTES", 10_000)
    monkeypatch.setattr(tables_module, "_CACHED_BYTES", 6000)
    originals = pairs(60)
    records = RecordSet.write(tmp_path, originals, {})
    assert len(list(tmp_path.glob("items-*.parquet"))) > 1
    order = np.random.default_rng(0).permutation(60)
    assert all(records[int(index)].query == originals[index].query for index in order)
    assert 1 <= len(records.items._shards._cache) <= 4


def test_empty_set(tmp_path: Path):
    records = RecordSet.write(tmp_path, [], {})
    assert len(records) == 0 and list(records) == [] and records.item_ids == []


def test_interrupted_write_is_not_a_set_and_is_replaced(tmp_path: Path):
    def broken() -> Iterator[PairRecord]:
        yield from pairs(3)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        RecordSet.write(tmp_path, broken(), {})
    assert not is_complete(tmp_path)
    with pytest.raises(FileNotFoundError):
        RecordSet.load(tmp_path)
    assert len(RecordSet.write(tmp_path, pairs(4), {})) == 4
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(FileExistsError):
        RecordSet.write(tmp_path, pairs(1), {})


def test_images_as_relative_paths(tmp_path: Path):
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "a" / "1.png").write_bytes(noise(1))
    (tmp_path / "elsewhere.png").write_bytes(noise(2))
    with zipfile.ZipFile(root / "z.zip", "w") as archive:
        archive.writestr("deep/3.png", noise(3))
    images = [
        root / "a" / "1.png",
        tmp_path / "elsewhere.png",
        ImageRef(path=str(root / "z.zip"), member="deep/3.png"),
    ]
    originals = [PairRecord(Item("x"), Item(image=image)) for image in images]
    records = RecordSet.write(tmp_path / "set", originals, {}, image_root=root)
    stored = [records[index].positive.image for index in range(3)]
    assert (
        stored[0].path == str(root / "a" / "1.png") and stored[1].data == noise(2) and stored[2].member == "deep/3.png"
    )
    assert [record.positive.image.read() for record in records] == [noise(1), noise(2), noise(3)]


def test_stored_path_may_not_leave_the_image_root(tmp_path: Path):
    root = tmp_path / "images"
    root.mkdir()
    (root / "1.png").write_bytes(noise(1))
    (tmp_path / "secret.png").write_bytes(noise(2))
    records = RecordSet.write(
        tmp_path / "set", [PairRecord(Item("x"), Item(image=root / "1.png"))], {}, image_root=root
    )
    assert records[0].positive.image.read() == noise(1)
    (root / "1.png").unlink()
    (root / "1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadImageError, match="outside"):
        RecordSet.load(tmp_path / "set")[0]


def test_unreadable_image_stops_the_write(tmp_path: Path):
    with pytest.raises(BadImageError, match="absent"):
        RecordSet.write(tmp_path / "set", [PairRecord(Item("x"), Item(image="absent.png"))], {})
    assert not is_complete(tmp_path / "set")


def test_extra_columns(tmp_path: Path):
    import pyarrow as pa

    with RecordWriter(tmp_path, extra=[pa.field("rank", pa.int32())]) as writer:
        writer.add(PairRecord(Item("a"), Item("b")), rank=7)
    writer.finish({})
    assert RecordSet.load(tmp_path).rows["rank"].to_pylist() == [7]


def test_linked_items_survive_their_source(tmp_path: Path):
    RecordSet.write(tmp_path / "one", pairs(3), {})
    (tmp_path / "two").mkdir()
    link_items(tmp_path / "one", tmp_path / "two")
    link_items(tmp_path / "one", tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        path.unlink()
    assert pairs(3)[0].query.id in ItemReader(tmp_path / "two").ids


def _read_all(records: RecordSet, queue: multiprocessing.Queue) -> None:
    queue.put([record.positive.id for record in records])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_record_sets_travel_to_workers(tmp_path: Path, method: str):
    records = RecordSet.write(tmp_path, pairs(5), {})
    _ = records[0]
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_read_all, args=(records, queue))
    worker.start()
    assert queue.get(timeout=60) == [record.positive.id for record in records]
    worker.join()


@pytest.mark.parametrize(
    "logits",
    [
        {"positive_logit": 1.0},
        {"negative_logits": (1.0,)},
        {"negative_logits": None},
        {"positive_logit": float("nan"), "negative_logits": (1.0,)},
        {"positive_logit": 0.0, "negative_logits": (float("inf"),)},
    ],
)
def test_half_judged_records_are_refused(logits: dict):
    with pytest.raises(ValueError, match=r"needs one logit for its positive|must be finite|must be a tuple"):
        PairRecord(Item("a"), Item("b"), negatives=(Item("c"),), **logits)


def test_manifest_is_json_with_the_image_root(tmp_path: Path):
    RecordSet.write(tmp_path / "set", [], {"name": "é"}, image_root=tmp_path)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["image_root"] == str(tmp_path.resolve()) and manifest["name"] == "é"
