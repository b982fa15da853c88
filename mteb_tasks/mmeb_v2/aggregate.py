"""The aggregate task ``MMEB-V2`` and the benchmark ``MMEB(eng, v2)``: 12 columns, three modalities, one overall score."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.benchmarks.benchmark import Benchmark, CustomGroup, CustomGrouping
from mteb.results import TaskResult

from mteb_tasks.mmeb_v2.citations import MMEB_V2_BIBTEX
from mteb_tasks.mmeb_v2.data_folder import MEDIA_DATASET, MEDIA_REVISION
from mteb_tasks.mmeb_v2.image_tasks import IMAGE_TASKS
from mteb_tasks.mmeb_v2.leaderboard import AGGREGATE, BENCHMARK, COLUMNS, LEADERBOARD, leaderboard_means
from mteb_tasks.mmeb_v2.preflight import missing_allowed
from mteb_tasks.mmeb_v2.profiles import current_profile, profiled
from mteb_tasks.mmeb_v2.v2_task import MMEBV2Task
from mteb_tasks.mmeb_v2.visdoc_tasks import VISDOC_TASKS
from unime_st.files import digest

MMEB_V2_TASKS: tuple[type[MMEBV2Task], ...] = (*IMAGE_TASKS, *VISDOC_TASKS)
"""The task classes there are: 36 image and 24 visual-document tasks. The 18 video tasks are not in this release."""


def mmeb_v2_tasks() -> list[MMEBV2Task]:
    """Make one task object for each task that shall be evaluated.

    Returns:
        All of `MMEB_V2_TASKS`, or, with ``MMEB_ALLOW_MISSING=1`` and local folders, those whose tables are there.
    """
    tasks = [task() for task in MMEB_V2_TASKS]
    if missing_allowed():
        tasks = [task for task in tasks if not task.is_missing()] or tasks
    for task in tasks:
        task.run = tasks
    return tasks


def missing_v2_tasks(names: Collection[str]) -> set[str]:
    """Names of the tasks of a run that are left out because there are no data of them, where that is allowed.

    Args:
        names: Names of the tasks of the run.

    Returns:
        Nothing where all of them are missing: the run shall say so.
    """
    asked = [task() for task in MMEB_V2_TASKS if task.metadata.name in names] if missing_allowed() else []
    missing = {task.metadata.name for task in asked if task.is_missing()}
    return missing if len(missing) < len(asked) else set()


class MMEBV2(AbsTaskAggregate):
    """MMEB-V2: 78 tasks on images, videos and visual documents.

    A mean is given only where all its tasks are there. The 18 video tasks are not in this release, so there is no overall
    score yet: ``main_score`` is None, as mteb has it for an aggregate with missing parts.
    """

    def __init__(self, **kwargs: Any) -> None:
        tasks = mmeb_v2_tasks()
        revision = digest(*(task.metadata.revision for task in tasks), length=12)
        is_local = any(task.local_root() is not None for task in tasks)
        metadata = self.metadata.model_copy(update={"tasks": tasks})
        self.metadata = profiled(metadata, current_profile(), revision if is_local else None)
        super().__init__(**kwargs)

    def task_results_to_scores(self, task_results: list[TaskResult]) -> dict[str, Mapping[str, Any]]:
        """Average the results of the tasks, see `leaderboard_means`.

        Args:
            task_results: One result for each task.

        Returns:
            ``{"test": {subset name: scores}}`` with the means that are complete, in lower case with underscores, the
            number of tasks and the leaderboard keys of those left out.
        """
        made = {task.metadata.name: task for task in self.tasks if isinstance(task, MMEBV2Task)}
        results = [(made[result.task_name], result) for result in task_results if result.task_name in made]
        score_of = {task.key: _score(result, task) for task, result in results}
        means = leaderboard_means(score_of)
        scores: dict[str, Any] = {
            name.lower().replace(" ", "_").replace("-", "_"): mean for name, mean in means.items()
        }
        scores["main_score"] = scores[MMEBV2.metadata.main_score] = means.get("Overall")
        left_out = [task.key for task in LEADERBOARD if task.key not in score_of]
        facts = {"num_tasks": len(score_of), "left_out": left_out, "profile": current_profile().name}
        return {"test": {self.hf_subsets[0]: {**scores, **facts}}}


def _score(result: TaskResult, task: MMEBV2Task) -> float:
    """Score on the data at hand: a result holds those of other data and protocols, too."""
    rows = [row for row in result.scores["test"] if row["hf_subset"] in task.hf_subsets]
    return float((rows or result.scores["test"])[-1]["main_score"])


MMEBV2.metadata = AggregateTaskMetadata(
    name=AGGREGATE,
    description=(
        "MMEB-V2, the Massive Multimodal Embedding Benchmark for images, videos and visual documents: 78 tasks; "
        "this release has the 36 image tasks and the 24 visual-document tasks."
    ),
    reference="https://arxiv.org/abs/2507.04590",
    tasks=[],  # every object of the class makes its own: which data there are is known only then
    dataset={"path": MEDIA_DATASET, "revision": MEDIA_REVISION},
    main_score="overall",
    type="Any2AnyRetrieval",
    eval_splits=["test"],
    eval_langs=["eng-Latn", "fra-Latn", "spa-Latn", "deu-Latn"],
    modalities=["text", "image"],
    category="it2it",
    date=("2024-01-01", "2025-07-07"),
    domains=["Web", "Academic"],
    task_subtypes=["Object recognition", "Question answering", "Image Text Retrieval"],
    license="apache-2.0",
    annotations_creators="derived",
    dialect=[],
    sample_creation="found",
    bibtex_citation=MMEB_V2_BIBTEX,
)


def make_v2_benchmark() -> Benchmark:
    """Build the benchmark for the data at hand.

    Returns:
        ``MMEB(eng, v2)`` with the columns and modalities of the leaderboard whose tasks are all there. It has no mean
        over all tasks as long as the video tasks are missing.

    Example:
        >>> make_v2_benchmark().name
        'MMEB(eng, v2)'
    """
    tasks = mmeb_v2_tasks()
    columns = {name: name for modality in COLUMNS.values() for name in modality}
    modalities = {column: modality for modality, listed in COLUMNS.items() for column in listed}
    return Benchmark(
        name=BENCHMARK,
        display_name=AGGREGATE,
        tasks=tasks,
        aggregations=(_grouping("Column", tasks, columns), _grouping("Modality", tasks, modalities)),
        description="Image and visual-document tasks of MMEB-V2 by the protocol of VLM2Vec-V2.",
        reference="https://arxiv.org/abs/2507.04590",
        citation=MMEB_V2_BIBTEX,
    )


def _grouping(name: str, tasks: Sequence[MMEBV2Task], group_of: Mapping[str, str]) -> CustomGrouping:
    """Group tasks by their column; a group with a missing task is left out."""
    made = {task.key: task for task in tasks}
    members: dict[str, list[str]] = {}
    for row in LEADERBOARD:
        members.setdefault(group_of[row.column], []).append(row.key)
    whole = {label: keys for label, keys in members.items() if all(key in made for key in keys)}
    return CustomGrouping(name, [CustomGroup(label, [made[key] for key in keys]) for label, keys in whole.items()])
