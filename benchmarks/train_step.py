"""Benchmark of one contrastive training step on photos of many sizes: unime_st against stock Sentence Transformers.

    python benchmarks/train_step.py speed [--size mid --batch_size 32 --repeats 3]
    python benchmarks/train_step.py v2 [--size mid --batch_size 4 --repeats 3]
    python benchmarks/train_step.py tiny [--steps 100 --records 2000 --repeats 3]
    python benchmarks/train_step.py memory [--size small --batches 64 512 1024 4096 --stock_batches 64 512 1024
      --repeats 3]

Both sides have the same random Qwen2-VL with LoRA, the same pairs of a text and a JPEG file and the same mini-batch
size, and must reach the same loss. The stock side decodes all images of a batch at once. Speed is measured alternately
in one process: ``speed`` on pairs (UniME stage 2), ``v2`` on a query, its positive and eight negatives, images and
texts, none of which occurs twice. The loss of UniME-V2 itself is a mean over rows, which are embedded once, a few at a
time: a third variant of ``v2``. Memory is the median peak of ``repeats`` processes for each side and batch size:
of resident memory, or on a GPU of the device's; a batch of one pair shows the share of libraries and model. Results of an
earlier call with the same settings stay in the table. ``tiny`` compares whole runs of ``unime in_batch tiny`` instead,
see :mod:`tiny_step`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import harness
import torch
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from tiny_step import tiny
from workloads import SIZES, images, random_qwen2_vl

from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordSet
from unime_st.encoding import pixel_budget
from unime_st.losses import SoftLabelDistillationLoss
from unime_st.losses.base import ROWS_AT_ONCE
from unime_st.model import UniME
from unime_st.training.adapters import add_lora
from unime_st.training.arguments import TrainArguments
from unime_st.training.distinct_items import DistinctItemsLoss, ItemCollator
from unime_st.training.feed import Feed, ItemFeatures
from unime_st.training.frozen_tower import FrozenTowerCache
from unime_st.training.item_tokens import item_costs
from unime_st.training.mini_batches import MiniBatches
from unime_st.training.planning import flops_per_token, peak_bytes, peak_matmul_flops
from unime_st.training.rows import judged_rows, pair_rows

STOCK, OURS = "Sentence Transformers, eager images", "unime_st"
SOFT_LABELS = "unime_st, loss of UniME-V2"
_NEGATIVES = 8
_PIXELS = 448 * 448  # most pixels of an image after the image processor
_SHORTEST = 100  # pixels of a photo's sides as it is stored
_WORDS = "red green blue small large round square dot line above below two three striped plain shape".split()
Step = Callable[[], float]


def load(folder: Path, side: str = OURS) -> SentenceTransformer:
    """Load the model with a LoRA adapter, in training mode."""
    kind = SentenceTransformer if side == STOCK else UniME
    model = kind(str(folder), device="cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    options = TrainArguments(lora_rank=16, lora_dropout=0.0)
    if side == STOCK:  # peft's own layers
        config: dict[str, Any] = {
            "r": options.lora_rank,
            "lora_alpha": options.lora_alpha,
            "target_modules": options.lora_targets,
        }
        model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, **config))
    else:
        add_lora(model, options)
    return model.train()


def write_pairs(folder: Path, count: int, full: int, *, longest: int, negatives: int = 0) -> None:
    """Write texts of 3 to 30 words, each with a JPEG file. The first ``full`` images have the most tokens possible.

    Negatives are images and texts in turn.
    """
    rng = random.Random(0)
    side, per_row = math.isqrt(_PIXELS), 1 + negatives // 2
    photos = images(folder / "full", full, shortest=side, longest=side)
    photos += images(folder / "photos", max(0, count * per_row - full), shortest=_SHORTEST, longest=longest)
    texts = [f"{n} " + " ".join(rng.choices(_WORDS, k=rng.randint(3, 30))) for n in range(count * per_row)]
    items = list(zip(map(Item, texts), (Item(image=Path(photo)) for photo in photos)))
    rows = []
    for number in range(count):
        (text, photo), *others = items[number * per_row : (number + 1) * per_row]
        rest = tuple(item for pair in others for item in reversed(pair))
        rows.append(
            PairRecord(text, photo, "photos", rest, 2.0 if rest else None, tuple(-1.0 - n for n in range(len(rest))))
        )
    RecordSet.write(folder / "records", rows, {}, image_root=folder)


def _columns(pair: PairRecord) -> dict[str, Item]:
    negatives = {f"negative_{number + 1}": item for number, item in enumerate(pair.negatives)}
    return {"query": pair.query, "positive": pair.positive, **negatives}


def stock_step(model: SentenceTransformer, pairs: list[PairRecord], mini_batch_size: int) -> Step:
    """Make the step of the stock trainer: decode and process the whole batch, then compute the cached loss."""
    collate = SentenceTransformerDataCollator(model.preprocess)
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size)
    names = list(_columns(pairs[0]))

    def step() -> float:
        rows = [
            {name: item.image.open() if item.image else item.text for name, item in _columns(pair).items()}
            for pair in pairs
        ]
        batch = {
            name: value.to(model.device) if hasattr(value, "to") else value for name, value in collate(rows).items()
        }
        del rows
        columns = [
            {name.removeprefix(f"{column}_"): value for name, value in batch.items() if name.startswith(f"{column}_")}
            for column in names
        ]
        return _backward(loss(columns, None), model)

    return step


def our_step(model: SentenceTransformer, records: RecordSet, count: int, mini_batch_size: int, workers: int) -> Step:
    """Make our step on the same batch: items are decoded mini-batch by mini-batch."""
    loss = our_loss(model, records, workers)
    tokens, pixels = item_costs(records, model)
    cut = MiniBatches(tokens, size=mini_batch_size, pixels=pixels, max_pixels=pixel_budget(model.device))
    collate = ItemCollator(model.preprocess, records=records, mini_batches=cut, lazy=True)
    table = judged_rows(records, _NEGATIVES) if records[0].negatives else pair_rows(records)
    rows = list(table.select_columns([*_columns(records[0])]).select(range(count)))

    def step() -> float:
        batch = {name.removeprefix("bucket0_"): value.to(model.device) for name, value in collate(rows).items()}
        return _backward(loss([batch]), model)

    return step


def our_loss(model: SentenceTransformer, records: RecordSet, workers: int) -> DistinctItemsLoss:
    """Wrap the stock loss as the stages do: distinct items, late decoding, one run of the frozen vision tower."""
    inner = CachedMultipleNegativesRankingLoss(model, mini_batch_size=ROWS_AT_ONCE)
    return DistinctItemsLoss(
        inner,
        Feed(ItemFeatures(records, model.preprocess), workers),
        frozen_tower=FrozenTowerCache(model, torch.float32),
    )


def soft_label_step(model: SentenceTransformer, records: RecordSet, count: int, mini_batch_size: int) -> Step:
    """Make the step of the UniME-V2 stage: as many rows as fit into a mini-batch at a time, without gradient caching."""
    loss = DistinctItemsLoss(SoftLabelDistillationLoss(model))
    collate = ItemCollator(model.preprocess, records=records, mini_batches=MiniBatches(item_costs(records, model)[0]))
    rows = list(judged_rows(records, _NEGATIVES).select(range(count)).remove_columns("dataset"))
    size = max(1, mini_batch_size // (2 + _NEGATIVES))

    def step() -> float:
        total = 0.0
        for begin in range(0, count, size):
            batch = collate(rows[begin : begin + size])
            labels = batch.pop("label").to(model.device)
            buckets: dict[str, dict[str, Any]] = {}
            for key, value in batch.items():
                bucket, name = key.split("_", 1)
                buckets.setdefault(bucket, {})[name] = value.to(model.device) if hasattr(value, "to") else value
            share = loss(list(buckets.values()), labels) * (len(labels) / count)
            share.backward()
            total += share.item()
        model.zero_grad()
        return total

    return step


def _backward(loss: torch.Tensor, model: SentenceTransformer) -> float:
    loss.backward()
    model.zero_grad()
    return loss.item()


def make_step(side: str, options: argparse.Namespace, work: Path, count: int) -> Step:
    """Make the step of one side on the first ``count`` pairs."""
    model, records = load(work / "st", side), RecordSet.load(work / "records")
    if side == SOFT_LABELS:
        return soft_label_step(model, records, count, options.mini_batch_size)
    if side == OURS:
        return our_step(model, records, count, options.mini_batch_size, options.workers)
    return stock_step(model, [records[row] for row in range(count)], options.mini_batch_size)


def prepare(options: argparse.Namespace, work: Path, count: int, full: int = 0) -> None:
    """Write the model and the pairs."""
    random_qwen2_vl(work, options.size, pixels=_PIXELS, device="cuda" if torch.cuda.is_available() else "cpu")
    write_pairs(work, count, full, longest=options.longest, negatives=_NEGATIVES if options.what == "v2" else 0)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of both sides, for the result file."""
    return {
        "model": {"size": options.size, **SIZES[options.size], "largest_image": _PIXELS},
        "photos": {"shortest": _SHORTEST, "longest": options.longest},
        "mini_batch_size": options.mini_batch_size,
        "workers": options.workers,
    }


