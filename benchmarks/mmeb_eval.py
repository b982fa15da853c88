"""MMEB's 36 subsets evaluated by our loader and by mteb's stock path, with the same model, side by side.

python benchmarks/mmeb_eval.py [--queries 1000 --candidates 1000 --documents 2000 --side 128 --subsets 36]

Either side runs in a process of its own on the same synthetic data in the official layout, tasks made and checked
included, and tells what it used: seconds while no thread was in the model's forward pass, rows put through the model,
and how far memory rose above that of the process with the model loaded. Candidates are shared as in the real data.
What a batch of images takes in memory shows with large ones only: that is measured on NIGHTS (image to image), once
with `--images` of `--image-side` pixels and once with twice as many.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import in_process, machine, save
from workloads import random_qwen2_vl

SIDES = ("stock", "ours")
"""mteb's SentenceTransformerEncoderWrapper, and UniMELoader."""


def main() -> None:
    """Write ``benchmarks/results/mmeb_eval.{json,md}``."""
    options = _options()
    if options.side_to_run:
        sys.stdout.write(json.dumps(measure(options.side_to_run)) + "\n")
        return
    with tempfile.TemporaryDirectory() as scratch:
        distinct = write_data(Path(scratch) / "mmeb", options)
        if options.model != "tiny":
            os.environ["BENCHED_MODEL"] = str(random_qwen2_vl(Path(scratch) / "model", options.model))
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(options.repeats):
            for side in SIDES:
                runs[side].append(_in_process(side, Path(scratch) / "mmeb"))
        memory = {
            str(count): _memory(Path(scratch) / f"images-{count}", count, options.image_side)
            for count in (options.images, 2 * options.images)
            if count
        }
    result = {
        "name": "mmeb_eval_photos" if options.photos else "mmeb_eval",
        "machine": machine(),
        "options": vars(options),
        "distinct_items": distinct,
        "runs": runs,
        "grown_mib_by_images": memory,
        **ratios(runs),
    }
    sys.stdout.write(save(result, table(result)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1000, help="rows of each subset")
    parser.add_argument(
        "--candidates", type=int, default=1000, help="candidates of each row, where the subset has so many"
    )
    parser.add_argument("--documents", type=int, default=2000, help="distinct candidates of each subset")
    parser.add_argument("--subsets", type=int, default=36, help="how many subsets, taken evenly from the 36")
    parser.add_argument("--side", type=int, default=128, help="side of the images in pixels")
    parser.add_argument(
        "--photos", type=int, nargs=2, metavar=("SHORTEST", "LONGEST"), help="photos of such sides instead, in pixels"
    )
    parser.add_argument(
        "--model", choices=("tiny", "mid"), default="tiny", help="unime-tiny, or a random mid-size model"
    )
    parser.add_argument("--repeats", type=int, default=1, help="runs of each path")
    parser.add_argument("--images", type=int, default=150, help="images of the memory measurement; 0: none")
    parser.add_argument("--image-side", type=int, default=1600, help="their side in pixels")
    parser.add_argument("--side-to-run", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_data(folder: Path, options: argparse.Namespace) -> int:
    """Write the subsets; return how many distinct items they have."""
    from synthetic_mmeb import write_synthetic_mmeb

    from mteb_tasks.mmeb.subset_reader import read_subset
    from mteb_tasks.mmeb.subsets import SUBSETS

    chosen = [SUBSETS[index * len(SUBSETS) // options.subsets] for index in range(options.subsets)]
    sizes = {"queries": options.queries, "candidates": options.candidates, "documents": options.documents}
    side = tuple(options.photos) if options.photos else options.side
    write_synthetic_mmeb(folder, subsets=chosen, side=side, duplicates=False, shared=True, **sizes)
    items: set[tuple[str, object]] = set()
    for subset in chosen:
        found = read_subset(folder, subset)
        items.update(zip(found.query_texts, found.query_images))
        items.update(zip(found.document_texts, found.document_images))
    return len(items)


def _memory(folder: Path, count: int, side: int) -> dict[str, int]:
    """MiB by which the evaluation of so many large images raises each path's memory."""
    from synthetic_mmeb import write_synthetic_mmeb

    from mteb_tasks.mmeb.subsets import subset_named

    half = count // 2
    sizes = {"queries": half, "candidates": half, "documents": half}
    write_synthetic_mmeb(folder, subsets=[subset_named("NIGHTS")], side=side, duplicates=False, **sizes)
    return {path: _in_process(path, folder)["grown_mib"] for path in SIDES}


def _in_process(side: str, data: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        environment = {"MMEB_EVAL_DIR": str(data), "MMEB_ALLOW_MISSING": "1"}
        environment |= {"UNIME_HOME": home, "HF_DATASETS_CACHE": f"{home}/datasets"}
        return in_process(__file__, side, environment)


class Meter:
    """Counts the rows that a model is given and the seconds during which at least one thread runs it.

    The vision tower counts, too, where it runs before the forward pass.
    """

    def __init__(self, model: Any) -> None:
        self.rows, self.seconds = 0, 0.0
        self._running, self._since, self._lock = 0, 0.0, threading.Lock()
        backbone = model.transformers_model
        backbone.get_image_features = self._timed(backbone.get_image_features)
        model.forward = self._timed(model.forward)
        model.register_forward_pre_hook(self._count)

    def _count(self, _: Any, args: tuple[Any, ...]) -> None:
        with self._lock:
            self.rows += len(args[0]["attention_mask"])

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self._running += 1
                if self._running == 1:
                    self._since = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                with self._lock:
                    self._running -= 1
                    if not self._running:
                        self.seconds += time.perf_counter() - self._since

        return timed


def _forget_peak() -> None:
    """Let `peak_resident` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(side: str) -> dict[str, Any]:
    """Evaluate all subsets by one path in this process."""
    import mteb
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    from mteb_tasks.loader import UniMELoader
    from mteb_tasks.metadata import model_meta
    from mteb_tasks.mmeb.tasks import mmeb_tasks
    from unime_st import UniME
    from unime_st.memory import peak_resident, resident

    model = (UniME if side == "ours" else SentenceTransformer)(
        os.environ.get("BENCHED_MODEL", "unime-tiny"), device="cpu"
    )
    if side == "ours":
        cache = Path(os.environ["UNIME_HOME"], "embeddings")  # as under `mteb run`
        wrapped: Any = UniMELoader("unime/tiny", "1", model=model, cache_folder=cache)
    else:
        wrapped = SentenceTransformerEncoderWrapper(model)
        wrapped.mteb_model_meta = model_meta("stock/tiny", "1")
    model.encode([{"text": "warm up"}])
    meter, before = Meter(model), resident() / 2**20
    _forget_peak()
    started = time.perf_counter()
    result = mteb.evaluate(wrapped, mmeb_tasks(), cache=None, co2_tracker=False, show_progress_bar=False)
    seconds, peak = time.perf_counter() - started, peak_resident() / 2**20
    scores = {found.task_name: float(found.get_score()) for found in result.task_results}
    return {
        "seconds": round(seconds, 2),
        "forward_seconds": round(meter.seconds, 2),
        "other_seconds": round(seconds - meter.seconds, 2),
        "forwards": meter.rows,
        "peak_mib": round(peak),
        "grown_mib": round(peak - before),
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
        "times_faster": round(stock["seconds"] / ours["seconds"], 2),
        "times_faster_outside_the_forward": round(stock["other_seconds"] / ours["other_seconds"], 2),
        "peak_memory_share": round(ours["peak_mib"] / stock["peak_mib"], 2),
        "grown_memory_share": round(ours["grown_mib"] / stock["grown_mib"], 2),
    }


def table(result: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    info, options = result["machine"], result["options"]
    photos = options["photos"]
    images = f"photos of {photos[0]} to {photos[1]} pixels" if photos else f"images of {options['side']} pixels"
    lines = [
        f"{info['processor']}, {info['cores']} cores, {info['threads']} threads, torch {info['torch']}; "
        f"{options['subsets']} subsets of {options['queries']} queries x up to {options['candidates']} candidates, "
        f"{images}, model {options['model']}, medians of {options['repeats']} runs",
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
        f"Distinct items: {result['distinct_items']}. In all {result['times_faster']} times faster, outside the forward {result['times_faster_outside_the_forward']} "
        f"times faster; {result['peak_memory_share']} of the peak memory "
        f"({result['grown_memory_share']} of what was added by the evaluation).",
        "",
        f"| images of {options['image_side']} pixels | stock grows by MiB | ours by MiB | ours / stock |",
        "|---|---:|---:|---:|",
    ]
    for count, found in result["grown_mib_by_images"].items():
        stock, ours = found["stock"], found["ours"]
        lines.append(f"| {count} | {stock} | {ours} | {ours / max(stock, 1):.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
