"""Training stages on a pretended CUDA device: no operator mixes devices, and the loss curve is that of the CPU."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretended_devices import REAL_CARD, equal_dropout, on_both, pretended_devices
from small_stage import with_judged_negatives
from tiny_pairs import ITEMS

from unime_st import Item, UniME, stages
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.training import embedders, rerankers
from unime_st.training.feed import Feed, ItemFeatures
from unime_st.training.frozen_tower import FrozenTowerCache
from unime_st.training.item_errors import ItemError

CLIP = [Image.fromarray(f) for f in np.random.default_rng(0).integers(0, 255, (3, 40, 56, 3), dtype=np.uint8)]
VIDEOS = [Item(text, video=CLIP) for text in ("a red circle", "blue")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Judged records of texts, images and videos."""
    pairs = list(training_records(6, seed=4))
    judged = with_judged_negatives(pairs)
    judged += [
        PairRecord(video, Item(f"clip {number}"), "", (ITEMS[0], ITEMS[1]), 2.0, (-1.0, 0.5))
        for number, video in enumerate(VIDEOS)
    ]
    return str(RecordSet.write(tmp_path_factory.mktemp("rows") / "rows", judged, {}).folder)


EMBEDDER_RUNS: dict[str, dict[str, Any]] = {
    "fp32, dropout": {"mini_batch_size": 3, "lora_dropout": equal_dropout(0.1)},
    "bf16, vision cache": {"mini_batch_size": 3, "bf16": True, "vision_cache": "cache"},
    "fp16": {"mini_batch_size": 3, "fp16": True},
    "token budget, Matryoshka": {"token_budget": "auto", "matryoshka_dims": [128, 32]},
    "spilled": {"mini_batch_size": 3},
    "prepared items, checkpointing": {
        **{"item_cache": 64, "gradient_caching": False, "mini_batch_size": 3, "gradient_checkpointing": True},
    },
    "all weights, Muon": {"lora_rank": 0, "frozen": "visual", "optim": "muon", "mini_batch_size": 4},
}


def _curve(folder: Path, *, norms: bool = True) -> list[list[float]]:
    text = (folder / "log.jsonl").read_text()
    assert "NaN" not in text and (folder / "manifest.json").is_file()
    lines = [json.loads(line) for line in text.splitlines()]
    return [[line["loss"], line["grad_norm"]] if norms else [line["loss"]] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDER_RUNS)
