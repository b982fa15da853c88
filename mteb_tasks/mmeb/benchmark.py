"""MMEB as an mteb benchmark, with the columns of the papers' tables."""

from __future__ import annotations

from mteb.benchmarks.benchmark import Benchmark, BenchmarkAggregation, CustomGroup, CustomGrouping

from mteb_tasks.mmeb.subsets import BENCHMARK, META_TASKS
from mteb_tasks.mmeb.tasks import MMEB_BIBTEX, mmeb_tasks


def make_benchmark() -> Benchmark:
    """Build the benchmark for the data at hand (``$MMEB_EVAL_DIR`` or the hub).

    Returns:
        ``MMEB(eng, v1)``: mean over tasks, means of the meta-tasks and means in and out of domain.

    Example:
        >>> make_benchmark().name
        'MMEB(eng, v1)'
    """
    tasks = mmeb_tasks()
    meta = {name.capitalize(): [task for task in tasks if task.subset.meta == name] for name in META_TASKS}
    split = {
        "IND": [task for task in tasks if not task.subset.out_of_domain],
        "OOD": [task for task in tasks if task.subset.out_of_domain],
    }
    groupings = [
        CustomGrouping(name, [CustomGroup(label, found) for label, found in groups.items() if found])
        for name, groups in (("Meta-task", meta), ("Split", split))
    ]
    return Benchmark(
        name=BENCHMARK,
        aliases=("MMEB",),
        display_name="MMEB",
        tasks=tasks,
        aggregations=(BenchmarkAggregation("mean_task"), *groupings),
        description="36 multimodal datasets; every query ranks its own candidates, precision at 1.",
        reference="https://arxiv.org/abs/2410.05160",
        citation=MMEB_BIBTEX,
    )
