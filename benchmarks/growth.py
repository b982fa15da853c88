"""Growth benchmark: seconds and peak memory of every stage at three sizes, and the slopes on a log-log scale.

python benchmarks/growth.py [--stages import judge --factor 0.1]

Every stage and size runs in a process of its own. The model is ``unime-tiny`` where it is what a stage measures (embed,
train step, evaluate); elsewhere vectors and scores are drawn, so that the stage's own work shows. Memory is the rise of the
peak above the resident memory before the stage. Stages of a large model run at smaller sizes, see :data:`STAGES`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import harness
import mteb
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from synthetic_mmeb import write_synthetic_mmeb
from train_step import load, our_step
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from workloads import sentences

from mteb_tasks.loader import UniMELoader
from mteb_tasks.mmeb.subsets import subset_named
from mteb_tasks.mmeb.tasks import mmeb_tasks
from unime_st import Item, UniME
from unime_st.data.importing import import_records
from unime_st.data.records import PairRecord, RecordSet
from unime_st.encoding import encode_items
from unime_st.judging import Group, PairError
from unime_st.judging.judge_pools import judge_pools
from unime_st.judging.select_rows import select_rows
from unime_st.memory import malloc_trim, peak_resident, resident
from unime_st.retrieval import Index, mine, top_k

SIZES, SMALL = (1_000, 10_000, 100_000), (300, 1_000, 3_000)
LINEAR, QUADRATIC = 1.05, 2.05
"""Slopes up to which growth counts as linear, and as quadratic (exact top-k of n queries among n vectors)."""
_POOL, _CANDIDATES, _QUERIES, _DIM = 1000, 10, 1000, 64
FORK = multiprocessing.get_context("fork")
Work = Callable[[], object]


class DrawnScores:
    """Judge that draws its scores."""

    name, revision, prompt_hash = "drawn", "1", "none"

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def score(self, groups: Sequence[Group], *, errors: list[PairError] | None = None) -> list[np.ndarray]:
        """Random log-odds of every candidate."""
        return [self.generator.standard_normal(len(group.candidates), dtype=np.float32) for group in groups]


def small_model(work: Path) -> SentenceTransformer:
    """A text model of one narrow layer, so that its vectors cost little."""
    full = UniME("unime-tiny", device="cpu").tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=full.backend_tokenizer, pad_token=full.pad_token)
    sizes: dict[str, Any] = {
        "hidden_size": _DIM,
        "intermediate_size": _DIM,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(work / "bert")
    tokenizer.save_pretrained(work / "bert")
    return SentenceTransformer(modules=[Transformer(str(work / "bert")), Pooling(_DIM), Normalize()], device="cpu")


def texts(count: int) -> list[str]:
    """Distinct short texts."""
    return sentences(count, least=3, most=10)


def importing(count: int, work: Path) -> Work:
    """JSON Lines of text pairs to a record folder; a dataset has a thousand pairs."""
    rows = (
        {"query": f"what is {text}?", "positive": text, "dataset": f"part {number // _POOL}"}
        for number, text in enumerate(texts(count))
    )
    source = work / "own.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda: import_records(source, work / "records")


def embed(count: int, work: Path) -> Work:
    """Texts to vectors of `unime-tiny`."""
    model, rows = UniME("unime-tiny", device="cpu"), texts(count)
    encode_items(model, rows[:64])
    return lambda: encode_items(model, iter(rows))


def nearest(count: int, work: Path) -> Work:
    """Exact top 50 of as many queries as vectors."""
    rng = np.random.default_rng(0)
    queries, corpus = (rng.standard_normal((count, _DIM), dtype=np.float32) for _ in range(2))
    return lambda: top_k(queries, corpus, 50)


def judge(count: int, work: Path) -> Work:
    """Mined pools of ten candidates to stored scores."""
    pools = mine(
        work / "records",
        small_model(work),
        work / "pools",
        num_candidates=_CANDIDATES,
        pool="dataset",
        max_similarity=None,
    )
    return lambda: judge_pools(pools, DrawnScores(), work / "scores")


def select(count: int, work: Path) -> Work:
    """Stored scores to training rows."""
    return lambda: select_rows(work / "scores", work / "rows")


def train_step(count: int, work: Path) -> Work:
    """One step of the cached loss on a batch of so many text pairs, `unime-tiny` with LoRA."""
    pairs = (PairRecord(Item(f"what is {text}?"), Item(text)) for text in texts(count))
    records = RecordSet.write(work / "train", pairs, {})
    step = our_step(load(Path("unime-tiny")), records, count, 64, 0)
    return step


def evaluate(count: int, work: Path) -> Work:
    """One subset of MMEB with so many rows: image queries of 32 pixels, text candidates."""
    sizes = {"queries": count, "candidates": 100, "documents": count}
    write_synthetic_mmeb(work / "mmeb", subsets=[subset_named("OK-VQA")], side=32, duplicates=False, **sizes)
    model = UniME("unime-tiny", device="cpu")
    model.encode(["warm up"])
    wrapped = UniMELoader("unime/tiny", "1", model=model)
    return lambda: mteb.evaluate(wrapped, mmeb_tasks(), cache=None, co2_tracker=False, show_progress_bar=False)


def index(count: int, work: Path) -> Work:
    """A flat index of texts, saved."""
    model, rows = small_model(work), texts(count)
    return lambda: Index.build(rows, model, folder=work / "index")


def search(count: int, work: Path) -> Work:
    """A thousand queries in an index of so many items, loaded before."""
    model = small_model(work)
    found = Index.load(work / "index", model)
    found.search(["warm up"])
    queries = [f"{text} again" for text in texts(_QUERIES)]
    return lambda: found.search(queries, k=10)


class Stage(NamedTuple):
    """A stage: how it is prepared, its sizes, and what an item is."""

    prepare: Callable[[int, Path], Work]
    item: str
    sizes: tuple[int, ...] = SIZES
    slope: float = LINEAR


STAGES = {
    "import": Stage(importing, "text pairs"),
    "embed": Stage(embed, "texts, `unime-tiny`"),
    "top-k": Stage(nearest, "queries among as many vectors", slope=QUADRATIC),
    "judge": Stage(judge, "pairs with 10 candidates, drawn scores"),
    "select": Stage(select, "judged rows"),
    "train step": Stage(train_step, "pairs in the batch, `unime-tiny`", SMALL),
    "evaluate": Stage(evaluate, "rows of an MMEB subset, `unime-tiny`", SMALL),
    "index": Stage(index, "texts, drawn vectors"),
    "search": Stage(search, "indexed texts, 1,000 queries"),
}


def measure(stage: Stage, count: int, work: Path) -> dict[str, float]:
    """Run a stage in this process."""
    work.mkdir(parents=True, exist_ok=True)
    run = stage.prepare(count, work)
    malloc_trim()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started, used = time.perf_counter(), time.process_time()
    run()
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    return {"seconds": round(seconds, 4), "cpu": round(cpu, 4), "mb": round((peak_resident() - before) / 2**20, 1)}


def in_child(name: str, count: int, work: Path) -> dict[str, float]:
    """Run a stage in a process of its own, forked before anything is computed: importing libraries takes seconds."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_send, args=(sender, name, count, work))
    process.start()
    sender.close()
    try:
        found: dict[str, float] = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{name}, {count}: the process ended without a measurement, see its error above") from None
    process.join()
    return found


