"""Pairs of one's own: import, train, mine, judge, soft labels, rerank, evaluate beside the controls.

As in the demo, this process only says what happens; whatever needs torch is done in others.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from train_scripts.demo.jobs import Job, alone, side_by_side
from train_scripts.demo.results import CONTROL, MEAN, Difference, render_table
from train_scripts.demo.settings import OWN_JUDGE_QUALITY, OwnDataArguments
from unime_st.files import read_json, write_json
from unime_st.training import LOG

logger = logging.getLogger(__name__)
MODELS = {
    "base": "untrained",
    "warm": "in-batch InfoNCE (start of the compared models)",
    "in_batch": "control: in-batch InfoNCE, equal steps",
    "believed": "UniME-V2, the judge believed",
    "trusted": "UniME-V2, the pairs trusted",
    "soup": "weights of UniME-V2 (pairs trusted) and control averaged",
    "reranked": "UniME-V2 (pairs trusted) + judge as reranker, fused",
}
"""Display names of the models, in display order."""
_TRAINED = ("trusted", "believed", "in_batch")


def _import(arguments: OwnDataArguments) -> None:
    from train_scripts.demo.own_stages import import_pairs

    import_pairs(arguments)


def _prepare(arguments: OwnDataArguments, seed: int) -> None:
    from train_scripts.demo.own_stages import prepare

    prepare(arguments, seed)


def _train(arguments: OwnDataArguments, seed: int, name: str) -> None:
    from train_scripts.demo.own_stages import train

    train(arguments, seed, name)


def _evaluate(arguments: OwnDataArguments, seed: int, name: str, results: Path) -> None:
    from train_scripts.demo.own_stages import evaluate

    evaluate(arguments, seed, name, results)


def _do(jobs: Sequence[Job], title: str) -> None:
    for done in side_by_side(jobs, title) if jobs else ():
        logger.info("%s took %.0f CPU seconds.", done.name, done.seconds)


def run_own_data(arguments: OwnDataArguments) -> dict[str, list[dict[str, float]]]:
    """Train and evaluate on one's own pairs; whatever a killed run finished is kept.

    Args:
        arguments: Options; ``data`` and ``test`` name the pairs.

    Returns:
        By model one ``{dataset: hit rate at 1, ..., "mean": ...}`` per seed, also in ``results.json`` of the output.
    """
    if not arguments.data or not arguments.test:
        raise ValueError("name the training and the held-out pairs: --data TRAIN --test TEST.")
    a, output = arguments, Path(arguments.output)
    folders = {seed: output / f"seed-{seed}" for seed in range(a.seed, a.seed + a.seeds)}
    alone(partial(_import, a))
    logger.info("First in-batch InfoNCE, from which every compared model goes on; then mining and judging.")
    if a.seeds == 1:  # with the bars and estimates of its stages
        alone(partial(_prepare, a, a.seed))
    else:
        first = [
            Job(f"preparation of seed {seed}", partial(_prepare, a, seed), a.warm_steps, folder / "warm" / LOG)
            for seed, folder in folders.items()
        ]
        _do(first, "first training, mining and judging")
    logger.info("Then the same number of further steps, with and without the judged negatives.")
    trainings = [
        Job(f"{name} of seed {seed}", partial(_train, a, seed, name), a.steps, folder / name / LOG)
        for seed, folder in folders.items()
        for name in _TRAINED
    ]
    _do(trainings, f"training of {len(trainings)} models")
    _do([Job(f"soup of seed {seed}", partial(_train, a, seed, "soup")) for seed in folders], "averaging of weights")
    files = {
        (name, seed): folder / "eval" / name / "results.json" for seed, folder in folders.items() for name in MODELS
    }
    files |= {("base", seed): output / "eval" / "base" / "results.json" for seed in folders}  # the same for all seeds
    evaluations = {
        file: Job(f"evaluation of {name} of seed {seed}", partial(_evaluate, a, seed, name, file))
        for (name, seed), file in files.items()
        if not file.is_file()
    }
    # Rerankers, which take longest, first.
    _do(list(evaluations.values())[::-1], f"evaluation of {len(evaluations)} models")
    results = {name: [read_json(files[name, seed]) for seed in folders] for name in MODELS}
    judged = [row for folder in folders.values() for row in read_json(folder / OWN_JUDGE_QUALITY)["rows"]]
    write_json(output / "results.json", {"results": results, "judge": judged, "settings": asdict(a)})
    tables = (own_table(results), judge_table(judged))
    logger.info("\n%s", "\n\n".join(render_table(rows) for rows in tables))
    return results


def own_table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> list[list[str]]:
    """Head and rows of the table: hit@1 in percent, mean over seeds, and the paired difference from the control."""
    columns = list(results["base"][0])
    rows = [["hit@1 in percent", *columns, "− control"]]
    for name, seeds in results.items():
        values = [f"{100 * statistics.fmean(scores[column] for scores in seeds):.1f}" for column in columns]
        gains = [scores[MEAN] - other[MEAN] for scores, other in zip(seeds, results[CONTROL])]
        rows.append([MODELS[name], *values, "–" if name == CONTROL else str(Difference.of(gains))])
    return rows


def judge_table(judged: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Head and rows of the judge's quality by kind of pair, mean over seeds."""
    rows = [["pairs", "AUC, held-out positives against mined candidates"]]
    for name in dict.fromkeys(row["dataset"] for row in judged):
        values = [row["auc"] for row in judged if row["dataset"] == name and row["auc"] is not None]
        rows.append([name, f"{statistics.fmean(values):.2f}" if values else "–"])
    return rows
