"""One contrastive training step on pictures of many sizes: stock Sentence Transformers, eager images, beside ours.

    python benchmarks/train_step.py [--batch_size 128 --memory_batches 64 512 1024 4096 --repeats 5]

Both sides have the same random Qwen2-VL of middle size, the same pairs, LoRA and mini-batch of items. Each measurement
is a process of its own, the sides in turn. Peak memory is the process's: the highest resident set, on a GPU the
device's. The part that does not come from the batch (libraries, model) is measured by a step of one pair.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, machine
from PIL import Image, ImageDraw
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import Qwen2VLConfig, Qwen2VLModel

from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordSet
from unime_st.model import UniME
from unime_st.training.adapters import add_lora
from unime_st.training.arguments import TrainArguments
from unime_st.training.feed import Feed
from unime_st.training.items import DistinctItemsLoss, ItemCollator, MiniBatches
from unime_st.training.planning import item_costs, peak_bytes
from unime_st.training.stages import pair_rows

SIDES = ("stock", "ours")
_LARGEST = 448  # pixels of the longer side
_WORDS = "red green blue small large round square dot line above below two three striped plain shape".split()


def build_model(hidden: int, layers: int, folder: str) -> UniME:
    """A random Qwen2-VL with the processor of the embedded default, which here keeps pictures at their size."""
    tiny = UniME("unime-tiny", device="cpu")
    tiny.processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": _LARGEST**2}
    config = tiny.transformers_model.config
    text = {"vocab_size": config.text_config.vocab_size, "hidden_size": hidden, "intermediate_size": hidden * 8 // 3}
    text |= {"num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": hidden, "num_heads": 2, "mlp_ratio": 2}
    same = ("patch_size", "spatial_merge_size", "temporal_patch_size", "in_channels")
    vision |= {name: getattr(config.vision_config, name) for name in same}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids_of = {name: getattr(config, name) for name in ids}
    torch.manual_seed(0)
    Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision, **ids_of)).save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    transformer = Transformer(folder, unpad_inputs=False)
    pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
    model = UniME(modules=[transformer, pooling, Normalize()], device="cuda" if torch.cuda.is_available() else "cpu")
    add_lora(model, TrainArguments(lora_rank=16, lora_dropout=0.0))
    return model.train()


def make_pairs(count: int, folder: Path) -> RecordSet:
    """Texts of 3 to 30 words, each with a JPEG of 56 to 448 pixels a side."""
    rng = random.Random(0)

    def pair(number: int) -> PairRecord:
        size = rng.randint(56, _LARGEST), rng.randint(56, _LARGEST)
        picture = Image.new("RGB", size, tuple(rng.randbytes(3)))
        ImageDraw.Draw(picture).ellipse((5, 5, size[0] // 2, size[1] // 2), fill=tuple(rng.randbytes(3)))
        path = folder / f"{number}.jpg"
        picture.save(path, quality=90)
        text = f"{number} " + " ".join(rng.choices(_WORDS, k=rng.randint(3, 30)))
        return PairRecord(Item(text), Item(image=path))

    folder.mkdir()
    return RecordSet.write(folder / "records", (pair(number) for number in range(count)), {}, image_root=folder)


def stock_step(model: UniME, records: RecordSet, mini_batch_size: int) -> Callable[[], None]:
    """What the stock trainer does with a batch: decode and process it whole, then the cached loss."""
    collate = SentenceTransformerDataCollator(model.preprocess)
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size)

    def step() -> None:
        rows = [{"query": pair.query.text, "positive": pair.positive.image.open()} for pair in records]
        batch = {
            name: value.to(model.device) if hasattr(value, "to") else value for name, value in collate(rows).items()
        }
        del rows
        columns = [
            {name.removeprefix(f"{column}_"): value for name, value in batch.items() if name.startswith(column)}
            for column in ("query", "positive")
        ]
        loss(columns, None).backward()
        model.zero_grad()

    return step


def our_step(model: UniME, records: RecordSet, mini_batch_size: int, workers: int) -> Callable[[], None]:
    """The same batch from positions of items, decoded mini-batch by mini-batch."""
    inner = CachedMultipleNegativesRankingLoss(model, mini_batch_size=len(records))
    loss = DistinctItemsLoss(inner, Feed(records, model.preprocess, workers))
    cut = MiniBatches(item_costs(records, model), size=mini_batch_size)
    collate = ItemCollator(model.preprocess, records=records, mini_batches=cut, lazy=True)
    rows = list(pair_rows(records).remove_columns("dataset"))

    def step() -> None:
        batch = {name.removeprefix("bucket0_"): value.to(model.device) for name, value in collate(rows).items()}
        loss([batch]).backward()
        model.zero_grad()

    return step


def measure(options: argparse.Namespace) -> None:
    """In a process of its own: the seconds of every step, and the peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(options.hidden, options.layers, folder)
        records = RecordSet.load(options.data)
        arguments = (model, records, options.mini_batch_size)
        step = stock_step(*arguments) if options.measure == "stock" else our_step(*arguments, options.workers)
        seconds = []
        for _ in range(options.repeats):
            began = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(round(time.perf_counter() - began, 3))
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps({"seconds": seconds, "peak": peak_bytes(model.device), "host": host}) + "\n")