def _send(sender: Connection, name: str, count: int, work: Path) -> None:
    os.environ |= {"MMEB_EVAL_DIR": str(work / "mmeb"), "MMEB_ALLOW_MISSING": "1", "UNIME_HOME": str(work / "home")}
    datasets.config.HF_DATASETS_CACHE = str(work / "home" / "datasets")
    sender.send(measure(STAGES[name], count, work))


def slope(points: dict[str, dict[str, float]], name: str) -> float:
    """Slope of a straight line through the points on a log-log scale."""
    values = [max(point[name], 1e-3) for point in points.values()]
    return round(float(np.polyfit(np.log([int(count) for count in points]), np.log(values), 1)[0]), 3)


def report(result: dict[str, Any]) -> str:
    """Markdown table."""
    lines = [
        harness.where(result),
        "",
        "| stage | items | sizes | seconds | slope | at most | peak MB above | slope |",
        "|---|---|---|---|---:|---:|---|---:|",
    ]
    for name, points in result["found"].items():
        cells = [" / ".join(f"{int(count):,}" for count in points)]
        cells.append(" / ".join(f"{point['seconds']:.3g}" for point in points.values()))
        cells += [f"{result['slopes'][name]['seconds']:.2f}", f"{STAGES[name].slope}"]
        cells.append(" / ".join(f"{point['mb']:.0f}" for point in points.values()))
        lines.append(f"| {name} | {STAGES[name].item} | {' | '.join(cells)} | {result['slopes'][name]['mb']:.2f} |")
    over = [name for name in result["slopes"] if result["slopes"][name]["seconds"] > STAGES[name].slope]
    lines += [
        "",
        f"Above their slope: {', '.join(over) or 'none'}. Sizes end at 3,000 where a model would take minutes.",
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any]) -> None:
    """Seconds and peak memory of every stage on log-log scales, to ``results/growth.png``."""
    axes, figure = harness.axes(result, 2)
    for axis, name, label in zip(axes, ("seconds", "mb"), ("seconds", "peak MB above"), strict=True):
        for stage, points in result["found"].items():
            values = [max(point[name], 0.1 if name == "mb" else 1e-3) for point in points.values()]
            exponent = result["slopes"][stage][name]
            axis.plot([int(count) for count in points], values, marker="o", label=f"{stage} ({exponent:.2f})")
        axis.set(xscale="log", yscale="log", xlabel="items", ylabel=label)
        axis.legend(fontsize=6, title="stage (slope)", title_fontsize=6)
    figure.savefig(harness.RESULTS / f"{result['name']}.png", dpi=120)


def record(names: Iterable[str], factor: float) -> str:
    """Measure stages at all sizes and write ``benchmarks/results/growth.{json,md,png}``."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for size in STAGES[name].sizes:
                count = max(1, round(size * factor))
                measured = in_child(name, count, Path(folder, str(count)))
                found.setdefault(name, {})[str(count)] = measured
                sys.stderr.write(f"{name}, {count}: {measured}\n")
    slopes = {name: {what: slope(points, what) for what in ("seconds", "mb")} for name, points in found.items()}
    result = {"name": "growth", "machine": harness.machine(), "found": found, "slopes": slopes}
    text = harness.save(result, report(result))
    plot(result)
    return text


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages, in this order")
    parser.add_argument("--factor", type=float, default=1.0, help="multiplier of all sizes (default: 1)")
    chosen = parser.parse_args()
    sys.stdout.write(record(chosen.stages, chosen.factor))


if __name__ == "__main__":
    main()
