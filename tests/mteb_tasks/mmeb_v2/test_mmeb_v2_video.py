"""Video tasks of MMEB-V2: texts, embeddings, rankings and scores of the released code, faults, foreign models."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from mteb.models import ModelMeta
from mteb.models.modality_collators import FramesCollator, VideoCollator
from PIL import Image
from sentence_transformers import SentenceTransformer

from mteb_tasks import TwoStage
from mteb_tasks.columns import iter_items, setting_of
from mteb_tasks.loader import UniMELoader, wrap
from mteb_tasks.metadata import model_meta
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb_v2.comparison import compared_rows, profiles_of
from mteb_tasks.mmeb_v2.leaderboard import LEADERBOARD
from mteb_tasks.mmeb_v2.video_rows import parse_row
from mteb_tasks.mmeb_v2.video_sets import VIDEO_SETS, video_labels, video_set
from mteb_tasks.mmeb_v2.video_tasks import VIDEO_TASKS, VideoTask
from mteb_tasks.pixel_rule import PixelRule
from mteb_tasks.ruled_images import RuledItem, prescribed_model
from mteb_tasks.video_column import FrameReader, VideoFeature, stored_video
from tests.mteb_tasks.foreign import ForeignRetrieval
from unime_st import Item, UniMEReranker
from unime_st.data import VideoRef
from unime_st.encoding.list_inputs import encode_list
from unime_st.judging import Group, HttpJudge, LocalJudge


def make(key: str) -> VideoTask:
    return next(task for task in VIDEO_TASKS if task.key == key)()


@pytest.fixture(params=["kept", "full"])
def golden_video(request: pytest.FixtureRequest, kept_golden: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Golden video sets as `$MMEB_V2_DIR`: the two kept with the tests, then all seven (skipped where absent)."""
    folder = kept_golden / "v2_video"
    if request.param == "full":
        folder = request.getfixturevalue("golden").parent / "golden_v2"
        if not folder.is_dir():
            pytest.skip(f"no golden data of MMEB-V2: {folder} does not exist")
    monkeypatch.setenv("MMEB_V2_DIR", str(folder / "data"))
    return folder


