"""Videos: sampling, order, identity, decoders, and what is refused."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from unime_st.data import BadImageError, BadVideoError, Item, VideoRef
from unime_st.data.videos import frame_names, missing_frame, sample_indices


def frames(count: int, width: int = 40, height: int = 30, seed: int = 0) -> list[Image.Image]:
    values = np.random.default_rng(seed).integers(0, 255, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in values]


def folder_of(path: Path, count: int, *, first: int = 1, **options: int) -> Path:
    path.mkdir()
    for number, frame in enumerate(frames(count, **options), first):
        frame.save(path / f"frame_{number:04d}.png")
    return path


class Decoder:
    """Decoder over frames in memory, with the interface of torchcodec."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.array = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames(count, seed=seed)]))
        self.metadata = SimpleNamespace(num_frames=count, width=40, height=30)

    def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
        return SimpleNamespace(data=self.array[indices].permute(0, 3, 1, 2))


def test_sampling_and_order_are_those_of_the_released_code(kept_golden: Path) -> None:
    golden = json.loads((kept_golden / "v2" / "frames" / "frames.json").read_text())
    for case in golden["cases"]:
        assert sample_indices(case["saved"], 8) == case["indices"]
    for case in golden["other_num_frames"]:
        assert sample_indices(case["saved"], case["num_frames"]) == case["indices"]


def test_natural_order(kept_golden: Path, tmp_path: Path) -> None:
    golden = json.loads((kept_golden / "v2" / "frames" / "frames.json").read_text())["order"]
    for name in golden["files"]:
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    assert frame_names(tmp_path) == golden["natural_order_of_reference"]
    chosen = [Path(str(frame.path)).name for frame in VideoRef.of_folder(tmp_path).frames]
    assert chosen == golden["eight"]


def test_identity_is_that_of_frames_and_sampling(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", 20)
    copy = folder_of(tmp_path / "b", 20)
    assert Item(video=folder) == Item(video=str(copy)) and Item(video=folder).modality == "video"
    chosen = [folder / f"frame_{index + 1:04d}.png" for index in sample_indices(20, 8)]
    different = [
        Item(video=folder),
        Item("a", video=folder),
        Item("a"),
        Item(image=chosen[0]),
        Item(video=chosen),  # all of eight frames, not eight of twenty
        Item(video=chosen[::-1]),
        Item(video=VideoRef.of_folder(folder, 4)),
    ]
    assert len({item.id for item in different}) == len(different)
    assert pickle.loads(pickle.dumps(different[1])) == different[1]
    assert list(Item("a", chosen[0], folder).to_input()) == ["image", "video", "text"]


def test_items_without_video_keep_their_ids() -> None:
    assert Item("a red square").id == "260fb781d8cf5b8c8b6bb1ed5d9b3170"
    assert Item("a").__reduce__() == (Item, ("a", None))


def test_forms_of_a_video(tmp_path: Path) -> None:
    some = frames(3)
    array = np.stack([np.asarray(frame) for frame in some])
    for form in (some, tuple(some), array, torch.from_numpy(array).permute(0, 3, 1, 2)):
        video = Item(video=form).video
        assert video is not None and video.shape() == (3, 40, 30)
        assert [frame.convert("RGB").tobytes() for frame in video.open()] == [frame.tobytes() for frame in some]
    assert Item(video=Decoder(20)) == Item(video=Decoder(20)) != Item(video=Decoder(20, seed=1))
    decoded = VideoRef.of(Decoder(20))
    assert decoded.shape() == (8, 40, 30)
    assert [frame.tobytes() for frame in decoded.open()] == [frames(20)[i].tobytes() for i in sample_indices(20, 8)]
    with pytest.raises(TypeError, match=r"Item.video must be a folder, .* got int"):
        Item(video=3)


def test_frames_are_decoded_only_when_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = VideoRef.of_folder(folder_of(tmp_path / "a", 20))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert video.shape() == (8, 40, 30) and len(video.open()) == 8 and len(Item(video=video).id) == 32


def test_a_folder_with_faults_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadVideoError, match=r"empty: the folder has no frames"):
        Item(video=tmp_path / "empty")
    folder = folder_of(tmp_path / "gap", 12)
    (folder / "frame_0003.png").unlink()
    with pytest.raises(BadVideoError, match=r"gap: frame frame_0003 is missing"):
        Item(video=folder)
    unequal = folder_of(tmp_path / "unequal", 3)
    Image.new("RGB", (10, 10)).save(unequal / "frame_0002.png")
    with pytest.raises(BadVideoError, match=r"unequal: frame .*frame_0002.png has 10 x 10 pixels .* 40 x 30"):
        Item(video=unequal).to_input()
    with pytest.raises(BadVideoError, match="65 frames are more than 64"):
        Item(video=frames(65, 4, 4))
    assert VideoRef.of_folder(folder_of(tmp_path / "long", 65, width=4, height=4)).shape()[0] == 8
    assert VideoRef.of_frames(frames(65, 4, 4), num_frames=64).shape()[0] == 64
    with pytest.raises(ValueError, match="at least one frame"):
        Item(video=[])
    cut = folder_of(tmp_path / "cut", 2) / "frame_0002.png"
    cut.write_bytes(cut.read_bytes()[:800])
    with pytest.raises(BadImageError, match=r"cut.*frame_0002.png: cannot be decoded"):
        VideoRef.of_folder(cut.parent).check()


def test_gaps_in_names() -> None:
    assert missing_frame(["0000.jpg", "0001.jpg", "0005.jpg"]) == "0002"
    for names in (["0.jpg", "30.jpg", "60.jpg"], ["a.jpg", "b.jpg"], ["x_1.jpg", "y_2.jpg", "y_9.jpg"], ["1.png"]):
        assert missing_frame(names) is None


def test_a_file_without_decoder_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ImportError, match=r'a.mp4: decoding video files needs torchcodec.*"unime-st\[video\]"'):
        Item(video=tmp_path / "a.mp4").to_input()
    with pytest.raises(BadVideoError, match=r"b.mp4: cannot be read \(no such file\)"):
        _ = Item(video=tmp_path / "b.mp4").id


def test_video_files(tmp_path: Path) -> None:
    """Eight frames of a file; a truncated one and one of another kind are named."""
    pytest.importorskip("torchcodec")
    from torchcodec.encoders import VideoEncoder

    array = np.zeros((24, 3, 64, 96), np.uint8)
    for number in range(24):
        array[number, :, :, : 4 * number] = 200
    VideoEncoder(torch.from_numpy(array), frame_rate=8).to_file(str(tmp_path / "a.mp4"))
    video = VideoRef.of(tmp_path / "a.mp4")
    assert video.shape() == (8, 96, 64) and Item(video=video) == Item(video=str(tmp_path / "a.mp4"))
    widths = [int((np.asarray(frame)[32, :, 0] > 100).sum()) for frame in video.open()]
    assert widths == pytest.approx([4 * index for index in sample_indices(24, 8)], abs=2)
    content = (tmp_path / "a.mp4").read_bytes()
    for name, damaged in (("cut.mp4", content[: len(content) // 2]), ("text.mp4", b"not a video" * 50)):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(BadVideoError, match=f"{name}: cannot be decoded"):
            VideoRef.of(tmp_path / name).open()