def speed(options: argparse.Namespace, work: Path) -> None:
    """Measure both sides alternately."""
    prepare(options, work, options.batch_size)
    losses: dict[str, float] = {}

    def keeping(side: str) -> Callable[[], None]:
        step = make_step(side, options, work, options.batch_size)
        return lambda: losses.update({side: step()})

    v2 = options.what == "v2"
    variants = {side: keeping(side) for side in ((STOCK, OURS, SOFT_LABELS) if v2 else (STOCK, OURS))}
    result = harness.compare(f"train_step_{options.what}", variants, repeats=options.repeats)
    _require_same(losses)
    model, records = load(work / "st"), RecordSet.load(work / "records")
    tokens = int(item_costs(records, model)[0].sum())
    # What a step needs: one pass forward, one backward. Second passes of gradient caching do not count as use.
    flops = flops_per_token(model, cached=False, recomputed=False) * tokens
    rate = peak_matmul_flops(model.device, model.dtype or torch.float32)
    result |= {"settings": {**settings(options), "batch_size": options.batch_size}, "loss": losses}
    result["rows_per_second"] = {k: round(options.batch_size / s, 3) for k, s in result["median"].items()}
    result["mfu"] = {side: round(flops / seconds / rate, 4) for side, seconds in result["median"].items()}
    rows = ["", "| variant | rows/s | MFU (language model) |", "|---|---|---|"]
    rows += [f"| {k} | {v:.2f} | {result['mfu'][k]:.2f} |" for k, v in result["rows_per_second"].items()]
    text = harness.table(result) + "\n".join(rows) + f"\n\n{json.dumps(result['settings'])}\n"
    harness.save(result, text)
    sys.stdout.write(text)


