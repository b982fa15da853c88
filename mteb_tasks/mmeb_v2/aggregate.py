"""The aggregate task ``MMEB-V2`` and the benchmark ``MMEB(eng, v2)``: 12 columns, three modalities, one overall score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
from mteb.benchmarks.benchmark import Benchmark, CustomGroup, CustomGrouping

from mteb_tasks.mmeb.base_tasks import BenchmarkAggregate, run_of
from mteb_tasks.mmeb_v2.citations import MMEB_V2_BIBTEX
from mteb_tasks.mmeb_v2.data_folder import MEDIA_DATASET, MEDIA_REVISION
from mteb_tasks.mmeb_v2.image_tasks import IMAGE_TASKS
from mteb_tasks.mmeb_v2.leaderboard import AGGREGATE, BENCHMARK, COLUMNS, LEADERBOARD, leaderboard_means
from mteb_tasks.mmeb_v2.profiles import current_profile, profiled
from mteb_tasks.mmeb_v2.v2_task import MMEBV2Task
from mteb_tasks.mmeb_v2.video_tasks import VIDEO_TASKS
from mteb_tasks.mmeb_v2.visdoc_tasks import VISDOC_TASKS

MMEB_V2_TASKS: tuple[type[MMEBV2Task], ...] = (*IMAGE_TASKS, *VIDEO_TASKS, *VISDOC_TASKS)
"""All task classes: 36 image, 18 video and 24 visual-document tasks, in the order of the leaderboard."""


def mmeb_v2_tasks() -> list[MMEBV2Task]:
    """Make one task object for each task to evaluate, see `mteb_tasks.mmeb.base_tasks.run_of`."""
    return run_of(MMEB_V2_TASKS)


class MMEBV2(BenchmarkAggregate):
    """MMEB-V2: 78 tasks on images, videos and visual documents.

    A mean is given only where all its tasks are there; without the overall mean ``main_score`` is None, as mteb has it
    for an aggregate with missing parts.
    """

    classes = MMEB_V2_TASKS
    keys = tuple(task.key for task in LEADERBOARD)

    def __init__(self, **kwargs: object) -> None:
        self.profile = current_profile()
        self.metadata = profiled(self.metadata, self.profile)
        super().__init__(**kwargs)

    def means(self, score_of: Mapping[str, float]) -> dict[str, object]:
        """Complete means, in lower case with underscores, and the profile; see `leaderboard_means`."""
        found = leaderboard_means(score_of)
        scores = {name.lower().replace(" ", "_").replace("-", "_"): found[name] for name in found}
        main = found.get("Overall")
        return {**scores, MMEBV2.metadata.main_score: main, "main_score": main, "profile": self.profile.name}


MMEBV2.metadata = AggregateTaskMetadata(
    name=AGGREGATE,
    description=(
        "MMEB-V2, the Massive Multimodal Embedding Benchmark: 36 image, 18 video and 24 visual-document tasks."
    ),
    reference="https://arxiv.org/abs/2507.04590",
    tasks=[],  # every object of the class makes its own: which data there are is known only then
    dataset={"path": MEDIA_DATASET, "revision": MEDIA_REVISION},
    main_score="overall",
    type="Any2AnyRetrieval",
    eval_splits=["test"],
    eval_langs=["eng-Latn", "fra-Latn", "spa-Latn", "deu-Latn"],
    modalities=["text", "image", "video"],
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
        ``MMEB(eng, v2)`` with the columns and modalities of the leaderboard whose tasks are all there.

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
        description="Image, video and visual-document tasks of MMEB-V2 by the protocol of VLM2Vec-V2.",
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
