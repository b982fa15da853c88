"""Effect of training and ranking techniques on drawn scenes, as paired differences over seeds.

    python benchmarks/techniques.py --seeds 3 --output runs/techniques

Every seed has records, a first training (UniME stage 2), mined pools and judged rows of its own. All arms go on from the
first training with the same steps, batch and rate; `in_batch_compute` is the control with as many encoded items as the
arms with mined negatives. A killed run resumes. Written: ``techniques.json`` beside the other results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, machine

from mteb_tasks import TwoStage, scenes, wrap
from mteb_tasks.in_process import evaluate
from mteb_tasks.loader import UniMELoader
from unime_st import UniME, UniMEReranker, stages
from unime_st.data.manifest import is_complete
from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records
from unime_st.files import read_json, write_json
from unime_st.judging import LocalJudge
from unime_st.judging.calibration import calibrate
from unime_st.reranking.fusion import fit_fusion
from unime_st.retrieval import Pools
from unime_st.training.model_merge import greedy_soup, merge_models

TASKS = ("ScenesShortT2IRetrieval", "ScenesShortI2TRetrieval", "ScenesLongT2IRetrieval", "ScenesLongI2TRetrieval")
CONTROL = "in_batch"
NEGATIVES = 5
ALL_DIRECTIONS = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
TEMPERATURE = 0.05
DISTILLATION: dict[str, Any] = {
    "labels": "log_odds",
    "divergence": "kl",
    "label_temperature": 1.0,
    "in_batch_weight": 0.0,
}
SHORT_DIM = 32
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"precision": "int8"},
    "binary": {"precision": "binary"},
    f"{SHORT_DIM} dimensions": {"truncate_dim": SHORT_DIM},
    f"{SHORT_DIM} dimensions, int8": {"truncate_dim": SHORT_DIM, "precision": "int8"},
    f"{SHORT_DIM} dimensions, binary": {"truncate_dim": SHORT_DIM, "precision": "binary"},
}
"""Vector formats that the control and the arms trained for them are evaluated in."""


class Seed:
    """One seed: its folder and the options that all its trainings share."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.folder = Path(options.output) / f"seed-{seed}"

    def path(self, name: str) -> str:
        """Folder of a stage."""
        return str(self.folder / name)

    def common(self, name: str, start: str, data: str, steps: int, rate: float) -> dict[str, Any]:
        """Options of a training."""
        return {
            "model": start, "data": self.path(data), "output": self.path(name), "max_steps": steps,
            "per_device_train_batch_size": self.options.batch_size, "learning_rate": rate, "seed": self.seed,
            "temperature": TEMPERATURE, "lora_rank": 32, "lora_alpha": 64, "lora_dropout": 0.0,
            "token_budget": 2048, "gradient_caching": False, "item_cache": 512, "logging_steps": 10, "save_steps": 100,
        }  # fmt: skip

    def prepare(self) -> None:
        """Records, first training, pools and judged rows."""
        for name, size, seed in (("records", self.options.records, self.seed), ("held_out", 300, 1000 + self.seed)):
            if not is_complete(self.path(name)):
                RecordSet.write(self.path(name), training_records(size, seed=seed), {"seed": seed})
        common = self.common("warm", "unime-tiny", "records", self.options.warm_steps, 3e-3)
        stages.train_hard_negatives(stages.HardNegativeArguments(**common))
        stages.run_mine(
            stages.MineArguments(
                data=self.path("records"), model=self.path("warm"), output=self.path("pools"),
                num_candidates=24, pool="dataset", max_similarity="none",
            )
        )  # fmt: skip
        for order in ("query_first", "both"):
            stages.run_judge(
                stages.JudgeArguments(
                    data=self.path("pools"), scores=self.path(f"scores-{order}"), output=self.path(f"rows-{order}"),
                    pair_order=order, stride=4, batch_size=128, num_negatives=NEGATIVES, seed=self.seed,
                )
            )  # fmt: skip

    def in_batch(self, name: str, steps: int | None = None, **more: Any) -> None:
        """Train an arm of in-batch InfoNCE."""
        data = "rows-query_first" if "num_negatives" in more else "records"
        common = self.common(name, self.path("warm"), data, steps or self.options.steps, 1e-3)
        stages.train_in_batch(stages.InBatchArguments(**common, **more))

    def soft_labels(self, name: str, rows: str = "rows-query_first", **more: Any) -> None:
        """Train an arm of UniME-V2, with in-batch term."""
        more = {"label_temperature": TEMPERATURE, "num_negatives": NEGATIVES, "in_batch_weight": 1.0, **more}
        common = self.common(name, self.path("warm"), rows, self.options.steps, 1e-3)
        stages.train_soft_labels(stages.SoftLabelArguments(**common, **more))

    def soup(self, name: str, parts: list[str], *, greedy: bool = False) -> None:
        """Merge arms that are there."""
        if (self.folder / name / "modules.json").is_file():
            return
        folders = [self.path(part) for part in parts]
        if greedy:
            greedy_soup(folders, self.path(name), self.path("held_out"))
        else:
            merge_models(folders, self.path(name))


