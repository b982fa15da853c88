"""The stages of a run on one's own data: what is made, from what, with which stages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mteb_tasks.in_process import evaluate as run_mteb
from mteb_tasks.loader import wrap
from mteb_tasks.local_data import without_digest
from mteb_tasks.records_task import RecordsRetrieval
from mteb_tasks.two_stage import TwoStage
from train_scripts.demo.results import MEAN
from train_scripts.demo.settings import OWN_JUDGE_QUALITY, RERANK_TOP_K, OwnDataArguments
from train_scripts.demo.unjudged import unjudged_rows
from unime_st import stages
from unime_st.data.importing import import_records
from unime_st.data.manifest import begin_stage, finish_stage, is_complete
from unime_st.data.records import PairRecord, RecordSet, RecordWriter
from unime_st.files import write_json
from unime_st.judging.calibration import LEAST_AUC, auc
from unime_st.judging.score_store import Scores
from unime_st.model import UniME
from unime_st.reranking.unime_reranker import UniMEReranker
from unime_st.scoring.groups import PairOrder

logger = logging.getLogger(__name__)
_FLOOR = {"believed": 0.0, "trusted": 1.0}  # of the positives' scores


class OwnRun:
    """One seed of a run on one's own data.

    Args:
        arguments: Options.
        seed: Seed of the training.
    """

    def __init__(self, arguments: OwnDataArguments, seed: int) -> None:
        self.arguments, self.seed = arguments, seed
        self.output = Path(arguments.output)

    def path(self, name: str) -> str:
        """Folder of a stage of this seed."""
        return str(self.output / f"seed-{self.seed}" / name)

    def shared(self, name: str) -> str:
        """Folder of data that all seeds share."""
        return str(self.output / name)

    def orders(self, split: str) -> list[PairOrder]:
        """Orders in which the judge is asked about the pairs of a split."""
        return list(_kinds_by_order(self.arguments, RecordSet.load(self.shared(split))))

    def options(self, name: str, start: str, data: str, steps: int) -> dict[str, Any]:
        """Options that all trainings have in common."""
        return {
            "model": start,
            "data": data,
            "output": self.path(name),
            "max_steps": steps,
            "per_device_train_batch_size": self.arguments.batch_size,
            "learning_rate": self.arguments.learning_rate,
            "lora_rank": self.arguments.lora_rank,
            "lora_dropout": 0.0,
            "lora_targets": self.arguments.lora_targets,
            "seed": self.seed,
        }

    def embedder_options(self, *given: Any) -> dict[str, Any]:
        """The same for embedders; a batch holds one kind of query, so no in-batch negative is a giveaway."""
        own = {
            "sub_batch_size": self.arguments.batch_size,
            "dataset_temperature": self.arguments.dataset_temperature,
            "temperature": self.arguments.temperature,
        }
        return self.options(*given) | own


def import_pairs(arguments: OwnDataArguments) -> None:
    """Import both splits, and part them by the order in which the judge is asked about them."""
    output = Path(arguments.output)
    for split, source in (("records", arguments.data), ("test", arguments.test)):
        records = import_records(
            source, output / split, pairs=arguments.pairs, image_root=arguments.image_root, embed_images=True
        )
        kinds = {kind_of(name) for name in records.rows["dataset"].to_pylist()}
        if split == "records" and (unknown := set(arguments.candidate_first or ()) - kinds):
            raise ValueError(
                f"candidate_first: {source} has no pairs of {', '.join(sorted(unknown))}; there are "
                f"{', '.join(sorted(kinds))}."
            )
        if MEAN in kinds:
            raise ValueError(f"{source}: a kind of pairs cannot be called {MEAN}, which is a column of the results.")
        for order, chosen in _kinds_by_order(arguments, records).items():
            folder = output / f"{split}-{order}"
            if begin_stage(folder, "part", inputs=[records.folder], options={"kinds": sorted(chosen)}):
                with RecordWriter(folder) as writer:
                    for record in records:
                        if kind_of(record.dataset) in chosen:
                            writer.add(record)
                finish_stage(folder, writer.counts)


def kind_of(dataset: str) -> str:
    """Name of a kind of pairs, as in the results; pairs whose data do not name one are "default"."""
    return dataset or "default"


def _kinds_by_order(arguments: OwnDataArguments, records: RecordSet) -> dict[PairOrder, set[str]]:
    kinds = {kind_of(name) for name in records.rows["dataset"].to_pylist()}
    turned = kinds & set(arguments.candidate_first or ())
    orders: dict[PairOrder, set[str]] = {"query_first": kinds - turned, "candidate_first": turned}
    return {order: chosen for order, chosen in orders.items() if chosen}


def prepare(arguments: OwnDataArguments, seed: int) -> None:
    """Everything that the compared models of a seed have in common: a first training, mined and judged rows."""
    run = OwnRun(arguments, seed)
    # Plain InfoNCE: on a domain that the model does not know yet, the hardest negatives of a batch teach it nothing.
    options = run.embedder_options("warm", arguments.model, run.shared("records"), arguments.warm_steps)
    stages.train_in_batch(stages.InBatchArguments(**options))
    for split in ("records", "test"):
        for order in run.orders(split):
            _mine(run, split, order)
    judge = _judge(run)
    for order in run.orders("records"):
        for name, floor in _FLOOR.items():
            _score(run, judge, "records", order, f"rows-{name}", floor)
    for order in run.orders("test"):
        _score(run, judge, "test", order, "rows-of-test", 1.0)
    for name in _FLOOR:
        if not is_complete(run.path(f"rows-{name}")):
            RecordSet.write(run.path(f"rows-{name}"), _joined(run, f"rows-{name}"), {"seed": seed})
    _measure_judge(run)


def _joined(run: OwnRun, rows: str) -> Iterator[PairRecord]:
    return chain.from_iterable(RecordSet.load(run.path(f"{rows}-{order}")) for order in run.orders("records"))


def _mine(run: OwnRun, split: str, order: PairOrder) -> None:
    stages.run_mine(
        stages.MineArguments(
            data=run.shared(f"{split}-{order}"),
            model=run.path("warm"),
            output=run.path(f"pools-{split}-{order}"),
            num_candidates=run.arguments.num_candidates,
            pool="dataset",
            max_similarity="none",
        )
    )


def _judge(run: OwnRun) -> str:
    """The judge: the model itself, or, with ``judge_steps``, the model made familiar with the domain."""
    a = run.arguments
    if not a.judge_steps:
        return a.model
    pools = {order: run.path(f"pools-records-{order}") for order in run.orders("records")}
    rows = unjudged_rows(pools, run.path("unjudged"), seed=run.seed)
    options = run.options("judge", a.model, str(rows.folder), a.judge_steps)
    options |= {"learning_rate": a.judge_learning_rate, "template": a.template}
    return str(stages.train_reranker(stages.RerankerArguments(**options, num_negatives=1, listwise_weight=0.0)))


def _score(run: OwnRun, judge: str, split: str, order: PairOrder, rows: str, floor: float) -> None:
    """Judge the pools of a split; a second choice of negatives finds the scores done."""
    a = run.arguments
    stages.run_judge(
        stages.JudgeArguments(
            data=run.path(f"pools-{split}-{order}"),
            model=judge,
            template=a.template,
            pair_order=order,
            scores=run.path(f"scores-{split}-{order}"),
            output=run.path(f"{rows}-{order}"),
            stride=a.stride,
            num_negatives=a.num_negatives,
            min_positive_score=floor,
            seed=run.seed,
        )
    )


def _measure_judge(run: OwnRun) -> None:
    """AUC of held-out positives against their mined candidates, by kind of pair; some candidates may be right, too."""
    found = []
    for order in run.orders("test"):
        rows = list(Scores(run.path(f"scores-test-{order}")).row_shards.rows())
        for name in dict.fromkeys(kind_of(row["dataset"]) for row in rows):
            own = [row for row in rows if kind_of(row["dataset"]) == name]
            positives = np.array([row["positive_logit"] for row in own])
            value = auc(positives, np.concatenate([row["logits"] for row in own]))
            found.append({"seed": run.seed, "dataset": name, "pair_order": order, "auc": value})
            if value is not None and value < LEAST_AUC:
                logger.warning(
                    "%s: AUC %.2f on mined candidates. The judge's labels are little better than chance there: turn the "
                    "pair (candidate_first), adapt the judge longer (judge_steps), or take another model.",
                    name,
                    value,
                )
    write_json(run.path(OWN_JUDGE_QUALITY), {"rows": found})


def train(arguments: OwnDataArguments, seed: int, name: str) -> None:
    """Train one of the models that are compared, or average two of them."""
    run = OwnRun(arguments, seed)
    if name == "soup":
        models = [run.path("trusted"), run.path("in_batch")]
        stages.run_merge(stages.MergeArguments(models=models, output=run.path("soup"), overwrite=True))
        return
    data = run.shared("records") if name == "in_batch" else run.path(f"rows-{name}")
    options = run.embedder_options(name, run.path("warm"), data, arguments.steps)
    options |= {"learning_rate": arguments.further_learning_rate}
    if name == "in_batch":
        stages.train_in_batch(stages.InBatchArguments(**options))
        return
    stages.train_soft_labels(
        stages.SoftLabelArguments(
            **options,
            label_temperature=arguments.label_temperature,
            divergence=arguments.divergence,
            num_negatives=arguments.num_negatives,
            in_batch_weight=arguments.in_batch_weight,
        )
    )


def evaluate(arguments: OwnDataArguments, seed: int, name: str, results: Path) -> None:
    """Evaluate one model on the held-out pairs; its hit rates go to a file."""
    run = OwnRun(arguments, seed)
    folder = {"base": arguments.model, "reranked": run.path("trusted")}.get(name, run.path(name))
    embedder = wrap(UniME(folder))
    scores: dict[str, float] = {}
    for order in run.orders("test"):
        found = _reranked(run, embedder, order) if name == "reranked" else embedder
        (subsets,) = run_mteb(found, [RecordsRetrieval(run.shared(f"test-{order}"))], results.parent).values()
        scores |= {without_digest(subset): numbers["hit_rate_at_1"] for subset, numbers in subsets.items()}
    scores = dict(sorted(scores.items()))
    write_json(results, {**scores, MEAN: sum(scores.values()) / len(scores)})


def _reranked(run: OwnRun, embedder: Any, order: PairOrder) -> TwoStage:
    a = run.arguments
    reranker = UniMEReranker(run.path("judge") if a.judge_steps else a.model, template=a.template)
    return TwoStage(
        embedder, reranker, top_k=RERANK_TOP_K, method="pairwise", pair_order=order, alpha=1 / a.temperature
    )
