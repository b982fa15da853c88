"""Speed table of the README, made from the records in ``benchmarks/results``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECORDS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
BEGIN, END = "<!-- speed: python benchmarks/all.py --readme -->\n", "<!-- end of speed -->\n"
LIMIT = 1.02
"""Our seconds over the baseline's up to which a workload counts as not slower."""
Record = dict[str, Any]
_STOCK_LOSS = "`CachedMultipleNegativesRankingLoss`"


def _medians(record: Record, ours: str | None = None) -> tuple[float, float]:
    """Seconds of the baseline and of ours, by default the last variant."""
    medians = record["median"]
    return next(iter(medians.values())), medians[ours] if ours else list(medians.values())[-1]


def _paths(record: Record) -> tuple[float, float]:
    return record["median"]["stock"]["seconds"], record["median"]["ours"]["seconds"]


def _stages(record: Record) -> tuple[float, float]:
    """Seconds per step of the whole stage: the former default and today's."""
    former, today = (
        statistics.median(run["whole_per_step"] for run in runs) for runs in list(record["runs"].values())[:2]
    )
    return former, today


def _against(baseline: str, ours: str) -> Callable[[Record], tuple[float, float]]:
    return lambda record: (record["median"][baseline], record["median"][ours])


class Row(NamedTuple):
    """A row: task, baseline, name of the record and of its run, and how seconds are read from it."""

    task: str
    baseline: str
    record: str
    run: str
    seconds: Callable[[Record], tuple[float, float]] = _medians


_ENCODE, _PREDICT = "`SentenceTransformer.encode`", "`CrossEncoder.predict`"
ROWS = (
    Row("MMEB's 36 subsets with `unime-tiny`", "mteb's stock path", "mmeb_eval", "mmeb_eval", _paths),
    Row("encode mixed inputs, 20 % repeats", _ENCODE, "encode_20_percent_repeats", "encode"),
    Row("encode mixed inputs, no repeats", _ENCODE, "encode_without_repeats", "encode"),
    Row("encode 8-frame videos, three questions of each", _ENCODE, "video_shared", "video"),
    Row("encode 8-frame videos, one question of each", _ENCODE, "video_not_shared", "video"),
    Row("judge 50 texts for each of 8 images", _PREDICT, "judge_image_query_short_texts", "judge"),
    Row("judge 50 texts for each of 8 texts", _PREDICT, "judge_text_query_short_texts", "judge"),
    Row("judge images that recur", _PREDICT, "judge_text_query_recurring_images", "judge"),
    Row("judge images that do not recur", _PREDICT, "judge_text_query_distinct_images", "judge"),
    Row("the same with Qwen3-VL", _PREDICT, "judge_qwen3_vl_text_query_distinct_images", "judge_qwen3_vl"),
    Row("rank 50 texts for an image, pairwise", "`CrossEncoder.rank`", "rerank_pairwise", "rerank"),
    Row("rank 10 texts in one list", "generating the answer", "rerank_listwise", "rerank"),
    Row("training step of 32 pairs, LoRA", _STOCK_LOSS, "train_step_speed", "train_step"),
    Row(
        "training step of 4 queries with positive and 8 negatives",
        _STOCK_LOSS,
        "train_step_v2",
        "train_step_v2",
        _against("Sentence Transformers, eager images", "unime_st"),
    ),
    Row("step of the stage `in_batch tiny`", "its former default", "train_step_tiny", "train_step_tiny", _stages),
    Row(
        "exact top 50 of 50,000 for 2,048 queries",
        "`faiss.IndexFlatIP`",
        "retrieval",
        "retrieval",
        _against("faiss.IndexFlatIP", "top_k"),
    ),
    Row(
        "exact top 50 of a million for 10,000 queries",
        "the matrix products alone",
        "retrieval_1000000",
        "retrieval_1m",
        _against("matrix products alone", "top_k"),
    ),
    Row("build a flat `Index` of 100,000 vectors", "the same faiss calls", "index_beside_faiss_build", "index_faiss"),
    Row("search it for 1,000 queries", "the same faiss calls", "index_beside_faiss_search", "index_faiss"),
)