def trainings(run: Seed) -> dict[str, Callable[[], None]]:
    """The arms by name; later ones may need earlier ones."""
    clusters: dict[str, Any] = {
        "cluster_pools": run.path("pools"),
        "cluster_size": 8,
        "cluster_skip": 1,
        "cluster_candidates": 8,
    }
    masked: dict[str, Any] = {"false_negative_margin": 0.1}
    equal = run.options.steps * (2 + NEGATIVES) // 2
    return {
        CONTROL: lambda: run.in_batch(CONTROL),
        "in_batch_compute": lambda: run.in_batch("in_batch_compute", equal),
        "mask": lambda: run.in_batch("mask", **masked),
        "hardness": lambda: run.in_batch("hardness", hardness_strength=9.0),
        "learnable_temperature": lambda: run.in_batch("learnable_temperature", learnable_temperature=True),
        "directions": lambda: run.in_batch("directions", directions=ALL_DIRECTIONS),
        "clusters": lambda: run.in_batch("clusters", **clusters, **masked),
        "negatives": lambda: run.in_batch("negatives", num_negatives=NEGATIVES, **masked),
        "v2": lambda: run.soft_labels("v2"),
        "v2_mask": lambda: run.soft_labels("v2_mask", **masked),
        "v2_both_orders": lambda: run.soft_labels("v2_both_orders", "rows-both"),
        "distilled": lambda: run.soft_labels("distilled", "rows-both", **DISTILLATION),
        "short_vectors": lambda: run.in_batch("short_vectors", matryoshka_dims=[128, SHORT_DIM]),
        "quantized": lambda: run.in_batch(
            "quantized", matryoshka_dims=[128, SHORT_DIM], quantization_aware=["int8", "binary"]
        ),
        "soup": lambda: run.soup("soup", ["distilled", "clusters"]),
        "greedy_soup": lambda: run.soup(
            "greedy_soup", ["mask", "clusters", "directions", "v2_mask", "distilled"], greedy=True
        ),
    }


def rankings(run: Seed) -> dict[str, dict[str, Any]]:
    """Settings of two-stage models over the greedy soup, the shipped judge as reranker."""
    embedder, judge = UniME(run.path("greedy_soup")), UniMEReranker("unime-tiny")
    records = RecordSet.load(run.path("held_out"))
    fitted = fit_fusion(records, embedder, judge, pair_order="both")
    return {
        "reranker": {},
        "reranker_both_orders": {"pair_order": "both"},
        "fusion": {"alpha": 1 / TEMPERATURE, "pair_order": "both"},
        "fusion_fitted": {"alpha": fitted, "pair_order": "both"},
    }


