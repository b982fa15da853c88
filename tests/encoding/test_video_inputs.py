"""Videos through the encoding engine, for every family with a video slot, and refusal by the others."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unime_st import Item, UniME
from unime_st.backbones.video_frames import FrameLimits
from unime_st.data import BadImageError, VideoRef
from unime_st.encoding import TokenCounter, encode_items
from unime_st.encoding.list_inputs import encode_list
from unime_st.encoding.model_inputs import normalize_input
from unime_st.encoding.shared_videos import VideoSharing

Get = Callable[[str], UniME]
FAMILIES = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-onevision", "unime-v2-2b", "unime-v2", "unime-v1-llava-ov"]


def clip(count: int, width: int = 70, height: int = 56, seed: int = 0) -> list[Image.Image]:
    values = np.random.default_rng(seed).integers(0, 255, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in values]


def some_items() -> list[Item]:
    videos = [clip(8), clip(3), clip(1), clip(5, 100, 75), clip(2, 20, 90)]
    items = [Item("a red circle", video=video) for video in videos]
    return [*items, Item(video=videos[0]), Item("a blue square"), Item(image=videos[0][0]), items[0]]


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_equal_single_videos(embedder: Get, name: str) -> None:
    """Padded, packed, and on the plain class with the same frames; the order of frames matters."""
    model, items = embedder(name), some_items()
    found = model.encode(items)
    assert np.abs(found - np.stack([model.encode(item) for item in items])).max() < 1e-5
    assert np.abs(found - encode_list(model, items, packed=True).numpy()).max() < 1e-5
    backwards = model.encode(Item("a red circle", video=clip(8)[::-1]))
    assert np.abs(found[0] - backwards).max() > 1e-2
    assert "video" in model.modalities


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_videos_pass_the_vision_tower_once(
    embedder: Get, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also of plain inputs, on the packed way, and beside a video that cannot be read."""
    model, videos = embedder(name), [clip(3), clip(2, 100, 75, seed=1)]
    items: list[Any] = [Item(text, video=video) for text in ("a", "a red circle", "blue") for video in videos]
    items += [{"text": text, "video": videos[0]} for text in ("a", "b")]
    items += [Item(video=clip(3, seed=2)), Item("a"), Item("a", image=videos[0][0])]
    runs: list[int] = []
    tower = VideoSharing.run_tower
    monkeypatch.setattr(VideoSharing, "run_tower", lambda *given: runs.append(1) or tower(*given))
    found = model.encode(items)
    assert len(runs) == 3
    assert np.abs(found - np.stack([model.encode(item) for item in items])).max() < 1e-5
    assert np.abs(found - encode_list(model, items, packed=True).numpy()).max() < 1e-5
    (tmp_path / "0.png").write_bytes(b"\x89PNG no image")
    broken = [Item(text, video=[tmp_path / "0.png"]) for text in "ab"]
    assert encode_items(model, [*items, *broken], on_error="skip")[1].tolist() == [True] * len(items) + [False] * 2


