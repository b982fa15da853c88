"""Pairs of one's own: import, warm up, mine, judge, soft labels, evaluate beside the controls.

As in the demo, this process only says what happens; whatever needs torch is done in others.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path

from train_scripts.demo.jobs import Job, alone, side_by_side
from train_scripts.demo.settings import OwnDataArguments
from unime_st.files import read_json, write_json
from unime_st.training import LOG

logger = logging.getLogger(__name__)
_MODELS = {
    "base": "untrained",
    "warm": "warmed up (in-batch InfoNCE)",
    "in_batch": "control: in-batch InfoNCE, equal steps",
    "v2": "UniME-V2 (mined + judged + soft labels)",
}


def _prepare(arguments: OwnDataArguments) -> None:
    from train_scripts.demo.own_stages import prepare

    prepare(arguments)


def _train(arguments: OwnDataArguments, name: str) -> None:
    from train_scripts.demo.own_stages import train

    train(arguments, name)


def _evaluate(arguments: OwnDataArguments, name: str, results: Path) -> None:
    from train_scripts.demo.own_stages import evaluate

    evaluate(arguments, name, results)


def _do(jobs: list[Job], title: str) -> None:
    for done in side_by_side(jobs, f"{title} of {len(jobs)} models"):
        logger.info("%s took %.0f seconds.", done.name, done.seconds)


def _table(results: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(results.values())))
    lines = ["| hit@1 | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for model, scores in results.items():
        lines.append(f"| {_MODELS[model]} | " + " | ".join(f"{100 * scores[name]:.1f}" for name in columns) + " |")
    return "\n".join(lines)


def run_own_data(arguments: OwnDataArguments) -> dict[str, dict[str, float]]:
    """Train and evaluate on one's own pairs; whatever a killed run finished is kept.

    Args:
        arguments: Options; ``data`` and ``test`` name the pairs.

    Returns:
        ``{model: {dataset: hit rate at 1, ..., "mean": ...}}``, also in ``results.json`` of the output.
    """
    if not arguments.data or not arguments.test:
        raise ValueError("name the training and the held-out pairs: --data TRAIN --test TEST.")
    output = Path(arguments.output)
    alone(partial(_prepare, arguments))
    logger.info("v2 and in_batch: the same number of further steps, with and without the judged negatives.")
    trainings = [
        Job(name, partial(_train, arguments, name), arguments.steps, output / name / LOG)
        for name in ("v2", "in_batch")
    ]
    _do(trainings, "training")
    files = {name: output / "eval" / name / "results.json" for name in _MODELS}
    _do([Job(f"evaluate {name}", partial(_evaluate, arguments, name, files[name])) for name in files], "evaluation")
    results = {name: read_json(file) for name, file in files.items()}
    write_json(output / "results.json", {"results": results, "settings": asdict(arguments)})
    logger.info("\n%s", _table(results))
    return results
