"""On every backbone of the papers: columns that mix texts and images have the gradients of their items one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordSet
from unime_st.losses import HardNegativeRankingLoss
from unime_st.model import UniME
from unime_st.training.distinct_items import DistinctItemsLoss, ItemCollator
from unime_st.training.feed import Feed, ItemFeatures
from unime_st.training.item_tokens import item_costs
from unime_st.training.mini_batches import MiniBatches
from unime_st.training.rows import pair_rows

FAMILY_NAMES = ["qwen2-vl", "llava-1.6", "llava-onevision", "phi3.5-v"]


def _item(number: int) -> Item:
    """A text, an image or both in turn; sizes and lengths vary."""
    pixels = np.random.default_rng(number).integers(0, 255, (40 + 13 * number, 90 - 5 * number, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return Item(*(("word " * number + str(number), None), (None, image), (f"{number}?", image))[number % 3])


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RecordSet:
    """Five pairs; both columns hold texts, images and both."""
    pairs = [PairRecord(_item(number), _item(9 - number)) for number in range(5)]
    return RecordSet.write(tmp_path_factory.mktemp("records") / "rows", pairs, {})


def _gradients(model: UniME, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_cached_equals_plain(records: RecordSet, converted: Callable[[str], Path], family: str) -> None:
    model = UniME(converted(family), device="cpu")
    assert len(model._no_split_modules) == 1, "FSDP2 shards the layers of the language model, and no others"
    items = [[record.query for record in records], [record.positive for record in records]]
    inputs = [[item.to_input() for item in column] for column in items]

    def embedded(item: dict) -> torch.Tensor:
        return model(model.preprocess([item]))["sentence_embedding"]

    alone = [[torch.cat([embedded(item) for item in column])] for column in inputs]
    plain = HardNegativeRankingLoss(model, 0.5, 1.0, num_negatives=3)
    expected = plain.calculate_loss(alone)
    wanted = _gradients(model, expected)
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())

    feed = Feed(ItemFeatures(records, model.preprocess))
    collate = ItemCollator(
        model.preprocess, records=records, mini_batches=MiniBatches(item_costs(records, model)[0], size=2), lazy=True
    )
    batch = collate(list(pair_rows(records).remove_columns("dataset")))
    lazily = DistinctItemsLoss(plain, feed)([{k.removeprefix("bucket0_"): v for k, v in batch.items()}])
    cached = HardNegativeRankingLoss(model, 0.5, 1.0, num_negatives=3, mini_batch_size=2)
    sliced = cached([model.preprocess(column) for column in inputs])
    for loss in (lazily, sliced):
        found = _gradients(model, loss)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert found.keys() == wanted.keys() and any("vision" in name or "visual" in name for name in found)
        assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) < 1e-3 * scale