def test_embedder_stages(rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Two steps of the trainer; the loss curve is that of the CPU."""
    monkeypatch.setattr(embedders, "peak_matmul_flops", lambda *given: 1e12)  # matrices that suit a card
    if name == "spilled":
        created = FrozenTowerCache.__init__
        monkeypatch.setattr(
            FrozenTowerCache,
            "__init__",
            lambda self, *given: (created(self, *given), setattr(self, "max_bytes", 0))[0],
        )
    chosen = {**EMBEDDER_RUNS[name]}
    common = {
        "model": "unime-tiny",
        "data": rows,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
    }
    common |= {"lora_dropout": 0.0, "learning_rate": 1e-3}

    def run(device: str) -> list[list[float]]:
        options = {**common, **chosen, "output": str(tmp_path / device), "use_cpu": device == "cpu"}
        if "vision_cache" in options:
            options["vision_cache"] = str(tmp_path / f"{device} cache")
        if options.get("fp16") and device == "cpu":
            options["fp16"] = False  # needs a card
        stages.train_in_batch(stages.InBatchArguments(**options))
        return _curve(tmp_path / device, norms=name != "fp16")  # the scale of fp16 first overflows, as on a card

    # A card rounds 16-bit products otherwise than a CPU.
    on_both(run, {"fp16": 5e-2, "bf16, vision cache": 5e-2 if REAL_CARD else 1e-3}.get(name, 1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["hard_negatives", "soft_labels", "reranker"])
def test_other_stages(rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.setattr(embedders, "peak_matmul_flops", lambda *given: 1e12)
    monkeypatch.setattr(rerankers, "peak_matmul_flops", lambda *given: 1e12)
    kind, train, own = {
        "hard_negatives": (stages.HardNegativeArguments, stages.train_hard_negatives, {"mini_batch_size": 3}),
        "soft_labels": (stages.SoftLabelArguments, stages.train_soft_labels, {"num_negatives": 2}),
        "reranker": (stages.RerankerArguments, stages.train_reranker, {"template": "tiny", "num_negatives": 2}),
    }[stage]
    common: dict[str, Any] = {"model": "unime-tiny", "data": rows, "per_device_train_batch_size": 4, "max_steps": 2}
    common |= {"logging_steps": 1, "lora_dropout": 0.0, **own}

    def run(device: str) -> list[list[float]]:
        train(kind(**common, output=str(tmp_path / device), use_cpu=device == "cpu"))
        return _curve(tmp_path / device)

    on_both(run, 1e-4)


def test_threads_prepare_mini_batches_in_order_and_ahead() -> None:
    """Also those of the next batch; each once, an error where it is due, and a feed that was left halfway goes on."""
    begun, released = [], threading.Event()

    def prepare(positions: list[int]) -> dict[str, torch.Tensor]:
        begun.append(positions)
        if positions == [7]:
            raise ValueError("item 7")
        if positions == [5, 6]:
            released.set()
        return {"input_ids": torch.tensor(positions)}

    with nullcontext() if REAL_CARD else pretended_devices():
        feed, device = Feed(prepare, threads=2), torch.device("cuda", 0)
        feed.expect([[5, 6], [7]])
        seen = []
        for features in feed.stream([[0], [1, 2], [3], [4]], device):
            assert features["input_ids"].device.type == "cuda" and len(begun) <= len(seen) + 4
            seen.append(features["input_ids"].tolist())
        assert released.wait(60) and seen == [[0], [1, 2], [3], [4]]
        stream = feed.stream([[5, 6], [7], [8]], device)
        assert next(stream)["input_ids"].tolist() == [5, 6]
        with pytest.raises(ValueError, match="item 7"):
            next(stream)
        assert [features["input_ids"].tolist() for features in feed.stream([[9], [5, 6]], device)] == [[9], [5, 6]]
        assert begun.count([5, 6]) == 2 and begun.count([0]) == 1


@pytest.mark.parametrize("end", ["all", "some", "error"])
def test_threads_release_the_next_batch_if_this_one_ends_early(end: str) -> None:
    """What was begun for the next batch is used if this one is complete, and prepared again if it is not."""
    begun, prepared = [], threading.Event()

    def prepare(positions: list[int]) -> dict[str, torch.Tensor]:
        begun.append(positions)
        if positions == [1] and end == "error":
            raise ValueError("item 1")
        if positions == [5]:
            prepared.set()
        return {"input_ids": torch.tensor(positions)}

    with nullcontext() if REAL_CARD else pretended_devices():
        feed, device = Feed(prepare, threads=2), torch.device("cuda", 0)
        feed.expect([[5]])
        stream = feed.stream([[0], [1]], device)
        next(stream)
        assert prepared.wait(60)
        if end == "error":
            with pytest.raises(ValueError, match="item 1"):
                next(stream)
        elif end == "all":
            next(stream)
        del stream  # which closes the generator
        assert [features["input_ids"].tolist() for features in feed.stream([[5]], device)] == [[5]]
        assert begun.count([5]) == (1 if end == "all" else 2)


def test_threads_name_the_item_that_cannot_be_decoded(tmp_path: Path) -> None:
    image = Item(image=Image.new("RGB", (40, 40), "red")).image
    assert image is not None
    (tmp_path / "broken.png").write_bytes(image.read()[:60])
    pair = PairRecord(Item("a red square"), Item(image=tmp_path / "broken.png"))
    records = RecordSet.write(tmp_path / "records", [pair], {})
    features = ItemFeatures(records, UniME("unime-tiny", device="cpu").preprocess)
    (broken,) = (index for index in range(features.count) if features.item(index).image is not None)
    with nullcontext() if REAL_CARD else pretended_devices():
        stream = Feed(features, threads=2).stream([[1 - broken], [broken]], torch.device("cuda", 0))
        next(stream)
        with pytest.raises(ItemError, match=r"records, row 0, dataset '', positive: .* cannot be decoded"):
            next(stream)
