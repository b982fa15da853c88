"""Vision cache and frozen tower: same features, gradients and loss curves with stored visual tokens as without."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_stage import with_judged_negatives

from unime_st import stages
from unime_st.backbones import visual_outputs
from unime_st.data.images import ImageRef
from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.losses import HardNegativeRankingLoss
from unime_st.model import UniME
from unime_st.training.adapters import choose_trainable
from unime_st.training.distinct_items import DistinctItemsLoss, ItemCollator
from unime_st.training.feature_store import FeatureStore
from unime_st.training.feed import Feed, ItemFeatures
from unime_st.training.frozen_tower import FrozenTowerCache
from unime_st.training.item_errors import ItemError
from unime_st.training.item_tokens import item_costs
from unime_st.training.mini_batches import MiniBatches
from unime_st.training.vision_cache import VisionCache, media_keys
from unime_st.training.visual_tokens import VISUAL_TOKENS, check_frozen

SMALL = {
    "model": "unime-tiny",
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "max_steps": 4,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Judged records of all modalities; two passes over them are four steps."""
    pairs = list(training_records(16, seed=4))
    judged = with_judged_negatives(pairs)
    return str(RecordSet.write(tmp_path_factory.mktemp("rows") / "rows", judged, {}).folder)


def _items() -> list[Item]:
    """Texts, images of several shapes, and one image with two texts."""
    found = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(
            0, 255, (40 + 25 * number, 110 - 20 * number, 3), dtype=np.uint8
        )
        image = Image.fromarray(pixels)
        found += [Item("word " * number + "?"), Item(image=image), Item(f"what is {number}", image)]
    return [*found, Item("another text", found[-1].image), Item("the end")]


