"""Side-by-side measurements: interleaved runs, medians and spread, machine and versions, JSON and a Markdown table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What ran the measurement."""
    processor = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    packages = ("torch", "transformers", "sentence-transformers", "unime-st")
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": device,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def compare(name: str, variants: dict[str, Callable[[], None]], *, repeats: int = 5) -> dict[str, Any]:
    """Time variants in turn, the first being what the others are compared with.

    Args:
        name: Stem of the files under ``benchmarks/results``.
        variants: Label -> what to run once.
        repeats: Timed runs of each variant, after one warm-up.

    Returns:
        What was written: seconds of every run, medians, and the ratio of the first variant's median to each.
    """
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    for repeat in range(repeats + 1):
        for label, run in variants.items():
            started = time.perf_counter()
            run()
            if repeat:
                seconds[label].append(round(time.perf_counter() - started, 4))
    medians = {label: statistics.median(runs) for label, runs in seconds.items()}
    baseline = next(iter(medians.values()))
    result = {
        "name": name,
        "date": date.today().isoformat(),
        "machine": machine(),
        "seconds": seconds,
        "median": medians,
        "times_faster": {label: round(baseline / median, 2) for label, median in medians.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(table(result))
    return result


def table(result: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    info = result["machine"]
    lines = [
        f"{result['date']}, {info['processor']}, {info['cores']} cores, {info['threads']} threads, torch {info['torch']}",
        "",
        "| variant | median s | min - max s | times faster |",
        "|---|---|---|---|",
    ]
    for label, runs in result["seconds"].items():
        spread = f"{min(runs):.3f} - {max(runs):.3f}"
        lines.append(f"| {label} | {result['median'][label]:.3f} | {spread} | {result['times_faster'][label]:.2f} |")
    return "\n".join(lines) + "\n"
