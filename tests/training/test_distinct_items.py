"""Training over distinct items equals training over columns, and ends as the stock trainer would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.losses import HardNegativeRankingLoss, InfoNCELoss, SoftLabelDistillationLoss
from unime_st.losses.quantization import fake_quantize
from unime_st.model import UniME
from unime_st.stages import InBatchArguments
from unime_st.training.distinct_items import COLUMNS, DistinctItemsLoss, ItemCollator
from unime_st.training.embedders import EmbedderStage
from unime_st.training.feed import Feed, ItemFeatures
from unime_st.training.item_tokens import item_costs
from unime_st.training.mini_batches import MiniBatches
from unime_st.training.rows import judged_rows, pair_rows


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RecordSet:
    """Judged records of all modalities; negatives are shared between rows."""
    pairs = list(training_records(12, seed=3))
    rows = [
        PairRecord(
            pair.query, pair.positive, pair.dataset, (pairs[i - 1].positive, pairs[i - 2].positive), 2.0, (-1.0, -3.0)
        )
        for i, pair in enumerate(pairs)
    ]
    return RecordSet.write(tmp_path_factory.mktemp("records") / "rows", rows, {})


@pytest.fixture(scope="module")
def model() -> UniME:
    return UniME("unime-tiny", device="cpu")


LOSSES = {
    "soft": lambda model: SoftLabelDistillationLoss(model, 0.1, in_batch_weight=0.5),
    "hard": lambda model: HardNegativeRankingLoss(model, 0.1, num_negatives=3),
    "info_nce": lambda model: InfoNCELoss(
        model, 0.1, directions=("query_to_doc", "doc_to_query"), learnable_temperature=True
    ),
    "in_batch": lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=4),
}


def _gradient(model: UniME) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


CUTS = {"one pass": {}, "lazy": {"size": 3}, "lazy, budget": {"budget": 60}, "lazy, workers": {"size": 5}}


@pytest.fixture(scope="module")
def costs(records: RecordSet, model: UniME) -> np.ndarray:
    return item_costs(records, model)[0]


def _features(batch: dict) -> list[dict]:
    names = sorted({key.split("_")[0] for key in batch if key.startswith("bucket")}, key=lambda key: int(key[6:]))
    return [{k.removeprefix(f"{n}_"): v for k, v in batch.items() if k.startswith(f"{n}_")} for n in names]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.slow
def test_distinct_items_equal_columns(
    records: RecordSet, model: UniME, costs: np.ndarray, name: str, cut: str
) -> None:
    rows = list(judged_rows(records, 2).remove_columns("dataset"))
    if name != "soft":
        rows = [{key: row[key] for key in ("query", "positive")} for row in rows]
    inner = LOSSES[name](model)
    assert isinstance(inner, torch.nn.Module)
    columns = [key for key in rows[0] if key != "label"]
    labels = torch.tensor([row["label"] for row in rows]) if name == "soft" else None
    model.zero_grad()
    reps = [
        [
            torch.cat(
                [model(model.preprocess([records.item(row[key]).to_input()]))["sentence_embedding"] for row in rows]
            )
        ]
        for key in columns
    ]
    expected = inner.calculate_loss(reps, labels)
    expected.backward()
    gradient, own = _gradient(model), [p.grad.clone() for p in inner.parameters(recurse=False)]

    model.zero_grad()
    for parameter in inner.parameters(recurse=False):
        parameter.grad = None
    lazy = cut != "one pass"
    collator = ItemCollator(model.preprocess, records=records, mini_batches=MiniBatches(costs, **CUTS[cut]), lazy=lazy)
    batch = collator(rows)
    indices = batch[f"bucket0_{COLUMNS}"]
    assert indices.shape == (len(columns), len(rows)) and len(indices.unique()) < indices.numel()
    feed = Feed(ItemFeatures(records, model.preprocess), workers=2 if "workers" in cut else 0)
    distinct = DistinctItemsLoss(inner, feed if lazy else None)
    found = distinct(_features(batch), batch.get("label"))
    found.backward()
    for parameter, wanted in zip(inner.parameters(recurse=False), own, strict=True):
        assert parameter.grad.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(_gradient(model), gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    assert distinct.items == len(indices.unique())


def test_a_temperature_gets_the_mean_gradient_of_all_prefixes(
    records: RecordSet, model: UniME, costs: np.ndarray
) -> None:
    rows = [{key: row[key] for key in ("query", "positive")} for row in judged_rows(records, 2)]
    gradients = []
    for dims in ([128], [16], [128, 16]):
        inner = InfoNCELoss(model, 0.1, learnable_temperature=True)
        collator = ItemCollator(model.preprocess, records=records, mini_batches=MiniBatches(costs, size=4), lazy=True)
        loss = DistinctItemsLoss(inner, Feed(ItemFeatures(records, model.preprocess)), matryoshka_dims=dims)
        (loss(_features(collator(rows))) / 4).backward()
        assert inner.log_scale is not None and inner.log_scale.grad is not None
        gradients.append(inner.log_scale.grad.item())
    model.zero_grad()
    assert gradients[2] == pytest.approx((gradients[0] + gradients[1]) / 2, rel=1e-4)
    assert abs(gradients[0] - gradients[1]) > 1e-5


@pytest.mark.slow
def test_rounded_embeddings_are_trained_with_straight_through_gradients(
    records: RecordSet, model: UniME, costs: np.ndarray
) -> None:
    rows = [{key: row[key] for key in ("query", "positive")} for row in judged_rows(records, 2)]
    collator = ItemCollator(model.preprocess, records=records, mini_batches=MiniBatches(costs, size=4), lazy=True)
    inner = HardNegativeRankingLoss(model, 0.1, num_negatives=3)
    batch = collator(rows)
    found = {}
    for precisions in (None, ["int8"], ["binary"], ["int8", "binary"]):
        model.zero_grad()
        distinct = DistinctItemsLoss(
            inner, Feed(ItemFeatures(records, model.preprocess)), [32, 8], precisions=precisions
        )
        value = distinct(_features(batch))
        value.backward()
        found[str(precisions)] = (value.item(), _gradient(model))
    plain, both = found["None"], found["['int8', 'binary']"]
    for precision in ("int8", "binary"):  # the mean of the loss as it is and of the rounded one
        rounded = [2 * part - whole for part, whole in zip(found[f"['{precision}']"], plain, strict=True)]
        found[precision] = (rounded[0], rounded[1])
    expected = [(plain[n] + found["int8"][n] + found["binary"][n]) / 3 for n in range(2)]
    assert both[0] == pytest.approx(float(expected[0]), rel=1e-4)
    assert torch.allclose(both[1], torch.as_tensor(expected[1]), rtol=1e-3, atol=1e-4 * float(both[1].abs().max()))
    assert found["int8"][0] == pytest.approx(plain[0], rel=0.1) and abs(found["binary"][0] - plain[0]) > 1e-3


def test_fake_quantization_rounds_and_lets_gradients_pass() -> None:
    columns = [torch.randn(20, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    units = [torch.nn.functional.normalize(column, dim=1) for column in columns]
    every = torch.cat(units).detach()
    step = (every.max(dim=0).values - every.min(dim=0).values) / 255
    for precision in ("int8", "binary"):
        rounded = fake_quantize(columns, precision)
        for unit, value in zip(units, rounded, strict=True):
            if precision == "int8":
                assert ((value - unit).abs() <= step / 2 + 1e-12).all() and not torch.equal(value, unit)
                levels = (value - every.min(dim=0).values) / step
                assert torch.allclose(levels, levels.round(), atol=1e-6)
            else:
                assert torch.allclose(value, torch.sign(unit) / 6**0.5)
        weights = torch.randn(20, 6, dtype=torch.float64)
        found = torch.autograd.grad((rounded[0] * weights).sum(), columns[0], retain_graph=True)[0]
        wanted = torch.autograd.grad((units[0] * weights).sum(), columns[0], retain_graph=True)[0]
        assert torch.allclose(found, wanted)
    with pytest.raises(ValueError, match="precision must be one of"):
        fake_quantize(columns, "int4")  # type: ignore[arg-type]


class _Collated(EmbedderStage):
    """A stage that ends with all rows as one batch."""

    def fit(self, model: Any, rows: Any, loss: Any, collator: Any, *args: Any, **options: Any) -> None:
        self.batch = collator(list(rows))


def test_a_mini_batch_decodes_eight_million_pixels_at_most(model: UniME, tmp_path: Path) -> None:
    sides = [(2400, 2000), (1600, 1200), (2000, 1500), (4000, 3000), (56, 56), (2000, 1600)]
    pairs = []
    for number, size in enumerate(sides):
        Image.new("RGB", size, (40 * number, 10, 10)).save(tmp_path / f"{number}.jpg")
        pairs.append(PairRecord(Item(f"image {number}"), Item(image=tmp_path / f"{number}.jpg")))
    records = RecordSet.write(tmp_path / "records", pairs, {}, image_root=tmp_path)
    options = InBatchArguments(per_device_train_batch_size=6, mini_batch_size=6, output=str(tmp_path / "out"))
    Path(options.output).mkdir()
    stage = _Collated("in_batch", options)
    stage.records = records
    stage.train(model, pair_rows(records), LOSSES["in_batch"](model))
    batch = stage.batch
    items = records.items
    groups = batch["bucket0_input_ids"][:, 0].split(batch["bucket0_sizes"].tolist())
    stored = [[items.at(p).image.size() for p in group.tolist() if items.at(p).image] for group in groups]
    decoded = [sum(width * height for width, height in sizes) for sizes in stored]
    assert sum(decoded) == sum(width * height for width, height in sides)
    assert max(len(group) for group in groups) > 1
    assert all(count <= 8_000_000 or len(sizes) == 1 for count, sizes in zip(decoded, stored))


def test_rows_without_enough_negatives_are_refused(records: RecordSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 negatives are stored, 5 are needed"):
        judged_rows(records, 5)
    plain = RecordSet.write(tmp_path / "plain", training_records(3), {})
    with pytest.raises(ValueError, match="0 negatives are stored, 1 are needed"):
        judged_rows(plain, 1)
    with pytest.raises(ValueError, match="no judge scores"):
        judged_rows(plain, 0)


@pytest.mark.parametrize("limit", [10**9, 1], ids=["whole", "cut by pixels"])
def test_as_many_mini_batches_as_are_a_full_one_are_embedded_once(
    records: RecordSet, model: UniME, costs: np.ndarray, limit: int
) -> None:
    rows = [{key: row[key] for key in ("query", "positive")} for row in judged_rows(records, 2)]
    split = MiniBatches(costs, size=3, pixels=np.ones_like(costs), max_pixels=limit)
    collator = ItemCollator(model.preprocess, records=records, mini_batches=split, lazy=True)
    batch = collator(rows)
    loss = DistinctItemsLoss(LOSSES["hard"](model), Feed(ItemFeatures(records, model.preprocess)))
    embedded: list[tuple[int, bool]] = []
    hook = model.register_forward_hook(
        lambda module, args, output: embedded.append(
            (len(args[0]["input_ids"]), output["sentence_embedding"].requires_grad)
        )
    )
    loss(_features(batch)).backward()
    hook.remove()
    sizes = batch["bucket0_sizes"].tolist()
    assert len(sizes) > 2
    tokens = costs[batch["bucket0_input_ids"][:, 0].numpy()]
    kept = 1 if limit > 1 else int((tokens.cumsum() <= 3 * tokens.max()).sum())
    assert limit > 1 or kept >= 3
    first = [(size, number < kept) for number, size in enumerate(sizes)]
    assert embedded == [*first, *((size, True) for size in sizes[kept:])]
    with torch.no_grad():
        loss(_features(collator(rows)))
