"""Kill campaign: every stage is killed at random moments, run again, and compared with an uninterrupted run.

This process imports everything and loads the model; each run is a fork of it, so that a kill costs the work of the
stage and not the start of a program. The exit status is 1 if a run that was killed does not end in the same result.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file

from benchmarks.harness import machine, save, where
from unime_st import UniME
from unime_st.checkpoints import convert
from unime_st.checkpoints.plain_export import export_plain
from unime_st.data import RecordSet
from unime_st.data.importing import import_records
from unime_st.data.scenes import training_records
from unime_st.encoding import encode_to_shards
from unime_st.judging import LocalJudge
from unime_st.judging.judge_pools import judge_pools
from unime_st.judging.select_rows import select_rows
from unime_st.retrieval import Index, mine
from unime_st.stages import InBatchArguments, train_in_batch
from unime_st.training.model_merge import merge_models

SHARES = {
    "import": 14, "mine": 12, "judge": 14, "select": 6, "encode": 12, "index": 10, "convert": 8, "export": 8, "merge": 6,
    "training": 10,
}  # fmt: skip
"""Kills of each stage, in percent."""
CHECKPOINT = Path(__file__).parents[1] / "tests" / "golden" / "checkpoints" / "tiny-unime-v2-qwen2vl"
Stage = Callable[[Path], Any]


def stages(folder: Path, model: UniME, judge: LocalJudge) -> dict[str, Stage]:
    """The stages by name, each a function of its output folder; inputs of later ones are made in ``folder``."""
    source, records, pools, scores = (folder / name for name in ("rows.jsonl", "records", "pools", "scores"))
    source.write_text(
        "".join(json.dumps({"query": f"q{n} " * 20, "positive": f"p{n} " * 20}) + "\n" for n in range(3000))
    )
    RecordSet.write(records, training_records(60), {})
    texts = [f"a red circle beside {number} blue stars" for number in range(400)]

    def train(output: Path) -> None:
        train_in_batch(
            InBatchArguments(
                data=str(records),
                output=str(output),
                model="unime-tiny",
                max_steps=3,
                save_steps=1,
                use_cpu=True,
                per_device_train_batch_size=8,
            )
        )

    found: dict[str, Stage] = {
        "import": lambda output: import_records(source, output, workers=1),
        "mine": lambda output: mine(records, model, output, num_candidates=4, max_similarity=None),
        "judge": lambda output: judge_pools(pools, judge, output, shard_size=8),
        "select": lambda output: select_rows(scores, output, num_negatives=2),
        "encode": lambda output: encode_to_shards(model, texts, output, batch_size=8, show_progress_bar=False),
        "index": lambda output: Index.build(texts, model).save(output, overwrite=output.exists()),
        "convert": lambda output: convert(CHECKPOINT, "unime-v2-2b", output=output, overwrite=True),
        "export": lambda output: export_plain("unime-tiny", output, device="cpu", overwrite=True),
        "merge": lambda output: merge_models(["unime-tiny", "unime-tiny"], output, overwrite=True),
        "training": train,
    }
    for name, output in (("mine", pools), ("judge", scores)):
        if _finish(found[name], output):
            raise RuntimeError(f"the stage {name} fails without a kill")
    return found


def _start(stage: Stage, output: Path) -> int:
    """Run a stage in a child process and return its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(os.devnull, "w") as silence:
            os.dup2(silence.fileno(), 1)
            os.dup2(silence.fileno(), 2)
            torch.set_num_threads(1)
            stage(output)
            status = 0
    except BaseException as error:
        output.with_name(f"{output.name}.error").write_text(repr(error))
    finally:
        os._exit(status)


def _finish(stage: Stage, output: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(_start(stage, output), 0)[1])


def _killed(stage: Stage, output: Path, seconds: float) -> bool:
    """Start a stage and kill it after some time; whether it was still running."""
    child = _start(stage, output)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def difference(right: Path, found: Path) -> str:
    """First difference of two output folders; empty if there is none."""
    kinds = (".parquet", ".npy", ".safetensors", ".faiss")
    names = {path.relative_to(right) for path in right.rglob("*") if path.suffix in kinds}
    others = {path.relative_to(found) for path in found.rglob("*") if path.suffix in kinds}
    if names != others:
        return f"files {sorted(map(str, names ^ others))}"
    for name in sorted(names):
        if name.suffix == ".parquet":
            same = pq.read_table(right / name).equals(pq.read_table(found / name))
        elif name.suffix == ".npy":
            same = np.allclose(np.load(right / name), np.load(found / name), atol=2e-3, equal_nan=True)
        elif name.suffix == ".safetensors":
            one, two = load_file(right / name), load_file(found / name)
            same = one.keys() == two.keys() and all(np.allclose(one[key], two[key], atol=1e-6) for key in one)
        else:
            same = (right / name).stat().st_size == (found / name).stat().st_size
        if not same:
            return f"content of {name}"
    return "left-over files" if list(found.rglob("*.tmp")) else ""


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; the exit status is 1 if a result differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    options = parser.parse_args(argv)
    draw, rows = random.Random(options.seed), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        os.environ["UNIME_HOME"] = str(Path(root, "home"))
        model = UniME("unime-tiny", device="cpu")
        judge = LocalJudge("unime-tiny", template="tiny", device="cpu")
        for name, stage in stages(Path(root), model, judge).items():
            kills = round(options.kills * SHARES[name] / 100)
            row: dict[str, Any] = {"stage": name, "kills": kills, "running": 0, "lost": []}
            right, started = Path(root, f"{name}-right"), time.perf_counter()
            if _finish(stage, right):
                raise RuntimeError(
                    f"{name} fails without a kill: {right.with_name(right.name + '.error').read_text()}"
                )
            row["seconds"] = round(time.perf_counter() - started, 2)
            output = Path(root, f"{name}-killed")
            for kill in range(kills):
                running = _killed(stage, output, draw.uniform(0, row["seconds"]))
                row["running"] += running
                if running and draw.random() < 0.3 and kill + 1 < kills:
                    continue  # killed once more before it can finish
                fault = "the second run fails" if _finish(stage, output) else difference(right, output)
                row["lost"] += [f"{fault}: {_message(output)}"] if fault else []
                shutil.rmtree(output, ignore_errors=True)
            rows.append(row)
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
    result = {"name": "kill_campaign", "machine": machine(), "seed": options.seed, "stages": rows}
    table = _table(result)
    sys.stdout.write(table)
    save(result, table)
    return 1 if any(row["lost"] for row in rows) else 0


def _message(output: Path) -> str:
    path = output.with_name(f"{output.name}.error")
    return path.read_text()[:300] if path.is_file() else ""


def _table(result: dict[str, Any]) -> str:
    rows = result["stages"]
    lines = [
        f"{where(result)}; seed {result['seed']}",
        "",
        "| stage | seconds | kills | while running | not equal after |",
    ]
    lines.append("|---|---:|---:|---:|---:|")
    lines += [
        f"| {row['stage']} | {row['seconds']} | {row['kills']} | {row['running']} | {len(row['lost'])} |"
        for row in rows
    ]
    total = [sum(row[key] for row in rows) for key in ("kills", "running")]
    lines.append(f"| all | | {total[0]} | {total[1]} | {sum(len(row['lost']) for row in rows)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