def hits(model: Any, size: int, seed: int) -> dict[str, float]:
    """hit@1 of a model in every task."""
    scores = evaluate(model, [getattr(scenes, task)(size=size, data_seed=seed) for task in TASKS])
    return {task: next(iter(scores[task].values()))["hit_rate_at_1"] for task in TASKS}


def measure(options: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Train and evaluate all arms of a seed; what is there is not done again."""
    run = Seed(options, seed)
    kept = run.folder / "hits.json"
    run.prepare()
    found: dict[str, dict[str, float]] = read_json(kept) if kept.is_file() else {}
    for name, train in trainings(run).items():
        train()
        if name not in found:
            found[name] = hits(UniME(run.path(name)), options.eval_size, seed)
            write_json(kept, found)
    for name in (CONTROL, "short_vectors", "quantized"):
        for label, settings in FORMATS.items():
            if f"{name}, {label}" not in found:
                kept_vectors = run.folder / "embeddings" / name  # whole ones, for all formats
                model = UniMELoader(
                    f"unime/{name}", "1", model=UniME(run.path(name)), cache_folder=kept_vectors, **settings
                )
                found[f"{name}, {label}"] = hits(model, options.eval_size, seed)
                write_json(kept, found)
    for name, settings in rankings(run).items():
        if name not in found:
            two_stages = TwoStage(
                wrap(UniME(run.path("greedy_soup")), "unime/soup"), UniMEReranker("unime-tiny"),
                method="pairwise", top_k=10, batch_size=128, **settings,
            )  # fmt: skip
            found[name] = hits(two_stages, options.eval_size, seed)
            write_json(kept, found)
    return found


def table(by_seed: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """One row per arm: mean hit@1, and its paired difference from the control with the standard error over seeds."""
    rows = []
    for name in by_seed[0]:
        means = [statistics.fmean(found[name].values()) for found in by_seed]
        gains = [mean - statistics.fmean(found[CONTROL].values()) for mean, found in zip(means, by_seed, strict=True)]
        error = float(np.std(gains, ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else None
        per_task = {task: statistics.fmean(found[name][task] for found in by_seed) for task in TASKS}
        rows.append(
            {
                "arm": name,
                "hit@1": statistics.fmean(means),
                "gain": statistics.fmean(gains),
                "error": error,
                **per_task,
            }
        )
    return rows


def main() -> None:
    """Measure all seeds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/techniques", help="working folder (default: runs/techniques)")
    parser.add_argument(
        "--seeds", type=int, default=3, help="seeds, each with data and trainings of its own (default: 3)"
    )
    parser.add_argument("--records", type=int, default=1500, help="training pairs of a seed (default: 1500)")
    parser.add_argument("--warm_steps", type=int, default=100, help="steps of the first training (default: 100)")
    parser.add_argument("--steps", type=int, default=60, help="steps of every arm (default: 60)")
    parser.add_argument("--batch_size", type=int, default=64, help="rows per step (default: 64)")
    parser.add_argument("--eval_size", type=int, default=250, help="queries per held-out task (default: 250)")
    options = parser.parse_args()
    by_seed = [measure(options, seed) for seed in range(options.seeds)]
    pools = Pools(Seed(options, 0).path("pools"))
    orders = calibrate([LocalJudge("unime-tiny")], pools)["pair_orders"]
    chosen = {name: value for name, value in vars(options).items() if name != "output"}
    facts = {"options": chosen, "machine": machine(), "pair_orders": orders}
    result = {"arms": table(by_seed), "by_seed": by_seed, **facts}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "techniques.json").write_text(json.dumps(result, indent=2) + "\n")
    for row in result["arms"]:
        error = "" if row["error"] is None else f" +- {100 * row['error']:.1f}"
        sys.stdout.write(f"{row['arm']:24s} {100 * row['hit@1']:5.1f}  {100 * row['gain']:+5.1f}{error}\n")


if __name__ == "__main__":
    main()
