"""Training on video pairs: every way of embedding a batch gives one result, and judged rows train all stages."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unime_st import Item, UniME, stages
from unime_st.data import PairRecord, RecordSet, VideoRef
from unime_st.encoding.model_inputs import Features
from unime_st.training.adapters import choose_trainable
from unime_st.training.feed import Feed, ItemFeatures
from unime_st.training.item_tokens import UNREADABLE, item_costs, stacked_frames
from unime_st.training.mini_batches import MiniBatches
from unime_st.training.vision_cache import VisionCache, media_keys
from unime_st.training.visual_tokens import VIDEO_TOKENS, VISUAL_TOKENS


def clip(count: int, seed: int = 0, size: tuple[int, int] = (40, 56)) -> list[Image.Image]:
    values = np.random.default_rng(seed).integers(0, 255, (count, *size, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in values]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RecordSet:
    """Judged pairs of videos of unequal length and size, an image, and both at once."""
    queries = [Item(f"what {seed}?", video=clip(2 + seed % 2, seed, (40, 56 + seed))) for seed in range(6)]
    queries += [Item("an image", image=clip(1, 9)[0]), Item("both", image=clip(1, 8)[0], video=clip(2, 8))]
    pairs = [
        PairRecord(
            query,
            Item(f"answer {index}") if index % 2 else Item(video=clip(3, 50 + index)),
            negatives=(Item(f"wrong {index}"), Item(video=clip(2, 100 + index))),
            positive_logit=2.0,
            negative_logits=(-1.0, -2.0),
        )
        for index, query in enumerate(queries)
    ]
    return RecordSet.write(tmp_path_factory.mktemp("videos") / "records", pairs, {})


def options(records: RecordSet, output: Path, **given: Any) -> dict[str, Any]:
    fixed = {"model": "unime-tiny", "max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
    return {**fixed, "data": str(records.folder), "output": str(output), "use_cpu": True, **given}


def test_costs_count_frames(records: RecordSet) -> None:
    model = UniME("unime-tiny", device="cpu")
    tokens, pixels = item_costs(records, model)
    for item, cost in zip(records.items, tokens, strict=True):
        assert abs(int(model.preprocess([item])["attention_mask"].sum()) - cost) <= 4
    videos = [item.video is not None for item in records.items]
    assert (pixels[videos] >= 2 * 40 * 56).all()


def test_unreadable_videos_are_set_aside(tmp_path: Path) -> None:
    for number in range(2):
        clip(1, number, (40, 56 + number))[0].save(tmp_path / f"{number}.png")
    uneven = Item(video=[tmp_path / "0.png", tmp_path / "1.png"])
    pairs = [PairRecord(uneven, Item("a")), *(PairRecord(Item(f"q{n}"), Item(f"p{n}")) for n in range(4))]
    records = RecordSet.write(tmp_path / "records", pairs, {}, image_root=tmp_path)
    assert item_costs(records, UniME("unime-tiny", device="cpu"))[0][0] == UNREADABLE
    given = options(records, tmp_path / "model", max_steps=1, per_device_train_batch_size=4)
    stages.train_in_batch(stages.InBatchArguments(**given))
    (line,) = (tmp_path / "model" / "rejected.jsonl").read_text().splitlines()
    assert "VideoRef" in json.loads(line)["reason"]


FAMILY_NAMES = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-onevision"]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_vision_cache_keeps_videos(
    records: RecordSet, tmp_path: Path, converted: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same features, loss and gradients from visual tokens on disk, with no frame decoded and no vision tower."""
    model = UniME(converted(family), device="cpu").train()
    choose_trainable(model, stages.InBatchArguments(lora_rank=4, lora_dropout=0.0))
    costs, pixels = item_costs(records, model)
    frames, positions = stacked_frames(records, model), np.arange(len(records.items))
    assert (frames is None) == (family != "llava-onevision")
    groups = [group.tolist() for group in MiniBatches(costs, budget=400, frames=frames)(positions)]
    for group in groups:
        assert len({len(v.frames) for p in group if (v := records.items.at(p).video)}) <= 1 or frames is None

    def run(feed: Feed) -> tuple[list[Features], torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        batches = list(feed.stream(groups, torch.device("cpu")))
        vectors = torch.cat([model(dict(features))["sentence_embedding"] for features in batches])
        (vectors @ vectors.T).softmax(1).diagonal().log().sum().backward()
        return batches, vectors.detach(), [w.grad.clone() for w in model.parameters() if w.grad is not None]

    expected = run(Feed(ItemFeatures(records, model.preprocess)))
    cache = VisionCache(model, records, media_keys(records, positions), tmp_path, torch.float32)
    cache.fill(model, costs, pixels)
    assert str(cache).startswith("2 images, 19 videos; ")
    with monkeypatch.context() as patch:
        base = model.transformers_model.base_model
        patch.setattr(base, "get_video_features", None)
        patch.setattr(base, "get_image_features", None)
        patch.setattr(VideoRef, "open", lambda video: pytest.fail("a video was decoded"))
        found = run(Feed(ItemFeatures(records, cache.preprocess, cache.open_item)))
    for before, after in zip(expected[0], found[0], strict=True):
        assert before.keys() - after.keys() <= {"pixel_values", "pixel_values_videos"}
        assert after.keys() - before.keys() <= {VISUAL_TOKENS, VIDEO_TOKENS}
        for name in before.keys() & after.keys() - {"modality"}:
            same = torch.equal if isinstance(before[name], torch.Tensor) else operator.eq
            assert same(before[name], after[name]), name
    assert torch.allclose(found[1], expected[1], atol=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in expected[2])
    assert max(float((a - b).abs().max()) for a, b in zip(found[2], expected[2], strict=True)) < 1e-5 * scale
    assert not VisionCache(model, records, cache.keys, tmp_path, torch.float32)._missing(cache.keys[1]).size


@pytest.mark.slow
def test_llava_trains_on_videos_of_unequal_length(
    records: RecordSet, tmp_path: Path, converted: Callable[[str], Path]
) -> None:
    for name, way in {"whole": {}, "budget": {"token_budget": 300}}.items():
        given = options(records, tmp_path / name, model=str(converted("llava-onevision")), max_steps=1, **way)
        folder = stages.train_in_batch(stages.InBatchArguments(**given))
        assert math.isfinite(json.loads((folder / "log.jsonl").read_text().splitlines()[0])["loss"])


@pytest.mark.slow
def test_all_ways_of_embedding_a_batch_agree(records: RecordSet, tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "whole": {},
        "budget": {"token_budget": 120},
        "items": {"mini_batch_size": 3, "dataloader_num_workers": 1},
        "vision cache": {"token_budget": 120, "vision_cache": str(tmp_path / "cache")},
    }
    items = list(records.items)
    vectors = {}
    for name, way in ways.items():
        given = options(records, tmp_path / name, lora_dropout=0.0, **way)
        folder = stages.train_in_batch(stages.InBatchArguments(**given))
        vectors[name] = UniME(folder, device="cpu").encode(items)
    assert np.abs(vectors["whole"] - UniME("unime-tiny", device="cpu").encode(items)).max() > 1e-3
    for found in vectors.values():
        assert np.abs(found - vectors["whole"]).max() < 1e-4


@pytest.mark.slow
def test_mined_and_judged_videos_train_every_stage(records: RecordSet, tmp_path: Path) -> None:
    pools, rows = tmp_path / "pools", tmp_path / "rows"
    mining = stages.MineArguments(
        data=str(records.folder), output=str(pools), num_candidates=4, max_similarity="none", pool="global"
    )
    stages.run_mine(mining)
    judging = stages.JudgeArguments(
        data=str(pools), scores=str(tmp_path / "scores"), output=str(rows), num_negatives=2, stride=1, margin=20.0
    )
    stages.run_judge(judging)
    judged = RecordSet.load(rows)
    assert len(judged) == 8 and any(item.video is not None for row in judged for item in row.negatives)
    given = options(judged, tmp_path / "soft", num_negatives=2, max_steps=1, per_device_train_batch_size=4)
    assert stages.train_soft_labels(stages.SoftLabelArguments(**given)).is_dir()
    assert stages.train_reranker(stages.RerankerArguments(**{**given, "output": str(tmp_path / "reranker")})).is_dir()
