"""Judging: CrossEncoder.predict against the judge's engine, 50 candidates per query, the same weights and scores.

python benchmarks/judge.py [--device cuda --size 2b --queries 8] [--family qwen3_vl] [--candidates 50 --repeats 3]

FLOPs are counted on both sides; their ratio is the speed-up that the engine promises. CrossEncoder has the attention and
the patch projection of transformers, as a model has that is loaded without us.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from sentence_transformers import CrossEncoder
from torch.nn import Conv3d, Identity
from torch.utils.flop_counter import FlopCounterMode
from workloads import SIZES, images, random_qwen2_5_vl, random_qwen3_vl, sentences

from unime_st import Item
from unime_st.backbones.patch_projection import PatchProjection
from unime_st.judging import Group, LocalJudge

STOCK, ENGINE = "CrossEncoder.predict", "LocalJudge.score"
ALL_PAIRS = 662_000 * 50


def mixes(work: Path, queries: int, candidates: int, *, more: int = 1) -> dict[str, list[Group]]:
    """Workloads: what is asked and what is judged.

    Args:
        work: Output folder of the images.
        queries: Number of queries of a mix.
        candidates: Number of candidates of a query.
        more: How many times as many queries with short texts there are, which are judged in milliseconds. Defaults to 1.
    """
    shown = [Item(image=path) for path in images(work, queries * max(candidates, more), shortest=300, longest=400)]
    captions = [Item(text) for text in sentences(more * queries * candidates, least=5, most=15)]
    rng = np.random.default_rng(0)

    def drawn(number: int) -> list[Item]:
        return [captions[number * candidates + index] for index in range(candidates)]

    def recurring() -> list[Item]:
        return [shown[index] for index in rng.permutation(candidates // 2)]

    return {
        "image query, short texts": [Group(shown[number], drawn(number)) for number in range(more * queries)],
        # As in mining, where an image is a candidate of many queries.
        "text query, recurring images": [Group(captions[number], recurring()) for number in range(4 * queries)],
        "text query, short texts": [Group(captions[number], drawn(number)) for number in range(more * queries)],
        # Nothing is shared but the query: as with the reranker, and the hardest for the engine.
        "text query, distinct images": [
            Group(captions[number], shown[number * candidates : number * candidates + candidates // 2])
            for number in range(queries)
        ],
    }


def stock_model(judge: LocalJudge) -> CrossEncoder:
    """The judge's model as it is without us."""
    model: Any = copy.deepcopy(judge.model)
    model[0].model.set_attn_implementation("sdpa")
    for module in model.modules():
        if type(module) is PatchProjection:
            module.__class__ = Conv3d  # type: ignore[assignment]
    return model  # type: ignore[no-any-return]


def measure(judge: LocalJudge, model: CrossEncoder, groups: list[Group], name: str, chosen: Any) -> dict[str, Any]:
    """Compare both ways on one workload.

    Args:
        judge: The engine.
        model: Its model as it is without us.
        groups: The workload.
        name: Stem of the result's files.
        chosen: Command line.
    """
    pairs = [(group.query.to_input(), item.to_input()) for group in groups for item in group.candidates]
    scores: dict[str, np.ndarray] = {}

    def stock() -> None:
        size = judge.scorer.batch_size
        scores[STOCK] = model.predict(pairs, batch_size=size, activation_fn=Identity())

    def engine() -> None:
        judge.scorer.clear()  # every run sees its images anew
        scores[ENGINE] = np.concatenate(judge.score(groups))

    variants = {STOCK: stock, ENGINE: engine}
    operations = {}
    for label, run in variants.items():
        with FlopCounterMode(display=False) as counter:
            run()
        operations[label] = counter.get_total_flops()
    promised = operations[STOCK] / operations[ENGINE]
    facts = {"pairs": len(pairs), "flop": operations, "promised": round(promised, 2), "size": chosen.size}
    facts["largest_difference"] = float(np.abs(scores[STOCK] - scores[ENGINE]).max())
    cpu: dict[str, list[float]] = {label: [] for label in variants}
    timed = {label: partial(_count_cpu, run, cpu[label]) for label, run in variants.items()}
    result = harness.compare(name, timed, repeats=chosen.repeats, facts=facts)
    result["share_of_promise"] = round(result["times_faster"][ENGINE] / promised, 2)
    stock_cpu, engine_cpu = (statistics.median(cpu[label][1:]) for label in variants)
    result["cpu_share_of_promise"] = round(stock_cpu / engine_cpu / promised, 2)
    seconds = result["median"][ENGINE]
    result["pairs_per_second"] = round(len(pairs) / seconds, 2)
    result["hours_for_662k_times_50"] = round(ALL_PAIRS / (len(pairs) / seconds) / 3600, 1)
    if chosen.device == "cuda":
        result["matrix_rate"] = matrix_rate()
        result["mfu"] = round(operations[ENGINE] / seconds / result["matrix_rate"], 3)
    harness.save(result, harness.table(result) + "\n" + summary(result))
    return result


