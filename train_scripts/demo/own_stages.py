"""The stages of a run on one's own data: what is made, from what, with which stages."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mteb_tasks.in_process import evaluate as run_mteb
from mteb_tasks.local_data import without_digest
from mteb_tasks.records_task import RecordsRetrieval
from train_scripts.demo.settings import OwnDataArguments
from train_scripts.demo.unjudged import unjudged_rows
from unime_st import stages
from unime_st.data.importing import import_records
from unime_st.files import write_json
from unime_st.model import UniME

logger = logging.getLogger(__name__)


def prepare(arguments: OwnDataArguments) -> None:
    """Everything that the compared models have in common: data, stage 2, mined and judged rows."""
    output = Path(arguments.output)
    for split, source in (("records", arguments.data), ("test", arguments.test)):
        import_records(
            source, output / split, pairs=arguments.pairs, image_root=arguments.image_root, embed_images=True
        )
    # Plain InfoNCE: on a domain that the model does not know yet, the hardest negatives of a batch teach it nothing.
    logger.info("warm: in-batch InfoNCE makes the model familiar with the data; every further model starts here.")
    common = _trained(arguments, "warm", arguments.model, "records", arguments.warm_steps) | _one_kind(arguments)
    stages.train_in_batch(stages.InBatchArguments(**common, temperature=arguments.temperature))
    logger.info("mine and judge: the nearest candidates of every query, Yes or No to each.")
    pools = stages.run_mine(
        stages.MineArguments(
            data=str(output / "records"),
            model=str(output / "warm"),
            output=str(output / "pools"),
            num_candidates=arguments.num_candidates,
            pool="dataset",
            max_similarity="none",
        )
    )
    stages.run_judge(
        stages.JudgeArguments(
            data=str(pools),
            model=_judge(arguments, pools),
            template=arguments.template,
            scores=str(output / "scores"),
            output=str(output / "rows"),
            stride=arguments.stride,
            num_negatives=arguments.num_negatives,
            min_positive_score=arguments.min_positive_score,
            seed=arguments.seed,
        )
    )


def train(arguments: OwnDataArguments, name: str) -> None:
    """Train one of the models that are compared, from where stage 2 ended."""
    warm = str(Path(arguments.output) / "warm")
    further = {"learning_rate": arguments.further_learning_rate, **_one_kind(arguments)}
    if name == "in_batch":
        common = _trained(arguments, name, warm, "records", arguments.steps) | further
        stages.train_in_batch(stages.InBatchArguments(**common, temperature=arguments.temperature))
        return
    stages.train_soft_labels(
        stages.SoftLabelArguments(
            **_trained(arguments, name, warm, "rows", arguments.steps) | further,
            temperature=arguments.temperature,
            label_temperature=arguments.label_temperature,
            divergence=arguments.divergence,
            num_negatives=arguments.num_negatives,
            in_batch_weight=arguments.in_batch_weight,
        )
    )


def evaluate(arguments: OwnDataArguments, name: str, results: Path) -> None:
    """Evaluate one model on the held-out pairs; its hit rates go to a file."""
    output = Path(arguments.output)
    model = UniME(arguments.model if name == "base" else str(output / name))
    (subsets,) = run_mteb(model, [RecordsRetrieval(str(output / "test"))], results.parent).values()
    scores = {without_digest(subset): numbers["hit_rate_at_1"] for subset, numbers in subsets.items()}
    write_json(results, {**scores, "mean": sum(scores.values()) / len(scores)})


def _trained(arguments: OwnDataArguments, name: str, start: str, data: str, steps: int) -> dict[str, Any]:
    return {
        "model": start,
        "data": str(Path(arguments.output) / data),
        "output": str(Path(arguments.output) / name),
        "max_steps": steps,
        "per_device_train_batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "lora_rank": arguments.lora_rank,
        "lora_dropout": 0.0,
        "lora_targets": arguments.lora_targets,
        "seed": arguments.seed,
    }


def _one_kind(arguments: OwnDataArguments) -> dict[str, Any]:
    """Every batch holds one kind of query: no in-batch negative is a giveaway."""
    return {"sub_batch_size": arguments.batch_size, "dataset_temperature": arguments.dataset_temperature}


def _judge(arguments: OwnDataArguments, pools: Path) -> str:
    """The judge: the model itself, or, with ``judge_steps``, the model made familiar with the domain."""
    if not arguments.judge_steps:
        return arguments.model
    logger.info("judge: it learns the domain from unjudged pairs, half of them mined and half random.")
    rows = unjudged_rows(pools, Path(arguments.output) / "unjudged", seed=arguments.seed)
    common = _trained(arguments, "judge", arguments.model, rows.folder.name, arguments.judge_steps)
    common |= {"learning_rate": arguments.judge_learning_rate}
    folder = stages.train_reranker(
        stages.RerankerArguments(**common, template=arguments.template, num_negatives=1, listwise_weight=0.0)
    )
    return str(folder)
