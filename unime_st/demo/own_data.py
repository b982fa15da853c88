"""Pairs of one's own: import, warm up, mine, judge, soft labels, evaluate beside the controls."""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mteb_tasks.records import RecordsRetrieval
from mteb_tasks.run import evaluate
from unime_st.data.importing import import_records
from unime_st.data.manifest import write_json
from unime_st.demo.settings import OwnDataArguments
from unime_st.demo.side_by_side import Job, side_by_side
from unime_st.model import UniME
from unime_st.training import arguments as options
from unime_st.training import stages
from unime_st.training.offline import run_judge, run_mine, unjudged_rows
from unime_st.training.run import LOG

logger = logging.getLogger(__name__)
_MODELS = {
    "base": "untrained",
    "warm": "stage 2 (hard negatives)",
    "in_batch": "control: in-batch InfoNCE, equal steps",
    "v2": "UniME-V2 (mined + judged + soft labels)",
}


def _trained(arguments: OwnDataArguments, name: str, start: str, data: str, steps: int) -> dict[str, Any]:
    return {
        "model": start,
        "data": data,
        "output": str(Path(arguments.output) / name),
        "max_steps": steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "lora_rank": arguments.lora_rank,
        "lora_dropout": 0.0,
        "lora_targets": arguments.lora_targets,
        "seed": arguments.seed,
    }


def _train(arguments: OwnDataArguments, records: str) -> dict[str, str]:
    """Train every model of the table; finished ones are kept. Returns their folders."""
    output = Path(arguments.output)
    warm = str(output / "warm")
    logger.info("warm: in-batch hard negatives, false ones filtered; every further model starts here.")
    common = _trained(arguments, "warm", arguments.model, records, arguments.warm_steps)
    common |= {"sub_batch_size": arguments.batch_size}  # one kind of query in a batch: no negative is a giveaway
    stages.train_hard_negatives(options.HardNegativeArguments(**common, temperature=arguments.temperature))
    logger.info("mine and judge: the nearest candidates of every query, Yes or No to each.")
    pools = run_mine(
        options.MineArguments(
            data=records,
            model=warm,
            output=str(output / "pools"),
            num_candidates=arguments.num_candidates,
            pool="dataset",
            max_similarity="none",
        )
    )
    rows = run_judge(
        options.JudgeArguments(
            data=str(pools),
            model=_judge(arguments, pools),
            template=arguments.template,
            scores=str(output / "scores"),
            output=str(output / "rows"),
            stride=arguments.stride,
            num_negatives=arguments.num_negatives,
            seed=arguments.seed,
        )
    )
    logger.info("in_batch and v2: the same number of further steps, without and with the judged negatives.")
    further = {"learning_rate": arguments.further_learning_rate, "sub_batch_size": arguments.batch_size}
    control = options.InBatchArguments(
        **_trained(arguments, "in_batch", warm, records, arguments.steps) | further, temperature=arguments.temperature
    )
    v2 = options.SoftLabelArguments(
        **_trained(arguments, "v2", warm, str(rows), arguments.steps) | further,
        temperature=arguments.temperature,
        label_temperature=arguments.label_temperature,
        num_negatives=arguments.num_negatives,
        in_batch_weight=arguments.in_batch_weight,
    )
    jobs = [
        Job("v2", partial(stages.train_soft_labels, v2), arguments.steps, output / "v2" / LOG),
        Job("in_batch", partial(stages.train_in_batch, control), arguments.steps, output / "in_batch" / LOG),
    ]
    for done in side_by_side(jobs, "training of 2 models"):
        logger.info("%s took %.0f seconds.", done.name, done.seconds)
    return {"base": arguments.model, **{name: str(output / name) for name in ("warm", "in_batch", "v2")}}


def _judge(arguments: OwnDataArguments, pools: Path) -> str:
    """The judge: the model itself, or, with ``judge_steps``, the model made familiar with the domain."""
    if not arguments.judge_steps:
        return arguments.model
    logger.info("judge: it learns the domain from unjudged pairs, half of them mined and half random.")
    rows = unjudged_rows(pools, Path(arguments.output) / "unjudged", seed=arguments.seed)
    common = _trained(arguments, "judge", arguments.model, str(rows.folder), arguments.judge_steps)
    common |= {"learning_rate": arguments.judge_learning_rate}
    folder = stages.train_reranker(
        options.RerankerArguments(**common, template=arguments.template, num_negatives=1, listwise_weight=0.0)
    )
    return str(folder)


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
    folders = {}
    for split, source in (("records", arguments.data), ("test", arguments.test)):
        records = import_records(
            source, output / split, pairs=arguments.pairs, image_root=arguments.image_root, embed_images=True
        )
        folders[split] = str(records.folder)
    task = RecordsRetrieval(folders["test"])
    results = {}
    for name, model in _train(arguments, folders["records"]).items():
        (subsets,) = evaluate(UniME(model), [task], output / "eval" / name).values()
        scores = {subset: numbers["hit_rate_at_1"] for subset, numbers in subsets.items()}
        results[name] = {**scores, "mean": sum(scores.values()) / len(scores)}
    write_json(output / "results.json", {"results": results, "settings": asdict(arguments)})
    logger.info("\n%s", _table(results))
    return results
