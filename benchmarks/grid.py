"""Encoding grid: `UniME.encode` beside `SentenceTransformer.encode` for every kind, size and number of inputs.

python benchmarks/grid.py                                                       # the whole grid, about 20 minutes
python benchmarks/grid.py --model tiny --images 224 --inputs 32 --threads 1     # single cells, printed only

Runs alternate (stock, ours, ours, stock); the ratio of a cell is the median over such rounds of our seconds over stock's.
Short runs have more rounds. A cell whose forward passes exceed ``--gflop`` has fewer inputs, or is left out when a smaller
cell covers that number.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from throughput import forward_flops
from workloads import images, random_qwen2_vl, sentences

from unime_st import UniME

MODELS, IMAGES, TEXTS = ("tiny", "mid"), (56, 224, 448, 896), ("equal", "mixed")
INPUTS, THREADS = (1, 4, 32, 512), (1, 2)
WORDS = {"equal": {"least": 20, "most": 20}, "mixed": {"least": 5, "most": 400}}
LIMIT = 1.02
"""Ratio of our seconds to stock's up to which a cell counts as not slower."""
_FEWEST, _MOST = 3, 60  # rounds of a cell


class Cell(NamedTuple):
    """One workload: a model, a kind of input, how many of them, and the number of threads."""

    model: str
    kind: str
    inputs: int
    threads: int


def measure(pair: tuple[SentenceTransformer, UniME], rows: list[Any], seconds: float) -> dict[str, Any]:
    """Encode rows with both classes in alternating runs.

    Args:
        pair: The stock model and ours.
        rows: The inputs.
        seconds: Time for the runs; at least three rounds are made.
    """
    stock, ours = pair
    begun = time.perf_counter()
    cosine = float((stock.encode(rows) * ours.encode(rows)).sum(1).min())  # the warm-up of both
    rounds = max(_FEWEST, min(_MOST, int(seconds / 2 / (time.perf_counter() - begun))))
    wall: list[tuple[float, float]] = []
    cpu: list[float] = []
    for _ in range(rounds):
        spent = {stock: [0.0, 0.0], ours: [0.0, 0.0]}
        for model in (stock, ours, ours, stock):
            started, before = time.perf_counter(), time.process_time()
            model.encode(rows)
            spent[model][0] += (time.perf_counter() - started) / 2
            spent[model][1] += (time.process_time() - before) / 2
        wall.append((spent[stock][0], spent[ours][0]))
        cpu.append(spent[ours][1] / spent[stock][1])
    ratios = [own / other for other, own in wall]
    deviation = statistics.stdev(ratios) / len(ratios) ** 0.5
    return {
        "stock_s": round(statistics.median(other for other, _ in wall), 5),
        "ours_s": round(statistics.median(own for _, own in wall), 5),
        "ratio": round(statistics.median(ratios), 4),
        "standard_error": round(deviation, 4),
        "cpu_ratio": round(statistics.median(cpu), 4),
        "rounds": rounds,
        "least_cosine": round(cosine, 6),
    }


def limited(pair: tuple[SentenceTransformer, UniME], rows: list[Any], counts: list[int], gflop: float) -> list[int]:
    """Numbers of inputs whose forward passes stay below ``gflop``; a reduced one stays if it is twice the one before."""
    each = forward_flops(pair[0], rows, 1 << 20) / len(rows) / 1e9
    most = max(1, int(gflop / each))
    kept = [count for count in sorted(counts) if count <= most]
    return kept if len(kept) == len(counts) or (kept and most < 2 * kept[-1]) else [*kept, most]


def cells(chosen: Any, work: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Measure all chosen cells."""
    kinds = [f"images of {side}" for side in chosen.images] + [f"texts, {length}" for length in chosen.texts]
    most = max(chosen.inputs)
    rows: dict[str, list[Any]] = {}
    for side in chosen.images:
        paths = images(work / str(side), most, shortest=side, longest=side)
        rows[f"images of {side}"] = [{"image": path} for path in paths]
    for length in chosen.texts:
        rows[f"texts, {length}"] = list(sentences(most, **WORDS[length]))
    for name in chosen.model:
        folder = "unime-tiny" if name == "tiny" else str(random_qwen2_vl(work / name, name, pixels=max(IMAGES) ** 2))
        pair = SentenceTransformer(folder, device="cpu"), UniME(folder, device="cpu")
        for kind in kinds:
            sample = rows[kind][: 1 if kind.startswith("images") else 32]
            for count in limited(pair, sample, chosen.inputs, chosen.gflop):
                for threads in chosen.threads:
                    torch.set_num_threads(threads)
                    yield Cell(name, kind, count, threads), measure(pair, rows[kind][:count], chosen.seconds)


def report(found: list[dict[str, Any]], result: dict[str, Any]) -> str:
    """Markdown table, worst ratios first."""
    over = sum(cell["ratio"] > LIMIT for cell in found)
    lines = [
        f"{harness.where(result)}; threads of a cell: its column",
        "",
        f"{over} of {len(found)} cells above {LIMIT}; median {statistics.median(cell['ratio'] for cell in found):.3f}. "
        f"Cells above {result['gflop']:g} GFLOP of forward passes have fewer inputs or are left out.",
        "",
        "| model | inputs | kind | threads | stock s | ours s | ours / stock | ± | CPU time | rounds |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {cell['model']} | {cell['inputs']} | {cell['kind']} | {cell['threads']} | {cell['stock_s']:.4f} | "
        f"{cell['ours_s']:.4f} | {cell['ratio']:.3f} | {cell['standard_error']:.3f} | {cell['cpu_ratio']:.3f} | "
        f"{cell['rounds']} |"
        for cell in sorted(found, key=lambda cell: -cell["ratio"])
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the grid; write ``benchmarks/results/grid.{json,md}`` if it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS, help="models")
    parser.add_argument("--images", nargs="+", type=int, help="sides in pixels of square images")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, help="lengths of texts")
    parser.add_argument("--inputs", nargs="+", type=int, default=INPUTS, help="numbers of inputs")
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS, help="numbers of threads")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for the runs of a cell")
    parser.add_argument("--gflop", type=float, default=160.0, help="most GFLOP of a cell's forward passes")
    chosen = parser.parse_args()
    if chosen.images is None and chosen.texts is None:
        chosen.images, chosen.texts = IMAGES, TEXTS
    chosen.images, chosen.texts = chosen.images or (), chosen.texts or ()
    np.random.seed(0)
    found, begun = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for cell, figures in cells(chosen, Path(folder)):
            found.append({**cell._asdict(), **figures})
            sys.stderr.write(f"{time.perf_counter() - begun:.0f} s: {found[-1]}\n")
    result = {"name": "grid", "machine": harness.machine(), "gflop": chosen.gflop, "cells": found}
    text = report(found, result)
    defaults = [parser.get_default(name) for name in ("model", "inputs", "threads")]
    if [chosen.model, chosen.inputs, chosen.threads, chosen.images, chosen.texts] == [*defaults, IMAGES, TEXTS]:
        harness.save(result, text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