def _child(options: argparse.Namespace, side: str, data: Path, repeats: int) -> dict[str, Any]:
    same = ("mini_batch_size", "hidden", "layers", "workers")
    words = [word for name in same for word in (f"--{name}", str(getattr(options, name)))]
    command = [sys.executable, __file__, "--measure", side, "--data", str(data), "--repeats", str(repeats), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both sides in turn: speed at one batch size, memory at several."""
    with tempfile.TemporaryDirectory() as scratch:
        counts = sorted({1, options.batch_size, *options.memory_batches})
        data = {
            count: make_pairs(count, Path(scratch) / str(count)) and Path(scratch) / str(count) / "records"
            for count in counts
        }
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                seconds[side] += _child(options, side, data[options.batch_size], options.repeats + 1)["seconds"][1:]
        peaks = {
            side: {
                count: round(_child(options, side, data[count], 1)["peak"] / 2**20)
                for count in (1, *options.memory_batches)
                if side == "ours" or count <= options.stock_limit
            }
            for side in SIDES
        }
    rates = {side: [round(options.batch_size / value, 2) for value in seconds[side]] for side in SIDES}
    medians = {side: statistics.median(rates[side]) for side in SIDES}
    settings = {
        name: getattr(options, name) for name in ("batch_size", "mini_batch_size", "hidden", "layers", "workers")
    }
    return {
        "name": "train_step",
        "date": date.today().isoformat(),
        "machine": machine(),
        "settings": settings,
        "examples_per_second": rates,
        "median": medians,
        "times_faster": round(medians["ours"] / medians["stock"], 2),
        "peak_mib": peaks,
    }


def table(result: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    info, settings, peaks = result["machine"], result["settings"], result["peak_mib"]
    lines = [
        f"{result['date']}, {info['processor']}, {info['cores']} cores, {info['threads']} threads, "
        f"accelerator {info['accelerator']}, torch {info['torch']}, "
        f"sentence-transformers {info['sentence-transformers']}; {settings}",
        "",
        "| | stock | ours | ratio |",
        "|---|---|---|---|",
        f"| examples/s, median of {len(result['examples_per_second']['ours'])} | {result['median']['stock']:.2f} "
        f"| {result['median']['ours']:.2f} | {result['times_faster']:.2f}x |",
    ]
    for count, ours in peaks["ours"].items():
        stock = peaks["stock"].get(count)
        ratio = "" if stock is None else f"{ours / stock:.2f}x"
        label = "one pair (libraries and model)" if count == 1 else f"batch {count}"
        lines.append(f"| peak memory, {label}, MiB | {'not run' if stock is None else stock} | {ours} | {ratio} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Peak memory over the batch size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for side in SIDES:
        points = sorted((int(count), peak / 1024) for count, peak in result["peak_mib"][side].items())
        axes.plot(*zip(*points), marker="o", label=side)
    axes.set(xscale="log", xlabel="pairs in the batch", ylabel="peak memory, GiB", ylim=(0, None))
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=128, help="pairs of the batch whose speed is measured")
    parser.add_argument("--memory_batches", type=int, nargs="+", default=[64, 512, 1024, 4096], help="pairs")
    parser.add_argument("--stock_limit", type=int, default=1024, help="largest batch that the stock side is given")
    parser.add_argument("--mini_batch_size", type=int, default=16, help="items embedded at a time")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="layers of the language model")
    parser.add_argument("--workers", type=int, default=0, help="our processes that decode ahead")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a process, after one that is not")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, in turn")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the table, the numbers and the plot")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options)
        return
    result = run(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "train_step.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.output / "train_step.md").write_text(table(result))
    plot(result, options.output / "train_step.svg")
    sys.stdout.write(table(result))


if __name__ == "__main__":
    main()
