"""Record of all benchmarks: runs every script one after the other and writes the speed table of the README.

python benchmarks/all.py                  # about an hour on two quiet cores
python benchmarks/all.py --only judge     # one of them
python benchmarks/all.py --list           # names, commands, estimated minutes
python benchmarks/all.py --readme         # the table of README.md from the results

Results that were made at this commit are kept, so that an interrupted record continues. Runs marked as long are made only
by name or with ``--long``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import harness
from speed_table import write_readme

BENCHMARKS = Path(__file__).parent


class Run(NamedTuple):
    """One command: its name, its words, estimated minutes on two cores, the results it writes, and whether it is long."""

    name: str
    words: str
    minutes: float
    results: tuple[str, ...]
    long: bool = False


_ENCODE = ("20_percent_repeats", "without_repeats", "throughput", "scaling", "memory", "overhead")
_MIXES = (
    "image_query_short_texts",
    "text_query_recurring_images",
    "text_query_short_texts",
    "text_query_distinct_images",
)
RUNS = (
    Run(
        "encode",
        "encode.py --inputs 30 --repeats 3 --memory_images 1000 --texts 10000",
        5,
        tuple(f"encode_{name}" for name in _ENCODE),
    ),
    Run("mmeb_eval", "mmeb_eval.py --documents 1000 --side 112 --images 80 --repeats 2", 9, ("mmeb_eval",)),
    Run(
        "mmeb_eval_photos",
        "mmeb_eval.py --model mid --photos 200 1600 --subsets 6 --queries 40 --candidates 40 --documents 60 --images 0",
        5,
        ("mmeb_eval_photos",),
    ),
    Run("judge", "judge.py --queries 1 --repeats 3", 5, tuple(f"judge_{mix}" for mix in _MIXES)),
    Run(
        "judge_qwen3_vl",
        "judge.py --family qwen3_vl --queries 1 --repeats 2",
        3,
        tuple(f"judge_qwen3_vl_{mix}" for mix in _MIXES),
    ),
    Run("rerank", "rerank.py --queries 1 --repeats 3", 1.5, ("rerank_listwise", "rerank_pairwise")),
    Run("train_step", "train_step.py speed --repeats 2", 3, ("train_step_speed",)),
    Run("train_step_v2", "train_step.py v2 --repeats 2", 1.5, ("train_step_v2",)),
    Run("train_step_tiny", "train_step.py tiny --steps 200 --repeats 1", 4, ("train_step_tiny",)),
    Run(
        "train_step_memory",
        "train_step.py memory --batches 64 1024 4096 --stock_batches 64 1024",
        12,
        ("train_step_memory",),
    ),
    Run("video", "video.py --repeats 2", 2, ("video_shared", "video_not_shared")),
    Run("retrieval", "retrieval.py --queries 2048 --corpus 50000", 1.5, ("retrieval", "retrieval_memory")),
    Run(
        "retrieval_1m",
        "retrieval.py --queries 10000 --corpus 1000000 --dim 512 --repeats 1 --products_only",
        4,
        ("retrieval_1000000",),
    ),
    Run(
        "index_faiss",
        "index.py --beside_faiss --vectors 100000 --repeats 3 --threads 2",
        1.5,
        tuple(f"index_beside_faiss_{part}" for part in ("build", "search", "engine_build", "engine_search")),
    ),
    Run("growth", "growth.py", 6.5, ("growth",)),
    Run("grid", "grid.py --seconds 1.5 --gflop 60", 8, ("grid",)),
    Run("index", "index.py --vectors 100000", 4, ("index_100000",), long=True),
    Run("visdoc", "visdoc.py", 4, ("visdoc",), long=True),
    Run("serve", "serve.py", 8, ("serve",), long=True),
    Run("index_1m", "index.py --vectors 1000000 --queries 500", 45, ("index_1000000",), long=True),
    Run("kill_campaign", "kill_campaign.py", 30, ("kill_campaign",), long=True),
    Run("fuzz", "fuzz.py", 30, ("fuzz",), long=True),
    Run("techniques", "techniques.py --seeds 3", 180, ("techniques",), long=True),
)


def made(run: Run) -> bool:
    """Whether all results of a run are of this commit."""
    files = [harness.RESULTS / f"{name}.json" for name in run.results]
    found = [json.loads(file.read_text()).get("machine", {}) for file in files if file.is_file()]
    return len(found) == len(files) and all(machine.get("commit") == harness.commit() for machine in found)


def record(runs: list[Run], *, again: bool) -> list[str]:
    """Run commands one after the other; return the names of those that failed."""
    failed, begun = [], time.perf_counter()
    for run in runs:
        if not again and made(run):
            sys.stdout.write(f"{run.name}: kept, made at this commit\n")
            continue
        sys.stdout.write(f"{run.name}: python benchmarks/{run.words} (about {run.minutes:g} min)\n")
        sys.stdout.flush()
        started = time.perf_counter()
        command = [sys.executable, *shlex.split(f"{BENCHMARKS}/{run.words}")]
        if subprocess.run(command, check=False).returncode:
            failed.append(run.name)
        spent, total = (time.perf_counter() - moment for moment in (started, begun))
        state = "FAILED" if run.name in failed else "done"
        sys.stdout.write(f"{run.name}: {state} in {spent / 60:.1f} min, {total / 60:.1f} min in all\n\n")
    return failed


def main() -> None:
    """Record the chosen benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS], help="names of runs, made again")
    parser.add_argument("--long", action="store_true", help="include the long runs")
    parser.add_argument("--list", action="store_true", help="list the runs and exit")
    parser.add_argument("--readme", action="store_true", help="write the table of README.md from the results and exit")
    chosen = parser.parse_args()
    if chosen.readme:
        write_readme()
        return
    runs = [run for run in RUNS if (run.name in chosen.only if chosen.only else chosen.long or not run.long)]
    sys.stdout.writelines(
        f"{run.name:18} {run.minutes:5g} min{' (long)' if run.long else '':8} python benchmarks/{run.words}\n"
        for run in (RUNS if chosen.list else runs)
    )
    sys.stdout.write(f"estimated: {sum(run.minutes for run in runs):g} min\n\n")
    if not chosen.list and (failed := record(runs, again=bool(chosen.only))):
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
