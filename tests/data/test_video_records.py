"""Videos in record folders, importers and index sources: identity, paths, and what is set aside."""

from __future__ import annotations

import gc
import json
import re
import sys
import types
import weakref
from pathlib import Path

import pytest
from PIL import Image
from test_videos import Decoder, folder_of, frames

from unime_st.data import Item, PairRecord, RecordSet, VideoRef
from unime_st.data.importing import import_records
from unime_st.data.parquet_shards import ITEM_SCHEMA, ItemReader, ShardWriter
from unime_st.data.validation import ImageChecker
from unime_st.report.html import show_item
from unime_st.retrieval.index_sources import Columns, read_items


def test_round_trip_of_every_kind(tmp_path: Path) -> None:
    """Below the root paths are stored; other frames as bytes, and those of a decoder as they are sampled."""
    below, outside = folder_of(tmp_path / "below", 3), folder_of(tmp_path.parent / f"{tmp_path.name}-outside", 10)
    (tmp_path / "clip.mp4").write_bytes(b"not decoded here")
    videos = [below, outside, frames(2), VideoRef.of(Decoder(20)), tmp_path / "clip.mp4"]
    items = [Item("a", video=video) for video in videos]
    pairs = [PairRecord(item, Item(video=item.video), negatives=(Item("b"),)) for item in items]
    records = RecordSet.write(tmp_path / "set", pairs, {}, image_root=tmp_path)
    assert [record.query for record in records] == items and records[1].positive == pairs[1].positive
    found = [record.query.video for record in records]
    assert all(item.video is not None for item in items) and all(video is not None for video in found)
    assert [video.shape() for video in found[:4] if video] == [(3, 40, 30), (8, 40, 30), (2, 40, 30), (8, 40, 30)]
    assert found[0].frames[0].path == str(below / "frame_0001.png") and found[1].frames[0].data is not None
    assert found[4].path == str(tmp_path / "clip.mp4") and found[4].num_frames == 8
    assert found[3].open()[7].tobytes() == frames(20)[19].tobytes()
    assert [item.video is None for item in records.items].count(True) == 1


@pytest.mark.slow
def test_checked_frames_are_not_kept() -> None:
    """Memory stays flat in the number of videos; a video is checked once, whatever refers to it."""
    with ImageChecker(1) as checker:
        for _ in range(2):
            item = Item(video=frames(2))
            kept = weakref.ref(item.video)
            assert checker.errors([item]) == {}
            del item
            gc.collect()
            assert kept() is None and len(checker._sound) == 1


def test_folders_of_earlier_versions_have_no_videos(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "items", ITEM_SCHEMA.remove(3)) as writer:
        writer.add({"id": Item("a").id, "text": "a", "image": None})
    assert list(ItemReader(tmp_path)) == [Item("a")]


def test_importing(tmp_path: Path) -> None:
    folder_of(tmp_path / "whole", 10)
    folder_of(tmp_path / "gap", 4)
    (tmp_path / "gap" / "frame_0002.png").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes((tmp_path / "whole" / "frame_0001.png").read_bytes()[:60])
    uneven = ["whole/frame_0001.png", "uneven.png"]
    Image.new("RGB", (9, 9)).save(tmp_path / "uneven.png")
    listed = [f"whole/frame_{number:04d}.png" for number in (1, 2)]
    rows = [
        {"query_text": "a", "positive_video": "whole", "negatives": [{"text": "b", "video": listed}]},
        {"query_text": "a", "query_video": listed, "positive_text": "c"},
        *(
            {"query_text": "a", "positive_video": video}
            for video in ("gap", "empty", "broken", "absent", uneven, "../x")
        ),
        {"query_text": "a", "positive_video": listed * 33},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = import_records(tmp_path / "rows.jsonl", tmp_path / "records")
    assert [record.query.modality for record in records] == ["text", "video+text"]
    assert records[0].positive == Item(video=tmp_path / "whole")
    assert records[0].negatives == (Item("b", video=[tmp_path / name for name in listed]),)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "records" / "rejected.jsonl").open()]
    expected = [
        "frame_0002 is missing",
        "no frames",
        "cannot be",
        "no such",
        "one size",
        "outside",
        "66 frames are more",
    ]
    assert len(reasons) == 7
    for word in expected:
        assert sum(word in reason for reason in reasons) == 1, (word, reasons)


def test_files_without_a_decoder_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    (tmp_path / "clip.mp4").write_bytes(b"x")
    folder_of(tmp_path / "whole", 2)
    rows = [{"query_text": "a", "positive_video": name} for name in ("clip.mp4", "whole")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = import_records(tmp_path / "rows.jsonl", tmp_path / "records")
    assert [record.positive for record in records] == [Item(video=tmp_path / "whole")]
    (line,) = (tmp_path / "records" / "rejected.jsonl").read_text().splitlines()
    assert "clip.mp4: decoding video files needs torchcodec" in line
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match=r"all 1 pairs were rejected.*needs torchcodec"):
        import_records(tmp_path / "rows.jsonl", tmp_path / "none")


def test_folders_of_video_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Videos stand after the images. Without a decoder one line says so; a folder of videos alone is refused."""
    (tmp_path / "deep").mkdir()
    for name in ("b.mp4", "deep/c.WebM"):
        (tmp_path / name).write_bytes(b"x")
    decoders = types.SimpleNamespace(VideoDecoder=object)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    assert [(name, item.modality) for name, item in read_items(tmp_path)] == [
        ("b.mp4", "video"),
        ("deep/c.WebM", "video"),
    ]
    assert [name for name, _ in read_items(tmp_path / "b.mp4")] == ["b.mp4"]
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ImportError, match=r"b.mp4: decoding video files needs torchcodec"):
        list(read_items(tmp_path))
    frames(1)[0].save(tmp_path / "z.png")
    assert [name for name, _ in read_items(tmp_path)] == ["z.png"]
    assert caplog.text.count("2 videos are left out: video") == 1


def test_index_sources_and_gallery(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_of(tmp_path / "whole", 2)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "x", "clip": "whole", "text": "a ship"}))
    ((name, item),) = read_items(tmp_path / "rows.jsonl", Columns(video="clip"))
    assert name == "x" and item == Item("a ship", video=tmp_path / "whole")
    assert str(show_item(item)).count("<img") == str(show_item(Item(video=VideoRef.of(Decoder(2))))).count("<img") == 2
    folder_of(tmp_path / "gap", 4)
    (tmp_path / "gap" / "frame_0002.png").unlink()
    (tmp_path / "empty").mkdir()
    clips = ["absent", "gap", "empty", ["whole/frame_0001.png"] * 65, "whole"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"clip": clip, "text": "a ship"}) for clip in clips))
    assert [name for name, _ in read_items(tmp_path / "rows.jsonl", Columns(video="clip"))] == ["rows.jsonl:4"]
    for number, reason in enumerate(["no such file or folder", "frame_0002 is missing", "no frames", "65 frames are"]):
        assert re.search(rf"row {number} is left out: video .*{reason}", caplog.text)
