"""MMEB's 36 subsets evaluated by our loader and by mteb's stock path, with the same model, side by side.

python benchmarks/mmeb_eval.py [--queries 1000 --candidates 1000 --documents 2000 --side 256 --subsets 36]

Either side runs in a process of its own on the same synthetic data in the official layout and prints what it used:
seconds while no thread was in the model's forward pass, number of rows put through the model, and peak memory above
that of the process before the first task. Answers of both sides are compared by their mean score on the texts they share.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import machine, save

SIDES = ("stock", "ours")
"""mteb's SentenceTransformerEncoderWrapper, and UniMELoader."""


def main() -> None:
    """Write ``benchmarks/results/mmeb_eval.{json,md}``."""
    options = _options()
    if options.side_to_run:
        sys.stdout.write(json.dumps(measure(options.side_to_run, options.repeat)) + "\n")
        return
    with tempfile.TemporaryDirectory() as scratch:
        distinct = write_data(Path(scratch), options)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for repeat in range(options.repeats):
            for side in SIDES:
                runs[side].append(_in_process(side, repeat, Path(scratch)))
    result = {
        "name": "mmeb_eval",
        "machine": machine(),
        "options": vars(options),
        "distinct_items": distinct,
        "runs": runs,
        **ratios(runs),
    }
    text = table(result)
    save(result, text)
    sys.stdout.write(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1000, help="rows of each subset")
    parser.add_argument(
        "--candidates", type=int, default=1000, help="candidates of each row, where the subset has so many"
    )
    parser.add_argument("--documents", type=int, default=2000, help="distinct candidates of each subset")
    parser.add_argument("--subsets", type=int, default=36, help="how many subsets, taken evenly from the 36")
    parser.add_argument("--side", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--side-to-run", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_data(folder: Path, options: argparse.Namespace) -> int:
    """Write the subsets; return how many distinct items they have."""
    import pyarrow.parquet as pq

    from mteb_tasks.mmeb.subsets import SUBSETS
    from mteb_tasks.mmeb.synthetic import write_synthetic_mmeb

    chosen = [SUBSETS[place * len(SUBSETS) // options.subsets] for place in range(options.subsets)]
    sizes = {"queries": options.queries, "candidates": options.candidates, "documents": options.documents}
    write_synthetic_mmeb(folder / "mmeb", subsets=chosen, side=options.side, duplicates=False, **sizes)
    items = set()
    for subset in chosen:
        for row in pq.read_table(folder / "mmeb" / subset.name).to_pylist():
            items.add((row["qry_text"], row["qry_img_path"]))
            items.update(zip(row["tgt_text"], row["tgt_img_path"]))
    return len(items)


def _in_process(side: str, repeat: int, scratch: Path) -> dict[str, Any]:
    environment = {**os.environ, "MMEB_EVAL_DIR": str(scratch / "mmeb"), "MMEB_ALLOW_MISSING": "1"}
    environment |= {"UNIME_HOME": str(scratch / f"home-{repeat}"), "HF_DATASETS_CACHE": str(scratch / f"hf-{repeat}")}
    command = [sys.executable, __file__, "--side-to-run", side, "--repeat", str(repeat)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Meter:
    """Counts the rows that a model is given and the seconds during which at least one thread runs it."""

    def __init__(self, model: Any) -> None:
        self.rows, self.seconds = 0, 0.0
        self._running, self._since, self._lock = 0, 0.0, threading.Lock()
        self._forward: Callable[..., Any] = model.forward
        model.forward = self

    def __call__(self, features: Any, **kwargs: Any) -> Any:
        with self._lock:
            self._running += 1
            if self._running == 1:
                self._since = time.perf_counter()
        try:
            return self._forward(features, **kwargs)
        finally:
            with self._lock:
                self._running -= 1
                self.rows += len(features["attention_mask"])
                if not self._running:
                    self.seconds += time.perf_counter() - self._since


class PeakMemory:
    """Largest resident memory of this process while the block runs, sampled, in MiB."""

    def __enter__(self) -> PeakMemory:
        self.before, self.peak, self._done = _resident(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(side: str, repeat: int) -> dict[str, Any]:
    """Evaluate all subsets by one path in this process."""
    import mteb
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    from mteb_tasks.description import model_meta
    from mteb_tasks.loader import UniMELoader
    from mteb_tasks.mmeb.tasks import mmeb_tasks

    model = SentenceTransformer("unime-tiny", device="cpu")
    if side == "ours":
        wrapped: Any = UniMELoader("unime/tiny", "1", model=model)
    else:
        wrapped = SentenceTransformerEncoderWrapper(model)
        wrapped.mteb_model_meta = model_meta("stock/tiny", "1")
    model.encode([{"text": "warm up"}])
    meter, tasks = Meter(model), mmeb_tasks()
    started = time.perf_counter()
    with PeakMemory() as memory:
        result = mteb.evaluate(wrapped, tasks, cache=None, co2_tracker=False, show_progress_bar=False)
    seconds = time.perf_counter() - started
    scores = {found.task_name: float(found.get_score()) for found in result.task_results}
    return {
        "seconds": round(seconds, 2),
        "forward_seconds": round(meter.seconds, 2),
        "other_seconds": round(seconds - meter.seconds, 2),
        "forwards": meter.rows,
        "peak_mib": round(memory.peak),
        "grown_mib": round(memory.peak - memory.before),
        "mean_score": round(sum(scores.values()) / len(scores), 4),
    }


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and stock divided by ours (ours divided by stock for memory)."""
    import statistics

    names = ("seconds", "forward_seconds", "other_seconds", "forwards", "peak_mib", "grown_mib")
    median = {
        side: {name: statistics.median(run[name] for run in found) for name in names} for side, found in runs.items()
    }
    stock, ours = median["stock"], median["ours"]
    return {
        "median": median,
        "times_faster_outside_the_forward": round(stock["other_seconds"] / ours["other_seconds"], 2),
        "peak_memory_share": round(ours["peak_mib"] / stock["peak_mib"], 2),
        "grown_memory_share": round(ours["grown_mib"] / stock["grown_mib"], 2),
    }


def table(result: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    info, options = result["machine"], result["options"]
    lines = [
        f"{info['processor']}, {info['cores']} cores, {info['threads']} threads, torch {info['torch']}; "
        f"{options['subsets']} subsets of {options['queries']} queries x up to {options['candidates']} candidates, "
        f"pictures of {options['side']} pixels, medians of {options['repeats']} runs",
        "",
        "| path | seconds | of these outside the forward | rows through the model | peak MiB | grown by MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for side, found in result["median"].items():
        cells = [f"{found['seconds']:.1f}", f"{found['other_seconds']:.1f}", f"{found['forwards']:.0f}"]
        cells += [f"{found['peak_mib']:.0f}", f"{found['grown_mib']:.0f}"]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Distinct items: {result['distinct_items']}. Outside the forward {result['times_faster_outside_the_forward']} "
        f"times faster; {result['peak_memory_share']} of the peak memory "
        f"({result['grown_memory_share']} of what was added by the evaluation).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
