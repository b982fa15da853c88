"""Prepared items: the same features, losses, gradients and curves as preparing every item anew, within the bound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_stage import losses

from unime_st import stages
from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.losses import HardNegativeRankingLoss
from unime_st.model import UniME
from unime_st.options import OptionError
from unime_st.training.adapters import choose_trainable
from unime_st.training.distinct_items import DistinctItemsLoss, ItemCollator
from unime_st.training.feed import Feed, ItemFeatures
from unime_st.training.item_tokens import item_costs
from unime_st.training.mini_batches import MiniBatches
from unime_st.training.prepared_items import PreparedItems
from unime_st.training.vision_cache import VisionCache, media_keys
from unime_st.training.visual_tokens import VISUAL_TOKENS

LARGE = 64 << 20
FAMILIES = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]


def _items() -> list[Item]:
    """Texts, images of several shapes, and one image with two texts."""
    found = []
    for number in range(4):
        shape = (40 + 25 * number, 110 - 20 * number, 3)
        image = Image.fromarray(np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8))
        found += [Item("word " * number + "?"), Item(image=image), Item(f"what is {number}", image)]
    return [*found, Item("another text", found[-1].image), Item("the end")]


@pytest.fixture
def records(tmp_path: Path) -> RecordSet:
    items = _items()
    pairs = [PairRecord(items[n], items[-1 - n]) for n in range(len(items) // 2)]
    return RecordSet.write(tmp_path / "records", pairs, {})


def _loss(
    model: UniME, records: RecordSet, kept: PreparedItems | None, *, lazy: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    costs, _ = item_costs(records, model)
    collate = ItemCollator(
        model.preprocess, records=records, mini_batches=MiniBatches(costs, size=4), lazy=lazy, prepare=kept
    )
    batch = collate([{"query": row["query"], "positive": row["positive"]} for row in records.row_shards.rows()])
    buckets: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in batch.items():
        bucket, _, feature = name.partition("_")
        buckets.setdefault(bucket, {})[feature] = value
    model.zero_grad()
    torch.manual_seed(3)
    inner = HardNegativeRankingLoss(model, 0.5, 1.0, num_negatives=3)
    feed = Feed(kept or ItemFeatures(records, model.preprocess)) if lazy else None
    loss = DistinctItemsLoss(inner, feed)(list(buckets.values()))
    loss.backward()
    return loss.item(), {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen tower", "trained tower"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_items_prepared_anew(
    records: RecordSet, converted: Callable[[str], Path], family: str, frozen: bool
) -> None:
    model = UniME(converted(family), device="cpu")
    choose_trainable(model, stages.InBatchArguments(lora_rank=0, frozen="visual" if frozen else None))
    kept = PreparedItems(model, ItemFeatures(records, model.preprocess), LARGE)
    assert kept.usable
    for lazy in (True, False):
        expected, wanted = _loss(model, records, None, lazy=lazy)
        for _ in range(2):
            found, gradients = _loss(model, records, kept, lazy=lazy)
            assert found == pytest.approx(expected, rel=1e-5) and gradients.keys() == wanted.keys()
            scale = max(float(gradient.abs().max()) for gradient in wanted.values())
            assert max(float((gradients[n] - wanted[n]).abs().max()) for n in wanted) < 1e-5 * scale
    assert kept.prepared == len(records.items)
    features = kept(range(len(records.items)))
    assert (VISUAL_TOKENS in features) == frozen and ("pixel_values" in features) == (not frozen)


def test_features_are_those_of_the_model_in_any_order(records: RecordSet) -> None:
    model = UniME("unime-tiny", device="cpu")
    texts = [position for position in range(len(records.items)) if records.items.at(position).image is None]
    for few in ([*texts[:3], 1], texts, [1]):
        assert PreparedItems(model, ItemFeatures(records, model.preprocess), LARGE, few).usable
    kept = PreparedItems(model, ItemFeatures(records, model.preprocess), LARGE)
    rng = np.random.default_rng(0)
    for size in (1, 3, 7, len(records.items)):
        positions = rng.permutation(len(records.items))[:size].tolist()
        expected = model.preprocess([records.items.at(position).to_input() for position in positions])
        found = kept(positions)
        assert found.keys() >= expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name


@pytest.mark.parametrize("family", ["qwen3-vl", "llava-1.6", "llava-onevision"])
def test_visual_tokens_of_a_vision_cache_are_kept(
    records: RecordSet, converted: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    model = UniME(converted(family), device="cpu")
    choose_trainable(model, stages.InBatchArguments(lora_rank=4))
    costs, pixels = item_costs(records, model)
    keys = media_keys(records, np.arange(len(records.items)))
    cache = VisionCache(model, records, keys, tmp_path / "cache", torch.float32)
    cache.fill(model, costs, pixels)
    kept = PreparedItems(model, ItemFeatures(records, cache.preprocess, cache.open_item), LARGE)
    assert kept.usable
    with torch.no_grad():
        positions = list(range(len(records.items)))
        expected = model.eval()(cache.preprocess([records.items.at(p) for p in positions]))["sentence_embedding"]
        for _ in range(2):
            found = torch.cat([model(kept(positions[i : i + 5]))["sentence_embedding"] for i in range(0, 14, 5)])
            assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("late", [False, True], ids=["seen at once", "seen late"])
def test_processors_that_pad_images_keep_nothing_and_change_nothing(
    records: RecordSet, converted: Callable[[str], Path], late: bool
) -> None:
    model = UniME(converted("llava-1.6"), device="cpu")
    positions = list(range(len(records.items)))
    texts = [position for position in positions if records.items.at(position).image is None]
    kept = PreparedItems(model, ItemFeatures(records, model.preprocess), LARGE, texts if late else None)
    if late:
        assert kept.usable and len(kept(texts)["input_ids"]) == len(texts) and kept.nbytes
    else:
        assert not kept.usable
    expected = model.preprocess([records.items.at(position).to_input() for position in positions])
    assert torch.equal(kept(positions)["input_ids"], expected["input_ids"]) and kept.nbytes == 0
    assert not kept.usable


def test_memory_stays_within_the_bound(records: RecordSet) -> None:
    model = UniME("unime-tiny", device="cpu")
    count = len(records.items)
    everything = PreparedItems(model, ItemFeatures(records, model.preprocess), LARGE)
    everything(range(count))
    half = PreparedItems(model, ItemFeatures(records, model.preprocess), everything.nbytes // 2)
    nothing = PreparedItems(model, ItemFeatures(records, model.preprocess), 0)
    for kept in (half, nothing):
        kept(range(count))
        assert kept.nbytes <= kept.max_bytes
        before = kept.prepared
        found = kept(range(count))
        assert torch.equal(found["input_ids"], everything(range(count))["input_ids"])
        assert 0 < kept.prepared - before <= count
    assert half.prepared < nothing.prepared == 2 * count and everything.prepared == count


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(OptionError, match="dataloader_num_workers 0"):
        stages.InBatchArguments(item_cache=1, dataloader_num_workers=2)
    with pytest.raises(OptionError, match="set token_budget or mini_batch_size"):
        stages.InBatchArguments(gradient_caching=False)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(RecordSet.write(tmp_path_factory.mktemp("scenes") / "records", training_records(24, seed=4), {}).folder)


@pytest.mark.slow
def test_stages_have_one_curve_with_kept_items_and_with_or_without_gradient_caching(
    scenes: str, tmp_path: Path
) -> None:
    """Ten steps over more than three epochs."""
    common = {
        "model": "unime-tiny",
        "data": scenes,
        "per_device_train_batch_size": 8,
        "max_steps": 10,
        "learning_rate": 1e-3,
        "lora_rank": 0,
        "frozen": "visual",
        "mini_batch_size": 4,
        "temperature": 0.05,
        "logging_steps": 1,
    }
    variants = {
        "anew": {},
        "kept": {"item_cache": 64},
        "plain": {"item_cache": 64, "gradient_caching": False},
        "muon": {"optim": "muon"},
        "muon kept": {"optim": "muon", "item_cache": 64, "gradient_caching": False},
    }
    for name, options in variants.items():
        stages.train_in_batch(stages.InBatchArguments(**common, **options, output=str(tmp_path / name)))
    curves = {name: losses(tmp_path / name) for name in variants}
    assert len(curves["anew"]) == 10
    assert curves["kept"] == pytest.approx(curves["anew"], rel=1e-5)
    assert curves["plain"] == pytest.approx(curves["anew"], rel=1e-5)
    assert curves["muon kept"] == pytest.approx(curves["muon"], rel=1e-5)
    assert curves["muon"][0] == pytest.approx(curves["anew"][0], rel=1e-6) and curves["muon"] != curves["anew"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("muon", "muon kept")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])