def _count_cpu(run: Callable[[], None], seconds: list[float]) -> None:
    started = time.process_time()
    run()
    seconds.append(time.process_time() - started)


def summary(result: dict[str, Any]) -> str:
    """Promised and reached, in words."""
    told = (
        f"{result['pairs']} pairs; FLOP ratio {result['promised']:.2f}, speed-up "
        f"{result['times_faster'][ENGINE]:.2f} ({result['share_of_promise']:.0%}, of CPU time {result['cpu_share_of_promise']:.0%}); scores differ by at most "
        f"{result['largest_difference']:.1e}; {result['pairs_per_second']} pairs/s, 662k x 50 would take "
        f"{result['hours_for_662k_times_50']:,} hours here"
    )
    return told + (f"; {result['mfu']:.0%} of the measured matrix rate\n" if "mfu" in result else "\n")


def matrix_rate(side: int = 8192, repeats: int = 20) -> float:
    """Floating-point operations a second of a large bfloat16 product on this device.

    Args:
        side: Rows and columns.
        repeats: Products.
    """
    left = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    for timed in (False, True):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats if timed else 3):
            left @ left
        torch.cuda.synchronize()
    return 2 * side**3 * repeats / (time.perf_counter() - started)


def main() -> None:
    """Measure every mix and print."""
    parser = harness.options(__doc__, repeats=3)
    parser.add_argument("--family", choices=("qwen2_5_vl", "qwen3_vl"), default="qwen2_5_vl", help="random model")
    parser.add_argument("--size", choices=tuple(SIZES), default="mid", help="size of the model")
    parser.add_argument("--queries", type=int, default=2, help="queries of each mix")
    parser.add_argument("--candidates", type=int, default=50, help="candidates of each query")
    parser.add_argument("--batch_size", type=int, default=32, help="pairs per forward pass, for both")
    parser.add_argument("--template", default="tiny", help="prompt: official or tiny")
    chosen = parser.parse_args()
    kind = {"dtype": torch.bfloat16} if chosen.device == "cuda" else {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make = random_qwen2_5_vl if chosen.family == "qwen2_5_vl" else random_qwen3_vl
        made = make(work / "model", chosen.size, chosen.device)
        judge = LocalJudge(
            str(made),
            template=chosen.template,
            batch_size=chosen.batch_size,
            device=chosen.device,
            model_kwargs=kind,
            image_tokens=(4, 300),
        )
        if judge.scorer.obstacle:
            raise SystemExit(f"nothing to compare: {judge.scorer.obstacle}")
        model = stock_model(judge)
        for name, groups in mixes(work / "images", chosen.queries, chosen.candidates, more=8).items():
            words = name.replace(",", "").split()
            stem = "_".join(["judge", *([] if chosen.family == "qwen2_5_vl" else [chosen.family]), *words])
            result = measure(judge, model, groups, stem, chosen)
            sys.stdout.write(f"{name}\n{harness.table(result)}{summary(result)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
