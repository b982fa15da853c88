"""Cost of a training step of `unime-tiny`: former options against today's, see `python benchmarks/train_step.py tiny`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness
import yaml

from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records
from unime_st.stages import InBatchArguments, train_in_batch
from unime_st.stages.configs import find_config

FORMER, TODAY, SMALL = (
    "gradient caching, items prepared anew, peft's layers",
    "today's configuration",
    "all weights, Muon",
)
_FORMER: dict[str, Any] = {"item_cache": 0, "gradient_caching": True, "mini_batch_size": 32, "token_budget": None}
_SMALL: dict[str, Any] = {"lora_rank": 0, "frozen": "visual", "optim": "muon"}


def variants() -> dict[str, dict[str, Any]]:
    """Options of each side; the first two train the same and must have the same losses."""
    today = yaml.safe_load(find_config("tiny", "in_batch").read_text(encoding="utf-8"))
    return {FORMER: {**today, **_FORMER}, TODAY: today, SMALL: {**today, **_SMALL}}


@contextmanager
def former_code() -> Iterator[None]:
    """Adapter, attention and last layer as peft and transformers compute them."""
    with (
        patch("unime_st.backbones.fast_modules.SDPA_GROUPED", "sdpa"),
        patch("unime_st.training.adapters.merge_lora_products"),
        patch("unime_st.training.distinct_items.needs_last_tokens_only", return_value=False),
    ):
        yield


def tiny(options: argparse.Namespace, work: Path) -> None:
    """Run the stage with the options of each side in turn; report seconds of a step and losses."""
    data = RecordSet.write(work / "records", training_records(options.records, seed=0), {}).folder
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in variants()}
    for repeat in range(options.repeats):
        for side, chosen in variants().items():
            output = work / f"{len(runs[side])}-{list(runs).index(side)}"
            with former_code() if side == FORMER else nullcontext():
                runs[side].append(_run(str(data), output, {**chosen, "max_steps": options.steps}))
            sys.stderr.write(f"{repeat + 1}, {side}: {runs[side][-1]['step']:.3f} s a step\n")
    curves = {side: found[0]["losses"] for side, found in runs.items()}
    before, after = curves[FORMER][:10], curves[TODAY][:10]
    if (unlike := max(abs(a / b - 1) for a, b in zip(after, before))) > 1e-4:
        raise RuntimeError(f"the losses of ten steps differ by {unlike:.1e}: {before}, {after}")
    result = {
        "name": "train_step_tiny",
        "machine": harness.machine(),
        "options": variants(),
        "steps": options.steps,
        "records": options.records,
        "runs": runs,
    }
    text = _table(result)
    harness.save(result, text)
    sys.stdout.write(text)


def _run(data: str, output: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """Run the stage; a step's seconds are those of the loop, the whole ones with loading, estimate and saving."""
    options = {**chosen, "data": data, "output": str(output), "logging_steps": 1}
    wall, cpu = time.perf_counter(), time.process_time()
    train_in_batch(InBatchArguments(**options))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    rows, steps = chosen["per_device_train_batch_size"], chosen["max_steps"]
    return {
        "step": statistics.fmean(rows / line["examples_per_second"] for line in lines),
        "whole_per_step": wall / steps,
        "cpu_per_step": cpu / steps,
        "losses": [line["loss"] for line in lines],
    }


def _table(result: dict[str, Any]) -> str:
    lines = [
        harness.where(result),
        "",
        "| options | s a step | times cheaper | whole stage, s a step | times cheaper | CPU s a step | loss of step 1 | 10 | "
        "last ten |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    medians = {
        side: {
            name: statistics.median(run[name] for run in runs) for name in ("step", "whole_per_step", "cpu_per_step")
        }
        for side, runs in result["runs"].items()
    }
    base = medians[FORMER]
    for side, found in medians.items():
        losses = result["runs"][side][0]["losses"]
        lines.append(
            f"| {side} | {found['step']:.3f} | {base['step'] / found['step']:.2f} | {found['whole_per_step']:.3f} | "
            f"{base['whole_per_step'] / found['whole_per_step']:.2f} | {found['cpu_per_step']:.3f} | {losses[0]:.5f} | "
            f"{losses[min(9, len(losses) - 1)]:.5f} | {statistics.fmean(losses[-10:]):.4f} |"
        )
    return "\n".join(lines) + "\n"
