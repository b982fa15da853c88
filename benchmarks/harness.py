"""Benchmark harness: interleaved runs, medians with spread, machine facts, results as JSON, Markdown and plots."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).parent / "results")
"""Output folder of results: ``benchmarks/results``, or the environment variable BENCH_RESULTS."""


def options(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """Argument parser with the options of all benchmarks: device and repeats."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of the model")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="number of timed runs of each variant, after a warm-up"
    )
    return parser


def machine() -> dict[str, Any]:
    """Date, commit, command, hardware and package versions of a measurement."""
    processor = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    packages = ("torch", "transformers", "sentence-transformers", "unime-st")
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": device,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


@cache
def commit() -> str:
    """The last commit that changed more than results and pages; "+" follows where files differ from it."""
    if shutil.which("git") is None:
        return "unknown"
    code = ("benchmarks/*.py", "unime_st", "mteb_tasks", "train_scripts", "pyproject.toml", "constraints.txt")

    def git(*words: str) -> str:
        command = ["git", *words, "--", *code]
        root = Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    return (git("log", "-1", "--format=%h") or "unknown") + ("+" if git("status", "--porcelain") else "")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def compare(
    name: str, variants: dict[str, Callable[[], Any]], *, repeats: int = 5, facts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Time variants in interleaved runs; the first variant is the baseline.

    Args:
        name: Stem of the files in :data:`RESULTS`.
        variants: Maps a label to the function to time.
        repeats: Number of timed runs of each variant, after one warm-up. Defaults to 5.
        facts: Further entries of the JSON file, such as workload sizes. Defaults to None.

    Returns:
        dict: The written result: seconds of every run, medians, and speed-ups over the baseline.
    """
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    for repeat in range(repeats + 1):
        for label, run in variants.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[label].append(round(time.perf_counter() - started, 4))
    medians = {label: statistics.median(runs) for label, runs in seconds.items()}
    baseline = next(iter(medians.values()))
    result = {
        "name": name,
        "machine": machine(),
        "seconds": seconds,
        "median": medians,
        "times_faster": {label: round(baseline / median, 2) for label, median in medians.items()},
        **(facts or {}),
    }
    save(result, table(result))
    bars(result)
    return result


def save(result: dict[str, Any], markdown: str) -> str:
    """Write a result as JSON and Markdown; returns the Markdown."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{result['name']}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"{result['name']}.md").write_text(markdown)
    return markdown


def in_process(script: str, side: str, environment: dict[str, str]) -> dict[str, Any]:
    """Run one side of a benchmark in a process of its own, so that memory is measured apart.

    Args:
        script: The benchmark; with ``--side-to-run`` it prints its measurement as JSON in the last line.
        side: Name of the side.
        environment: Variables of the process beside those of this one.

    Returns:
        dict: The measurement.
    """
    command = [sys.executable, script, "--side-to-run", side]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def bars(result: dict[str, Any]) -> None:
    """Plot medians with their spread to ``results/<name>.png``."""
    axis, figure = axes(result)
    labels = list(result["seconds"])
    medians = [result["median"][label] for label in labels]
    spread = [
        [middle - min(result["seconds"][label]) for label, middle in zip(labels, medians)],
        [max(result["seconds"][label]) - middle for label, middle in zip(labels, medians)],
    ]
    axis.barh(labels, medians, xerr=spread, capsize=4)
    axis.invert_yaxis()
    axis.set_xlabel("seconds (median, whiskers: fastest and slowest run)")
    figure.savefig(RESULTS / f"{result['name']}.png", dpi=120)


def scaling(name: str, curves: dict[str, Callable[[int], dict[str, Callable[[], Any]]]]) -> dict[str, Any]:
    """Measure how run time scales.

    Args:
        name: Stem of the files in :data:`RESULTS`.
        curves: Maps an axis with its points, such as "inputs: 100 200 400", to a function from a point to the variants.

    Returns:
        dict: The written result: seconds by axis, variant and point.
    """
    seconds: dict[str, dict[str, dict[str, float]]] = {}
    for axis, variants_at in curves.items():
        points = [int(point) for point in axis.split(":")[1].split()]
        for point in points:
            for label, run in variants_at(point).items():
                run()
                started = time.perf_counter()
                run()
                spent = round(time.perf_counter() - started, 4)
                seconds.setdefault(axis.split(":")[0], {}).setdefault(label, {})[str(point)] = spent
    result = {"name": name, "machine": machine(), "seconds": seconds}
    save(result, _scaling_table(result))
    subplots, figure = axes(result, len(seconds))
    for subplot, (axis, lines) in zip(subplots if len(seconds) > 1 else [subplots], seconds.items()):
        for label, found in lines.items():
            subplot.plot([int(point) for point in found], list(found.values()), marker="o", label=label)
        subplot.set_xlabel(axis)
        subplot.set_ylabel("seconds")
        subplot.legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    return result


def _scaling_table(result: dict[str, Any]) -> str:
    lines = [where(result), "", "| axis | variant | seconds at each point |", "|---|---|---|"]
    for axis, variants in result["seconds"].items():
        for label, found in variants.items():
            lines.append(f"| {axis} | {label} | {', '.join(f'{x}: {y:.2f}' for x, y in found.items())} |")
    return "\n".join(lines) + "\n"


def axes(result: dict[str, Any], count: int = 1) -> tuple[Any, Any]:
    """Create a figure with a title that names the benchmark and the machine, and ``count`` axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, subplots = pyplot.subplots(1, count, figsize=(6.4 * count, 3.6), layout="constrained")
    info = result["machine"]
    figure.suptitle(f"{result['name']}, {info['date']}, {info['processor']}", fontsize=9)
    return subplots, figure


def where(result: dict[str, Any]) -> str:
    """One line with date, device, machine and version."""
    info = result["machine"]
    device = "" if info["accelerator"] == "none" else f" {info['accelerator']},"
    machine = f"{info['processor']}, {info['cores']} cores, {info['threads']} threads, torch {info['torch']}"
    made = f" at {info['commit']}" if "commit" in info else ""
    return f"{info['date']}{made},{device} {machine}"


def table(result: dict[str, Any]) -> str:
    """Markdown table of a comparison."""
    lines = [
        where(result),
        "",
        "| variant | median s | min - max s | speed-up |",
        "|---|---|---|---|",
    ]
    for label, runs in result["seconds"].items():
        spread = f"{min(runs):.3f} - {max(runs):.3f}"
        lines.append(f"| {label} | {result['median'][label]:.3f} | {spread} | {result['times_faster'][label]:.2f} |")
    return "\n".join(lines) + "\n"