@pytest.fixture
def copied(kept_golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kept sets as `$MMEB_V2_DIR`, to be damaged."""
    shutil.copytree(kept_golden / "v2_video" / "data", tmp_path / "data")
    monkeypatch.setenv("MMEB_V2_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def golden_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in ("texts", "edge"):
        content = json.loads((folder / "v2_video" / "texts" / f"{file}.json").read_text())
        for row in VIDEO_SETS:
            for found in content.get(row.key, {"rows": []})["rows"] if file == "texts" else content.get(row.key, []):
                yield row.key, found


def test_texts_of_all_sets(kept_golden: Path) -> None:
    """Queries and candidates byte for byte, with options that have no letter, no blank, or copies."""
    count = 0
    for key, official in golden_rows(kept_golden):
        row = video_set(key)
        if official.get("label", "").startswith("(@)") if isinstance(official.get("label"), str) else False:
            with pytest.raises(ValueError, match="is none of the options"):
                parse_row(row, official["row"])
            continue
        found = parse_row(row, official["row"])
        token = "<|video_pad|> " if found.video else "<|image_pad|> " if found.image else ""
        assert token + found.query + (f" {found.text}" if found.text else "") == official["query_text"]
        texts = official.get("candidate_texts", [c["text"] for c in official.get("candidates", [])])
        if found.names:
            assert list(found.texts) == texts
            assert [official["label"]] == list(found.right)
        count += 1
    assert count > 30
    assert {key: len(labels) for key, labels in video_labels().items()} == {
        "K700": 700, "UCF101": 101, "HMDB51": 51, "Breakfast": 10,
    }  # fmt: skip


def test_sources_are_those_of_the_released_code(kept_golden: Path) -> None:
    official = json.loads((kept_golden / "v2_video" / "texts" / "texts.json").read_text())
    for row in VIDEO_SETS:
        config = None if row.config == "default" else row.config
        assert official[row.key]["hub"] == [row.hub, config, row.split]
        assert official[row.key]["image_root_or_frame_root"].rstrip("/") == f"video-tasks/frames/{row.frames}"
    assert [row.key for row in VIDEO_SETS] == [row.key for row in LEADERBOARD if row.modality == "Video"]
    assert sum(row.rows for row in VIDEO_SETS) == 34940


def test_embeddings_rankings_and_scores(golden_video: Path, golden_model: SentenceTransformer, tmp_path: Path) -> None:
    loader = wrap(golden_model, "unime/golden")
    for folder in sorted((golden_video / "results").iterdir()):
        if folder.name not in {row.key for row in VIDEO_SETS}:
            continue
        task, official = make(folder.name), json.loads((folder / "result.json").read_text())
        result = mteb.evaluate(loader, task, cache=None, prediction_folder=tmp_path / folder.name)
        found = result.task_results[0].scores["test"][0]
        task.load_data()
        split = task.dataset[task.hf_subsets[0]]["test"]
        names = split["corpus"]["id"]
        known = [names.index(name) for name in official["candidate_names"]]
        for side, table in (("queries", "queries"), ("candidates", "corpus")):
            ours = loader.embed(iter_items(split[table]), setting=setting_of(split[table]))
            ours = ours[known] if table == "corpus" else ours
            assert np.abs(ours - np.load(folder / f"{side}.npy")).max() < 1e-5
        assert (found["profile"], found["frames"], found["pixels"]) == ("vlm2vec-8", "8", "3136-1003520")
        if task.key == "UCF101":  # the golden run has 8 of the 101 labels
            continue
        assert found["main_score"] == pytest.approx(official["official_main"], abs=1e-5)
        (saved,) = (tmp_path / folder.name).rglob("*_predictions.json")
        rankings = json.loads(saved.read_text())[task.hf_subsets[0]]["test"]
        for ranked, query in zip(rankings.values(), official["queries"], strict=True):
            assert sorted(ranked, key=ranked.get, reverse=True) == query["ranking_names"][:10]


class _Watched(LocalJudge):
    """A judge that keeps the pairs that it has judged."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pairs: list[tuple[Any, Any]] = []

    def score(self, groups: Sequence[Group], **options: Any) -> list[np.ndarray]:
        self.pairs.extend((group.query, candidate) for group in groups for candidate in group.candidates)
        return super().score(groups, **options)


def test_a_second_stage_sees_videos(
    kept_golden: Path, golden_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEB_V2_DIR", str(kept_golden / "v2_video" / "data"))
    judge = _Watched(UniMEReranker("unime-tiny", template="tiny", device="cpu"))
    model = TwoStage(wrap(golden_model, "unime/golden"), judge, top_k=2, method="pairwise")
    for key, sides in {"SmthSmthV2": [(True, False)], "MomentSeeker": [(False, True), (True, True)]}.items():
        found = mteb.evaluate(model, make(key), cache=None).task_results[0].scores["test"][0]
        assert 0 <= found["main_score"] <= 1
        seen = {(query.video is not None, candidate.video is not None) for query, candidate in judge.pairs}
        assert set(sides) <= seen
        judge.pairs.clear()
    behind_server = TwoStage(model.embedder, HttpJudge("http://127.0.0.1:9/v1", "m"), method="pairwise")
    assert behind_server.mteb_model_meta.modalities == ["text", "image"]


def test_token_ids_and_grids(golden_video: Path, golden_model: SentenceTransformer) -> None:
    rule = PixelRule(3136, 1003520, 28, 3136, 1003520)
    model = prescribed_model(golden_model, rule, None)
    for key in ("SmthSmthV2", "MomentSeeker"):
        inputs = json.loads((golden_video / "results" / key / "inputs.json").read_text())
        task = make(key)
        data = task.retrieval_data(task.hf_subsets[0], "test")
        for item, official in zip(data.queries.values(), inputs["queries"], strict=True):
            features = model.preprocess([RuledItem.of(item, rule).to_input()])
            assert features["input_ids"][0].tolist() == official["token_ids"]
            if official["kind"] == "video":
                assert features["video_grid_thw"].tolist() == official["grid_thw"]


def test_the_other_profiles(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, frames, profile in (("qwen-64", 64, "qwen-64"), ("vlm2vec-8", 8, "vlm2vec-8"), ("model", 8, "model")):
        monkeypatch.setenv("MMEB_V2_PROFILE", name)
        task = make("SmthSmthV2")
        data = task.retrieval_data(task.hf_subsets[0], "test")
        counts = [len(item.video.frames) for item in data.queries.values() if item.video]
        assert max(counts) == min(frames, 40) and task.protocol()["profile"] == profile
        queries = setting_of(task.split_tables(data)["queries"])
        if name == "qwen-64":
            assert {item.text for item in data.queries.values()} == {None}
            assert queries.system == video_set("SmthSmthV2").query
            assert queries.pixels == "4096-1843200-0-131072-786432-7864320"
    monkeypatch.setenv("MMEB_V2_PROFILE", "qwen-64")
    moments = make("MomentSeeker")
    data = moments.retrieval_data(moments.hf_subsets[0], "test")
    assert moments.metadata.prompt["query"].endswith("sentence and video segment.")
    assert data.queries["0"].text == "a small orange square slides past a blue disc"
    assert {item.text for item in data.corpus.values()} == {None}


def _expect(key: str, message: str) -> None:
    with pytest.raises(MMEBDataError, match=message):
        make(key).load_data()


def test_faulty_videos_are_named_before_encoding(copied: Path) -> None:
    frames = copied / "video-tasks" / "frames" / "video_cls" / "SSv2" / "85836"
    image = (frames / "frame_0001.jpg").read_bytes()
    (frames / "frame_0005.jpg").unlink()
    _expect("SmthSmthV2", r"test.parquet: row \d: video .*85836: frame frame_0005 is missing")
    (frames / "frame_0005.jpg").write_bytes(image[: len(image) // 2])
    _expect("SmthSmthV2", r"85836: frame frame_0005.jpg is broken")
    Image.new("RGB", (10, 10)).save(frames / "frame_0005.jpg")
    _expect("SmthSmthV2", r"frame_0005.jpg has 10 x 10 pixels")
    (frames / "frame_0005.jpg").write_bytes(image)
    make("SmthSmthV2").load_data()
    for number in range(13, 66):
        (frames / f"frame_{number:04d}.jpg").write_bytes(image)
    _expect("SmthSmthV2", r"85836: 65 frames are more than 64")
    shutil.rmtree(frames)
    _expect("SmthSmthV2", r"85836: the folder is missing")
    frames.mkdir()
    _expect("SmthSmthV2", r"85836: the folder has no frames")
    (frames / "frame_0001.jpg").write_bytes(image)
    make("SmthSmthV2").load_data()  # one frame is a video
    (copied / "video-tasks" / "frames" / "video_mret" / "MomentSeeker" / "query_scene_77.jpg").unlink()
    _expect("MomentSeeker", r"row 1: image .*query_scene_77.jpg is missing")


def test_moments_have_one_right_clip(copied: Path, kept_golden: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = copied / "video-tasks" / "frames" / "video_cls" / "SSv2"
    folder = copied / "video-tasks" / "frames" / "video_mret" / "QVHighlight" / "a.b"
    for name, video in (("query", "52375"), ("positive_1.0", "152162"), ("negative_2", "23212")):
        shutil.copytree(source / video, folder / name)
    table = copied / "annotations" / "VLM2Vec" / "QVHighlight" / "default" / "test.parquet"
    table.parent.mkdir(parents=True)
    pq.write_table(pa.table({"query": ["it falls"], "video_path": ["x/a.b.mp4"]}), table)
    task = make("QVHighlight")
    data = task.retrieval_data(task.hf_subsets[0], "test")
    base = "video-tasks/frames/video_mret/QVHighlight/a.b"
    assert data.candidates == {"0": [f"{base}/negative_2", f"{base}/positive_1.0"]}
    assert data.relevant == {"0": {f"{base}/positive_1.0"}}
    shutil.copytree(folder / "positive_1.0", folder / "positive_2.0")
    _expect("QVHighlight", r"row 0: .*a.b has 2 folders positive\*, expected one")
    shutil.rmtree(folder / "positive_1.0")
    shutil.rmtree(folder / "positive_2.0")
    _expect("QVHighlight", r"a.b has 0 folders positive\*")


def test_changed_frames_are_other_data(copied: Path) -> None:
    before = make("SmthSmthV2").metadata.revision
    frames = copied / "video-tasks" / "frames" / "video_cls" / "SSv2" / "85836"
    (frames / "frame_0013.jpg").write_bytes((frames / "frame_0001.jpg").read_bytes())
    assert make("SmthSmthV2").metadata.revision != before


class Foreign:
    """A video model of others: mean color and change of the frames that mteb's collator gives it."""

    mteb_model_meta = mteb.get_model_meta("mteb/baseline-random-encoder").model_copy(
        update={"modalities": ["text", "image", "video"]}
    )

    def __init__(self, collator: Any) -> None:
        self.collator, self.shapes, self.texts = collator, [], []

    def encode(self, inputs: Any, **kwargs: Any) -> np.ndarray:
        rows: list[list[float]] = []
        if "video" in inputs.dataset.column_names:
            inputs.collate_fn = self.collator
        for batch in inputs:
            size = len(next(iter(batch.values())))
            self.texts += batch.get("text", [])
            for index in range(size):
                video = batch["video"][index] if "video" in batch else None
                if video is None:
                    rows.append([len(batch["text"][index]), 1, 2, 3])
                    continue
                self.shapes.append(tuple(video.shape))
                rows.append([*video.float().mean((0, 2, 3)).tolist(), float(video[0].float().std())])
        return np.array(rows, np.float32)

    def similarity(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.asarray(first) @ np.asarray(second).T

    similarity_pairwise = similarity


@pytest.mark.parametrize("key", ["SmthSmthV2", "MomentSeeker"])
@pytest.mark.parametrize(
    "collator", [FramesCollator(num_frames=4), VideoCollator(target_sampling_rate=1, fps=2.0, max_frames=64)]
)
def test_foreign_models_run_through_the_collators(copied: Path, key: str, collator: Any) -> None:
    model = Foreign(collator)
    result = mteb.evaluate(model, make(key), cache=None)
    assert 0 <= result.task_results[0].scores["test"][0]["main_score"] <= 1
    counts = {shape[0] for shape in model.shapes}
    assert counts == {4} if isinstance(collator, FramesCollator) else max(counts) >= 8
    assert not any("<|video" in text or text.startswith("Find the clip") for text in model.texts)


def test_frames_as_a_decoder(copied: Path) -> None:
    reader = FrameReader(VideoRef.of_folder(copied / "video-tasks" / "frames" / "video_cls" / "SSv2" / "52375"))
    assert len(reader) == reader.metadata.num_frames == 8 and reader[0].shape[0] == 3
    assert reader.get_frames_in_range(0, 8, 2).data.shape[0] == 4 and len(list(reader)) == 8
    assert FrameReader(None).get_frames_at([0]).data.sum() == 0


def test_a_model_without_video_is_refused(copied: Path, converted: Any) -> None:
    model = SentenceTransformer(str(converted("llava-1.6")), device="cpu")
    with pytest.raises(ValueError, match="video"):
        mteb.evaluate(wrap(model, "unime/still"), make("SmthSmthV2"), cache=None)


def test_embeddings_are_remembered(copied: Path, golden_model: SentenceTransformer, tmp_path: Path) -> None:
    first = UniMELoader("unime/a", "1", model=golden_model, cache_folder=tmp_path / "embeddings")
    row = mteb.evaluate(first, make("MomentSeeker"), cache=None).task_results[0].scores["test"][0]
    second = UniMELoader("unime/a", "1", model=golden_model, cache_folder=tmp_path / "embeddings")
    second.model = golden_model
    before = len(second.store)
    assert mteb.evaluate(second, make("MomentSeeker"), cache=None).task_results[0].scores["test"][0] == row
    assert len(second.store) == before


def test_the_overall_score_of_all_78_tasks() -> None:
    """Video tasks name their frames in the profile; they belong to the profile of the other tasks."""
    scores = {
        task.task_name: {"a": {"main_score": 0.5, "profile": "vlm2vec-8" if task.modality == "Video" else "vlm2vec"}}
        for task in LEADERBOARD
    }
    assert profiles_of(scores) == ["vlm2vec"]
    rows = {row.name: row for row in compared_rows(scores, "vlm2vec")}
    assert rows["MMEB-V2 Overall"].score == 50.0 and "MMEB-V2 Video MRET" in rows


class ForeignVideo(ForeignRetrieval):
    """Queries are videos, documents texts, as in mteb's own tasks."""

    metadata = ForeignRetrieval.metadata.model_copy(update={"category": "v2t", "modalities": ["text", "video"]})

    def __init__(self, folders: list[Path]) -> None:
        super().__init__()
        self.videos = [VideoRef.of_folder(folder) for folder in folders]

    def load_data(self, *args: object, **kwargs: object) -> None:
        super().load_data()
        features = Features({"id": Value("string"), "video": VideoFeature()})
        rows = {"id": ["q0", "q1"], "video": list(map(stored_video, self.videos))}
        self.dataset["default"]["test"]["queries"] = Dataset.from_dict(rows, features=features)


def test_videos_of_other_tasks_are_embedded(copied: Path, golden_model: SentenceTransformer, tmp_path: Path) -> None:
    """They come as decoders, and were once taken for empty texts."""
    frames = copied / "video-tasks" / "frames" / "video_cls" / "SSv2"
    task = ForeignVideo(sorted(frames.iterdir())[:2])
    mteb.evaluate(wrap(golden_model, "unime/golden"), task, cache=None, prediction_folder=tmp_path)
    (saved,) = tmp_path.rglob("*_predictions.json")
    found = json.loads(saved.read_text())["default"]["test"]
    documents = golden_model.encode(["a red circle", "a blue star", "the ring on the left"])
    queries = encode_list(golden_model, [Item(video=video) for video in task.videos])
    expected = golden_model.similarity(queries, documents).tolist()
    for number, row in enumerate(expected):
        assert [found[f"q{number}"][f"d{index}"] for index in range(3)] == pytest.approx(row, abs=1e-5)


def test_models_that_take_videos_need_no_packages_for_videos() -> None:
    meta = model_meta("unime/x", "1", modalities=["text", "image", "video"])
    copies = (meta, pickle.loads(pickle.dumps(meta)), meta.model_copy(update={"revision": "2"}))
    assert all("video" not in copy._resolve_extras_groups() for copy in copies)
    assert ModelMeta.model_validate(meta.to_dict() | {"loader": None}) == meta