OTHERS = ("grid", "train_step_memory")
"""Records of the text below the table, beside those of rows."""


def read(name: str) -> Record | None:
    """A record, or None if it was not made."""
    path = RECORDS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def found() -> list[tuple[Row, Record]]:
    """Rows whose record exists."""
    pairs = [(row, read(row.record)) for row in ROWS]
    return [(row, record) for row, record in pairs if record is not None]


def times(value: float) -> str:
    """A ratio with two decimals, or one from ten on."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def section() -> str:
    """The text between the two markers."""
    rows = found()
    records = [record for _, record in rows] + [record for record in map(read, OTHERS) if record is not None]
    machines = [record["machine"] for record in records]
    dates = sorted({machine["date"] for machine in machines if "date" in machine})
    commits = sorted({machine["commit"] for machine in machines if "commit" in machine})
    threads = sorted({machine["threads"] for machine in machines})
    made = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lines = [
        _wrapped(
            f"{made}, {machines[0]['processor']}, {' or '.join(map(str, threads))} threads, commit "
            f"{', '.join(commits) or 'not recorded'}. Random mid-size models unless a model is named. The total is the whole "
            "wall time of the baseline / of ours: medians of alternating runs in float32. Below 1 is slower. `python benchmarks/all.py --only NAME` repeats a row, and "
            "without `--only` all of them."
        ),
        "",
        "| task | baseline | total, s | speed-up (x) | `--only` |",
        "|---|---|---:|---:|---|",
    ]
    slower = []
    for row, record in rows:
        baseline, ours = row.seconds(record)
        lines.append(
            f"| {row.task} | {row.baseline} | {baseline:.3g} / {ours:.3g} | {times(baseline / ours)} | `{row.run}` |"
        )
        if ours * LIMIT > baseline:
            slower.append(f"{row.task} ({times(baseline / ours)})")
    lines += ["", _wrapped(f"**Not faster:** {'; '.join(slower) or 'none of these'}.{_grid()}"), *_memory()]
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> str:
    return fill(text, 119, break_long_words=False, break_on_hyphens=False)


def _grid() -> str:
    record = read("grid")
    if record is None:
        return ""
    cells = record["cells"]
    over, worst = [cell for cell in cells if cell["ratio"] > LIMIT], max(cells, key=lambda cell: cell["ratio"])
    return (
        f" On a grid of {len(cells)} uniform workloads (`grid`: images of one size, texts of one length or mixed, 1 to 512 "
        f"inputs) `UniME.encode` takes {statistics.median(cell['ratio'] for cell in cells):.2f} of the stock class's time, "
        f"and more than {LIMIT} in {len(over)}; the worst is {worst['ratio']:.2f}, {worst['inputs']} x {worst['kind']}, "
        f"{worst['model']} model, {worst['threads']} thread{'s' if worst['threads'] > 1 else ''}."
    )


def _memory() -> list[str]:
    """Peak memory of MMEB, with the ratios of its single runs, and of a training step."""
    mmeb, step = read("mmeb_eval"), read("train_step_memory")
    if mmeb is None or step is None:
        return []
    runs = [stock["seconds"] / ours["seconds"] for stock, ours in zip(*mmeb["runs"].values(), strict=True)]
    stock, ours = step["found"].values()
    growth = ours["4096"]["mib"] / ours["64"]["mib"] - 1
    text = (
        f"**Memory:** MMEB takes {mmeb['peak_memory_share']:.2f} of the stock path's peak (single runs were "
        f"{' and '.join(map(times, runs))} times as fast), a training step of 1,024 pairs {ours['1024']['mib'] / 1024:.3g} GiB, "
        f"against {stock['1024']['mib'] / 1024:.3g} GiB of the stock cached loss; from 64 to 4,096 pairs ours grows by "
        f"{growth:.1%} "
        "(`train_step_memory`)."
    )
    return ["", _wrapped(text)]


def write_readme() -> None:
    """Replace the text between the markers in README.md."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + section() + END + rest.split(END)[1], encoding="utf-8")