def _require_same(losses: dict[str, float]) -> None:
    if abs(losses[STOCK] - losses[OURS]) > 1e-3 * abs(losses[STOCK]):
        raise RuntimeError(f"the losses of the two sides differ: {losses}")


def memory(options: argparse.Namespace, work: Path) -> None:
    """Measure each side and batch size in processes of their own."""
    wanted = {STOCK: options.stock_batches, OURS: options.batches}
    # Two mini-batches are in memory at most, the first with its graph: the largest two are the same in all batch sizes.
    full = 2 * options.mini_batch_size
    prepare(options, work, max(sum(wanted.values(), [1])), full)
    path, facts = harness.RESULTS / "train_step_memory.json", {**settings(options), "full_photos": full}
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    found: dict[str, dict[str, dict[str, float]]] = {STOCK: {}, OURS: {}}
    if earlier.get("settings") == facts and _undated(earlier) == _undated({"machine": harness.machine()}):
        found = earlier["found"]
    for side, batches in wanted.items():
        for count in (1, *batches) if batches else ():
            started = time.perf_counter()
            runs = [_child(options, side, work, count) for _ in range(options.repeats)]
            found[side][str(count)] = sorted(runs, key=lambda run: run["mib"])[len(runs) // 2]
            sys.stderr.write(f"{side}, {count}: {time.perf_counter() - started:.0f} s, {found[side][str(count)]}\n")
    for count in found[STOCK].keys() & found[OURS].keys():
        _require_same({side: found[side][count]["loss"] for side in found})
    result = {
        "name": "train_step_memory",
        "date": date.today().isoformat(),
        "machine": harness.machine(),
        "settings": facts,
        "found": {
            side: dict(sorted(points.items(), key=lambda point: int(point[0]))) for side, points in found.items()
        },
    }
    harness.save(result, memory_table(result))
    plot(result)
    sys.stdout.write(memory_table(result))


def _undated(result: dict[str, Any]) -> dict[str, Any]:
    """Description of the machine of a result, without the date."""
    return {name: value for name, value in result["machine"].items() if name not in ("date", "command")}


def _child(options: argparse.Namespace, side: str, work: Path, count: int) -> dict[str, float]:
    same = ("size", "mini_batch_size", "workers")
    words = [word for name in same for word in (f"--{name}", str(getattr(options, name)))]
    command = [
        sys.executable,
        __file__,
        "memory",
        "--side",
        side,
        "--work",
        str(work),
        "--batches",
        str(count),
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side}, {count} pairs: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_here(options: argparse.Namespace) -> None:
    """Run one step in this process and print its peak memory."""
    loss = make_step(options.side, options, options.work, options.batches[0])()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sys.stdout.write(json.dumps({"mib": round(peak_bytes(device) / 2**20), "loss": loss}) + "\n")


def memory_table(result: dict[str, Any]) -> str:
    """Markdown table of the result."""
    stock, ours = (result["found"][side] for side in (STOCK, OURS))
    lines = [
        harness.where(result),
        "",
        "| pairs in the batch | stock, peak MiB | ours, peak MiB | ratio |",
        "|---|---|---|---|",
    ]
    for count in sorted(stock.keys() | ours.keys(), key=int):
        sides = [f"{points[count]['mib']:.0f}" if count in points else "not run" for points in (stock, ours)]
        both = count in stock and count in ours
        ratio = f"{ours[count]['mib'] / stock[count]['mib']:.2f}" if both else ""
        lines.append(f"| {count}{' (libraries and model)' if count == '1' else ''} | {' | '.join(sides)} | {ratio} |")
    sizes = sorted((int(count) for count in ours if int(count) > 1), key=int)
    if len(sizes) > 1:
        growth = ours[str(sizes[-1])]["mib"] / ours[str(sizes[0])]["mib"] - 1
        lines += ["", f"Ours from {sizes[0]} to {sizes[-1]} pairs: {growth:+.1%}."]
    return "\n".join(lines) + f"\n\n{json.dumps(result['settings'])}\n"


def plot(result: dict[str, Any]) -> None:
    """Plot peak memory over the batch size to ``results/train_step_memory.png``."""
    axes, figure = harness.axes(result)
    for side, points in result["found"].items():
        axes.plot([int(x) for x in points], [y["mib"] / 1024 for y in points.values()], marker="o", label=side)
    axes.set(xscale="log", xlabel="pairs in the batch", ylabel="peak memory, GiB", ylim=(0, None))
    axes.legend()
    figure.savefig(harness.RESULTS / f"{result['name']}.png", dpi=120)


def main() -> None:
    """Parse the command line, measure, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "v2", "memory", "tiny"), help="quantity to measure")
    parser.add_argument("--size", choices=SIZES, help="model size (default: mid for speed and v2, small for memory)")
    parser.add_argument("--batch_size", type=int, help="rows of the batch (default: speed 32, v2 4)")
    parser.add_argument("--longest", type=int, help="most pixels of a photo's side (default: 1600, memory 600)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="speed: timed steps after a warm-up step; tiny, memory: runs of each side (default: 3)",
    )
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[64, 512, 1024, 4096], help="memory: batch sizes of our side"
    )
    parser.add_argument(
        "--stock_batches", type=int, nargs="*", default=[64, 512, 1024], help="memory: batch sizes of the stock side"
    )
    parser.add_argument("--steps", type=int, default=100, help="tiny: steps of a run (default: 100)")
    parser.add_argument("--records", type=int, default=2000, help="tiny: pairs about drawn scenes (default: 2000)")
    parser.add_argument("--mini_batch_size", type=int, default=16, help="items embedded at a time (default: 16)")
    parser.add_argument("--workers", type=int, default=0, help="our processes that decode ahead (default: 0)")
    parser.add_argument("--side", choices=(STOCK, OURS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size = options.size or {"memory": "small"}.get(options.what, "mid")
    options.batch_size = options.batch_size or {"v2": 4}.get(options.what, 32)
    options.longest = options.longest or {"memory": 600}.get(options.what, 1600)
    if options.side:
        measure_here(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        {"speed": speed, "v2": speed, "memory": memory, "tiny": tiny}[options.what](options, Path(folder))


if __name__ == "__main__":
    main()