def _curve(folder: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


FAMILY_NAMES = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-1.6", "llava-onevision"]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_has_the_loss_and_the_gradients_of_its_vision_tower(
    tmp_path: Path, converted: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = _items()
    records = RecordSet.write(
        tmp_path / "records", [PairRecord(items[n], items[-1 - n]) for n in range(len(items) // 2)], {}
    )
    model = UniME(converted(family), device="cpu")
    choose_trainable(model, stages.InBatchArguments(lora_rank=4, lora_dropout=0.1))
    for name, weight in model.named_parameters():  # an adapter that does nothing yet passes no gradient on
        if "lora_B" in name:
            weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    costs, pixels = item_costs(records, model)
    collate = ItemCollator(model.preprocess, records=records, mini_batches=MiniBatches(costs, size=4), lazy=True)
    batch = collate([{"query": row["query"], "positive": row["positive"]} for row in records.row_shards.rows()])
    batch = {name.removeprefix("bucket0_"): value for name, value in batch.items()}

    def run(feed: Feed, once: FrozenTowerCache | None = None) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(3)
        inner = HardNegativeRankingLoss(model, 0.5, 1.0, num_negatives=3)
        loss = DistinctItemsLoss(inner, feed, frozen_tower=once)([dict(batch)])
        loss.backward()
        return loss.item(), {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}

    plain = Feed(ItemFeatures(records, model.preprocess))
    expected, wanted = run(plain)
    keys = media_keys(records, np.arange(len(records.items)))
    cache = VisionCache(model, records, keys, tmp_path / "cache", torch.float32)
    cache.fill(model, costs, pixels)
    assert len(set(keys[0]) - {b""}) == 4  # of nine items with an image

    def check(found: float, gradients: dict[str, torch.Tensor]) -> None:
        assert found == pytest.approx(expected, rel=1e-5) and gradients.keys() == wanted.keys()
        scale = max(float(gradient.abs().max()) for gradient in wanted.values())
        assert max(float((gradients[n] - wanted[n]).abs().max()) for n in wanted) < 1e-5 * scale

    base = model.transformers_model.base_model
    with monkeypatch.context() as patch:
        looked: list[int] = []
        original = base.get_image_features
        count = wraps(original)(lambda *args, **kwargs: looked.append(1) or original(*args, **kwargs))
        patch.setattr(base, "get_image_features", count)
        once, passes = FrozenTowerCache(model, torch.float32), []
        for once.max_bytes in (1 << 20, 2000, 0):  # in memory, in memory and on disk, on disk
            check(*run(plain, once))
            passes.append(len(looked))
            looked.clear()
        with monkeypatch.context() as few:
            few.setattr(visual_outputs, "_CPU_PATCHES", 1)
            check(*run(plain, once))
        one_by_one = sum(key != b"" for key in keys[0]) if "qwen" in family else passes[0]
        assert len(looked) == one_by_one
        looked.clear()
        patch.setattr(tempfile, "TemporaryFile", partial(open, "/dev/full", "r+b"))
        once = FrozenTowerCache(model, torch.float32)
        once.max_bytes = 0
        for _ in range(2):
            check(*run(plain, once))
            passes.append(len(looked))
            looked.clear()
        # Where the tokens cannot be stored, every mini-batch passes the tower twice, except the one whose graph is kept.
        assert passes == [passes[0]] * 3 + [2 * passes[0] - 1] * 2

    positions = list(range(len(records.items)))
    stored = Feed(ItemFeatures(records, cache.preprocess, cache.open_item))
    (before,) = plain.stream([positions], torch.device("cpu"))
    (after,) = stored.stream([positions], torch.device("cpu"))
    assert before.keys() - after.keys() == {"pixel_values"} and after.keys() - before.keys() == {VISUAL_TOKENS}
    for name in before.keys() & after.keys() - {"modality"}:
        assert torch.equal(before[name], after[name]), name

    model.transformers_model.base_model.get_image_features = None  # nobody may call it
    check(*run(stored))


@pytest.mark.parametrize("stage", ["in_batch", "soft_labels"])
@pytest.mark.slow
def test_a_run_has_the_curve_of_the_run_without_cache(
    rows: str, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes over the data, with dropout in the adapter; the next run decodes nothing at all."""
    kind, train, own = {
        "in_batch": (
            stages.InBatchArguments,
            stages.train_in_batch,
            {"mini_batch_size": 5, "dataloader_num_workers": 2},
        ),
        "soft_labels": (stages.SoftLabelArguments, stages.train_soft_labels, {"num_negatives": 2}),
    }[stage]
    common = {**SMALL, **own, "data": rows}
    cache = str(tmp_path / "cache")
    plain = train(kind(**common, output=str(tmp_path / "plain")))
    first = train(kind(**common, output=str(tmp_path / "first"), vision_cache=cache))
    made = {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*.safetensors")}
    monkeypatch.setattr(ImageRef, "open", lambda *args, **kwargs: pytest.fail("an image was decoded"))
    second = train(kind(**common, output=str(tmp_path / "second"), vision_cache=cache))
    assert len(_curve(plain)) == 4
    for folder in (first, second):
        assert np.allclose(_curve(folder), _curve(plain), rtol=1e-5, atol=0)
    weights = [load_file(folder / "model.safetensors") for folder in (plain, second)]
    assert all(torch.allclose(weights[1][name], weight, atol=1e-6) for name, weight in weights[0].items())
    assert made == {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*.safetensors")}
    assert "images" in json.loads((first / "manifest.json").read_text())["plan"]["vision_cache"]


@pytest.mark.slow
def test_a_tower_that_is_trained_is_refused(rows: str, tmp_path: Path) -> None:
    common = {**SMALL, "data": rows, "output": str(tmp_path / "out"), "vision_cache": str(tmp_path / "cache")}
    for own in ({"lora_targets": r".*\.(q_proj|qkv)"}, {"lora_rank": 0}, {"lora_rank": 0, "frozen": "visual.blocks"}):
        with pytest.raises(ValueError, match=r"vision_cache needs a frozen vision tower and projector.*visual"):
            stages.train_in_batch(stages.InBatchArguments(**common, **own, overwrite=True))
    with pytest.raises(ValueError, match=r"vision_cache .* leave it out"):
        stages.RerankerArguments(vision_cache="anywhere")
    assert not (tmp_path / "cache").exists()
    stages.train_in_batch(stages.InBatchArguments(**common, lora_rank=0, frozen="visual", overwrite=True))


@pytest.mark.parametrize("family", ["internvl3", "phi3.5-v"])
def test_other_families_are_refused(converted: Callable[[str], Path], family: str) -> None:
    model = UniME(converted(family), device="cpu")
    with pytest.raises(ValueError, match="vision_cache supports qwen2_vl"):
        check_frozen(model.requires_grad_(False))


def test_random_towers_are_refused() -> None:
    model = UniME("unime-tiny", device="cpu").requires_grad_(False)
    next(m for n, m in model.named_modules() if n.endswith("visual.blocks.0")).drop = torch.nn.Dropout(0.1)
    with pytest.raises(ValueError, match=r"without dropout, but visual.blocks.0.drop"):
        check_frozen(model)


def test_another_tower_does_not_see_these_tokens(rows: str, tmp_path: Path) -> None:
    records = RecordSet.load(rows)
    keys = media_keys(records, np.arange(len(records.items)))
    model = UniME("unime-tiny", device="cpu").requires_grad_(False)

    def folder() -> Path:
        return VisionCache(model, records, keys, tmp_path, torch.float32).store.folder

    first = folder()
    weights = dict(model.named_parameters())
    next(weight for name, weight in weights.items() if "language_model" in name).add_(1)
    assert folder() == first  # a later stage, or another seed of the adapter
    next(weight for name, weight in weights.items() if "visual" in name).add_(1)
    second = folder()
    model.processor.image_processor.image_mean = (0.5, 0.5, 0.5)
    assert len({first, second, folder()}) == 3
    assert json.loads((first / "made_by.json").read_text())["family"] == "qwen2_vl"


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    rows: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = {**SMALL, "data": rows, "output": str(tmp_path / "out"), "vision_cache": str(tmp_path / "cache")}
    with caplog.at_level("INFO", logger="unime_st"):
        stages.train_in_batch(stages.InBatchArguments(**common, dry_run=True))
    assert "vision cache   at most 0.00 GiB" in caplog.text and not list(tmp_path.iterdir())


def test_shards_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path)
    monkeypatch.setattr("unime_st.training.feature_store._SHARD_BYTES", 3 * 4 * 10)
    tensors = {f"k{number}": torch.full((1, 10), float(number)) for number in range(8)}
    for key, tensor in tensors.items():
        store.add(key, {"tokens": tensor, "image_sizes": torch.tensor([[1, 2]])})
    other = FeatureStore(tmp_path)  # as after a kill: what was not flushed is missing
    missing = other.missing(np.array(list(tensors), "S"))
    assert 0 < missing.sum() < 8 and len(list(tmp_path.iterdir())) > 1
    with monkeypatch.context() as full:
        full.setattr("unime_st.files.commit_file", lambda *paths, **_options: (_ for _ in ()).throw(OSError(28, "no")))
        with pytest.raises(OSError, match=r"could not be written .*no.*; the shards before it are whole"):
            store.flush()
    assert not list(tmp_path.glob("*.tmp"))
    for key in np.array(list(tensors))[missing].tolist():  # the next run makes it again
        other.add(key, {"tokens": tensors[key], "image_sizes": torch.tensor([[1, 2]])})
    other.flush()
    other.refresh()
    for key, tensor in tensors.items():
        assert torch.equal(other.read(key)["tokens"], tensor) and other.read(key)["image_sizes"].tolist() == [[1, 2]]
    with pytest.raises(KeyError, match="absent is not in"):
        other.read("absent")
    (tmp_path / "bad.safetensors").write_bytes(b"no shard")
    with pytest.raises(ValueError, match=r"bad.safetensors is damaged .* remove it"):
        FeatureStore(tmp_path)


def _write_for_ever(folder: Path) -> None:
    store = FeatureStore(folder)
    for number in itertools.count():
        store.add(f"k{number}", {"tokens": torch.full((1, 1000), float(number))})
        if number % 3 == 2:
            store.flush()


def test_a_killed_writer_leaves_whole_shards(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(tmp_path,))
    writer.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(tmp_path.glob("*.safetensors"))) < 3:
        time.sleep(0.002)
    writer.kill()
    writer.join()
    store = FeatureStore(tmp_path)
    count = 3 * len(list(tmp_path.glob("*.safetensors")))
    assert count >= 9 and not store.missing(np.array([f"k{number}" for number in range(count)], "S")).any()
    assert all(float(store.read(f"k{number}")["tokens"][0, -1]) == number for number in range(count))


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    """Its header is fine, so nothing has set it aside."""
    image = Item(image=Image.new("RGB", (40, 40), "red")).image
    assert image is not None
    broken = tmp_path / "broken.png"
    broken.write_bytes(image.read()[:60])
    pairs = [PairRecord(Item(f"image {n}"), Item(image=broken if n == 3 else image)) for n in range(8)]
    records = RecordSet.write(tmp_path / "records", pairs, {})
    common = {**SMALL, "data": str(records.folder), "vision_cache": str(tmp_path / "cache")}
    with pytest.raises(ItemError, match=r"records, row 3, dataset '', positive: <60 bytes"):
        stages.train_in_batch(stages.InBatchArguments(**common, output=str(tmp_path / "out")))
