"""Training on video pairs: every way of embedding a batch gives one result, and judged rows train all stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unime_st import Item, UniME, stages
from unime_st.data import PairRecord, RecordSet
from unime_st.training.item_tokens import UNREADABLE, item_costs


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
