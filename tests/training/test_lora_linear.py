"""Merged LoRA products give peft's values and gradients, and stay peft's where merging would lose precision or time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn

from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records
from unime_st.losses import HardNegativeRankingLoss
from unime_st.model import UniME
from unime_st.stages import InBatchArguments
from unime_st.training.adapters import add_lora, merge_lora
from unime_st.training.distinct_items import DistinctItemsLoss, ItemCollator
from unime_st.training.feed import Feed, ItemFeatures
from unime_st.training.frozen_tower import FrozenTowerCache
from unime_st.training.item_tokens import item_costs
from unime_st.training.lora_linear import MergedLoraLinear, merge_lora_products
from unime_st.training.mini_batches import MiniBatches


def _layers(dtype: torch.dtype = torch.float64, **options: object) -> tuple[Any, Any]:
    """The same two adapted layers, of peft and merged."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4, bias=False)).to(dtype)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["0", "1"], init_lora_weights=False, **options)  # type: ignore[arg-type]
    stock = inject_adapter_in_model(config, plain).to(dtype)
    merged = copy.deepcopy(stock)
    merge_lora_products(merged)
    return stock, merged


def _found(layers: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    value = layers(x)
    value.square().sum().backward()
    return [value.detach(), x.grad, *(p.grad for p in layers.parameters() if p.requires_grad)]


def test_values_and_gradients_are_those_of_peft() -> None:
    stock, merged = _layers()
    assert [type(layer) for layer in merged] == [MergedLoraLinear, MergedLoraLinear]
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    for expected, found in zip(_found(stock, x), _found(merged, x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(merged(x), stock(x), rtol=1e-12)


def test_few_rows_autocast_and_disabled_adapters_are_computed_by_peft() -> None:
    stock, merged = _layers(torch.float32)
    x = torch.randn(64, 12)
    assert torch.equal(merged(x[:3]), stock(x[:3]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merged(x), stock(x))
    for layers in (stock, merged):
        for layer in layers:
            layer.enable_adapters(False)
    assert torch.equal(merged(x), stock(x))


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "DoRA"])
def test_layers_that_cannot_be_merged_stay_as_they_are(options: dict[str, object]) -> None:
    assert not any(isinstance(layer, MergedLoraLinear) for layer in _layers(torch.float32, **options)[1])


def test_an_adapter_of_a_stage_is_computed_merged_and_can_be_folded_in() -> None:
    model = UniME("unime-tiny", device="cpu")
    texts = [" ".join(["a red square"] * 40)] * 16
    before = model.encode(texts)
    add_lora(model, InBatchArguments(lora_rank=4, lora_dropout=0.0))
    assert any(isinstance(module, MergedLoraLinear) for module in model.modules())
    assert abs(model.encode(texts) - before).max() < 1e-6
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    trained = model.encode(texts)
    merge_lora(model)
    assert abs(trained - before).max() > 1e-3 and abs(model.encode(texts) - trained).max() < 1e-5


def test_a_cached_step_in_float64_is_that_of_peft_on_whole_columns(tmp_path: Path) -> None:
    records = RecordSet.write(tmp_path / "records", training_records(12, seed=5), {})
    model = UniME("unime-tiny", device="cpu")
    add_lora(model, InBatchArguments(lora_rank=4, lora_dropout=0.0))
    model.double().train()
    adapter = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    torch.manual_seed(0)
    for weight in adapter.values():
        nn.init.normal_(weight, std=0.05)
    inner = HardNegativeRankingLoss(model, 0.1, num_negatives=3)

    rows = [{"query": row["query"], "positive": row["positive"]} for row in records.row_shards.rows()]
    split = MiniBatches(item_costs(records, model)[0], size=8)
    batch = ItemCollator(model.preprocess, records=records, mini_batches=split, lazy=True)(rows)
    assert len(batch["bucket0_sizes"]) > 2
    features = {name.removeprefix("bucket0_"): value for name, value in batch.items()}
    cache = FrozenTowerCache(model, torch.float32)  # without autocast
    loss = DistinctItemsLoss(inner, Feed(ItemFeatures(records, model.preprocess)), frozen_tower=cache)([features])
    loss.backward()
    found = {name: weight.grad for name, weight in adapter.items()}

    model.zero_grad()
    for module in model.modules():
        if type(module) is MergedLoraLinear:
            module.__class__ = Linear
    columns = [model.preprocess([records.item(row[n]).to_input() for row in rows]) for n in ("query", "positive")]
    expected = inner(columns)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for name, weight in adapter.items():
        assert torch.allclose(found[name], weight.grad, rtol=1e-6, atol=1e-9 * float(weight.grad.abs().max())), name