@pytest.mark.parametrize("name", ["unime-v2", "unime-v1-llava-ov"])
def test_prompts_of_a_shared_video_that_are_too_long_are_set_aside(
    embedder: Get, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, video = embedder(name), clip(3)
    length = model.preprocess([Item("a", video=video)])["input_ids"].shape[1]
    monkeypatch.setattr(model[0], "max_seq_length", length - 8)
    reasons: dict[int, str] = {}
    items = [Item("a", video=video), Item("b " * 60, video=video), Item("a")]
    _, found = encode_items(model, items, on_error="skip", reasons=reasons)
    assert found.tolist() == [False, False, True] and all("Raise max_seq_length" in one for one in reasons.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_two_videos_of_one_row(embedder: Get, name: str) -> None:
    """Frames of another size are resized; another number of frames only fits families that do not stack."""
    model = embedder(name)
    videos = [clip(2), clip(2, 100, 75), clip(3)]
    rows = [[{"role": "user", "content": [{"type": "video", "video": v} for v in pair]}] for pair in
            ((videos[0], videos[1]), (videos[0], videos[2]))]  # fmt: skip
    assert np.isfinite(model.encode([rows[0]])).all()
    if "llava" in name or name == "unime-v2":
        with pytest.raises(BadImageError, match=r"stacks the videos of a batch, and these have \[2, 3\] frames"):
            model.encode([rows[1]])
    else:
        assert np.isfinite(model.encode([rows[1]])).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_counted_before_decoding(embedder: Get, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact as for images: up to the few tokens that a template adds."""
    model, items = embedder(name), some_items()
    lengths = [int(model.preprocess([item])["attention_mask"].sum()) for item in items]
    with monkeypatch.context() as patched:
        patched.setattr(VideoRef, "open", lambda self: pytest.fail("decoded"))
        counts = TokenCounter(model)(items)
    assert np.abs(counts - lengths).max() <= 9


@pytest.mark.parametrize("name", ["internvl3", "smolvlm", "llava-1.6", "unime-v1-phi3.5"])
def test_a_family_without_video_is_refused(embedder: Get, name: str) -> None:
    """It would be given the text alone."""
    model = embedder(name)
    with pytest.raises(ValueError, match=r"takes no video: use one of the families Qwen2-VL, Qwen2.5-VL"):
        model.encode([Item("a red circle", video=clip(2)), Item("a")])
    with pytest.raises(ValueError, match="takes no video"):
        model.preprocess([{"text": "a", "video": clip(2)}])
    _, found = encode_items(model, [Item("a", video=clip(2)), Item("a")], on_error="skip")
    assert found.tolist() == [False, True]


def test_a_family_whose_template_has_no_video_slot_is_refused() -> None:
    model = UniME("unime-tiny", device="cpu")
    assert model.encode([Item("a red circle", video=clip(2)), Item("a")]).shape == (2, 128)
    model.processor.chat_template = model.processor.chat_template.replace("video", "audio")
    with pytest.raises(ValueError, match=r"takes no video: .* has a video slot"):
        model.encode([Item("a red circle", video=clip(2)), Item("a")])


def test_frame_sizes_are_those_of_the_released_code(kept_golden: Path) -> None:
    golden = json.loads((kept_golden / "v2" / "texts" / "behaviour.json").read_text())
    cases = [case for case in golden["sizes"] if case["kind"] == "video"]
    assert len(cases) > 10
    for case in cases:
        size = FrameLimits(3136, 1003520).frame_size(case["frames"], tuple(case["size"]), 28)
        assert list(size) == case["resized"]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_stored_frames_are_decoded_one_by_one(embedder: Get, tmp_path: Path, suffix: str) -> None:
    """The frames of a batch stay encoded; their pixels are those of the decoded frames."""
    for number, frame in enumerate(clip(4)):
        frame.save(tmp_path / f"{number}.{suffix}")
    processor = embedder("unime-v2-2b").processor.video_processor
    stored, decoded = (VideoRef.of_folder(tmp_path).open() for _ in range(2))
    expected = processor.preprocess([[frame.convert("RGB") for frame in decoded]])["pixel_values_videos"]
    assert np.array_equal(processor.preprocess([stored])["pixel_values_videos"], expected)
    kept, left = ([getattr(frame, "fp", None) is not None for frame in frames] for frames in (stored, decoded))
    assert all(kept) and not any(left)
    assert np.array_equal(processor.preprocess([stored])["pixel_values_videos"], expected), "used again"


def test_forms_of_input_and_shared_decoding(embedder: Get, tmp_path: Path) -> None:
    """A folder, a list of paths, frames in memory and an item are one video."""
    model, frames = embedder("unime-v2-2b"), clip(4)
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"{number}.png")
    paths = [str(path) for path in sorted(tmp_path.glob("*.png"))]
    forms: list[Any] = [
        Item("a", video=tmp_path),
        {"text": "a", "video": str(tmp_path)},
        {"text": "a", "video": tmp_path},
        {"text": "a", "video": paths},
        {"video": frames, "text": "a"},
        {"text": "a", "video": VideoRef.of_frames(frames)},
    ]
    found = model.encode(forms)
    assert np.abs(found - found[0]).max() < 1e-6
    assert np.abs(found[0] - model.encode("a")).max() > 1e-2


def test_faults_are_named_and_the_rest_is_encoded(embedder: Get, tmp_path: Path) -> None:
    model = embedder("unime-v2-2b")
    for name in ("good", "cut", "unequal"):
        (tmp_path / name).mkdir()
        for number, frame in enumerate(clip(3)):
            frame.save(tmp_path / name / f"{number}.jpg")
    (tmp_path / "cut" / "1.jpg").write_bytes((tmp_path / "good" / "1.jpg").read_bytes()[:900])
    Image.new("RGB", (30, 30)).save(tmp_path / "unequal" / "2.jpg")
    items = [Item("a", video=tmp_path / name) for name in ("good", "cut", "unequal")] + [Item("a")]
    reasons: dict[int, str] = {}
    vectors, found = encode_items(model, items, on_error="skip", reasons=reasons)
    assert sorted(reasons) == [1, 2] and "1.jpg: cannot be decoded" in reasons[1]
    assert "2.jpg has 30 x 30" in reasons[2]
    assert found.tolist() == (~np.isnan(vectors[:, 0])).tolist() == [True, False, False, True]
    for item, name in ((items[1], "1.jpg"), (items[2], "2.jpg")):
        with pytest.raises(BadImageError, match=name):
            model.encode([item])


def test_a_template_without_video_slot_is_refused(embedder: Get) -> None:
    model = embedder("unime-v2-2b")
    processor = copy.copy(model.processor)
    processor.chat_template = processor.chat_template.replace("c.type == 'video'", "c.type == 'film'")
    with pytest.raises(ValueError, match=r"1 videos and 0 video placeholders"):
        processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "video", "video": clip(2)}]}]], tokenize=True, return_dict=True
        )


def test_processors_with_frames_are_copied_and_saved(embedder: Get, tmp_path: Path) -> None:
    processor = embedder("unime-v2-2b").processor
    for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert twin.video_processor.limits == processor.video_processor.limits
    processor.save_pretrained(tmp_path)
    assert "Qwen2VLVideoProcessor" in (tmp_path / "processor_config.json").read_text()


@pytest.mark.parametrize("name", ["unime-v2-2b", "llava-onevision"])
def test_rows_of_several_videos_are_batched_by_the_frames_of_each(embedder: Get, name: str) -> None:
    """Three and three frames are as many as two, two and two, but processors cannot stack them."""
    model = embedder(name)
    rows = [[3, 3], [2, 2, 2], [3, 3], [6]]
    inputs: list[Any] = [
        [{"role": "user", "content": [{"type": "video", "video": clip(count, seed=count)} for count in row]}]
        for row in rows
    ]
    found = model.encode(inputs)
    assert np.abs(found - np.stack([model.encode([row])[0] for row in inputs])).max() < 1e-5
    assert TokenCounter(model).measure(inputs)[2] == [tuple(row) for row in rows]


class Decoder:
    """Decoder of 20 large frames, which are black."""

    metadata = SimpleNamespace(num_frames=20, width=3840, height=2160)

    def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
        return SimpleNamespace(data=np.zeros((len(indices), 2160, 3840, 3), np.uint8))


def test_frames_that_are_decoded_together_count_whole(embedder: Get, tmp_path: Path) -> None:
    """Those of a file or decoder are in memory at once, stored ones are resized one by one."""
    frame = tmp_path / "0.png"
    Image.new("RGB", (3840, 2160)).save(frame)
    inputs = [Item(video=VideoRef.of(Decoder())), {"video": np.zeros((2, 56, 70, 3), np.uint8)}, Item(video=[frame])]
    _, pixels, frames = TokenCounter(embedder("unime-v2-2b")).measure(list(map(normalize_input, inputs)))
    assert pixels.tolist() == [8 * 3840 * 2160, 2 * 56 * 70, 1280 * 28 * 28] and frames == [(8,), (2,), (1,)]


@pytest.mark.parametrize(
    ("video", "message"),
    [([], "one is missing"), ([clip(1)[0], None], "one is missing"), (clip(65, 4, 4), "65 frames are more than 64")],
)
def test_lists_without_a_frame_or_with_too_many_are_refused(embedder: Get, video: Any, message: str) -> None:
    """They would be encoded as the text alone, or without the frame."""
    with pytest.raises(BadImageError, match=message):
        embedder("unime-v2-2b").encode([{"text": "a", "video": video}, "b"])


def test_paths_of_video_files_are_videos(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.MP4", "c.wmv"):
        (tmp_path / name).write_bytes(b"x")
        for value in (str(tmp_path / name), tmp_path / name):
            assert normalize_input(value) == Item(video=tmp_path / name)
    assert normalize_input("absent.mp4") == "absent.mp4"
