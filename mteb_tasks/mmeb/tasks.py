"""The 36 MMEB tasks, their aggregate and the benchmark."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
from mteb.abstasks.aggregated_task import AbsTaskAggregate

from mteb_tasks.columns import Setting
from mteb_tasks.local_data import with_digest
from mteb_tasks.metadata import task_metadata
from mteb_tasks.mmeb.content_digest import subset_digest
from mteb_tasks.mmeb.location import (
    HUB_DATASET,
    HUB_REVISION,
    ImageFolders,
    MMEBDataError,
    data_root,
    local_root,
    parquet_files,
)
from mteb_tasks.mmeb.subset_reader import SubsetTable, locate_images, read_subset
from mteb_tasks.mmeb.subsets import META_TASKS, SUBSETS, Subset
from mteb_tasks.retrieval_task import ItemRetrievalTask, retrieval_split
from unime_st.data.items import Item
from unime_st.data.scenes import RetrievalData
from unime_st.files import digest

if TYPE_CHECKING:
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.results import TaskResult

ALLOW_MISSING_VARIABLE = "MMEB_ALLOW_MISSING"
MMEB_STYLE = "mmeb"
"""UniME v1 was evaluated on MMEB with the bare texts of MMEB, on all other sets with its one-word prompts."""
MMEB_BIBTEX = r"""
@article{jiang2024vlm2vec,
  author = {Jiang, Ziyan and Meng, Rui and Yang, Xinyi and Yavuz, Semih and Zhou, Yingbo and Chen, Wenhu},
  journal = {arXiv preprint arXiv:2410.05160},
  title = {VLM2Vec: Training Vision-Language Models for Massive Multimodal Embedding Tasks},
  year = {2024},
}
"""
_SUBTYPES = {
    "classification": ["Object recognition"],
    "vqa": ["Question answering"],
    "retrieval": ["Image Text Retrieval"],
    "grounding": ["Object recognition"],
}


def check_subsets(root: Path, subsets: Iterable[Subset]) -> None:
    """Check tables and images of several subsets before anything is encoded.

    Args:
        root: Folder of the evaluation data.
        subsets: What will be evaluated.

    Raises:
        MMEBDataError: Lists the first fault of each faulty subset.
    """
    folders, faults, missing = ImageFolders(root), [], 0
    subsets = list(subsets)
    for subset in subsets:
        missing += not parquet_files(root, subset.name)
        try:
            locate_images(read_subset(root, subset), folders, look=True)
        except MMEBDataError as error:
            faults.append(str(error))
    if faults:
        hint = f" (set {ALLOW_MISSING_VARIABLE}=1 to leave missing subsets out)" if 0 < missing < len(subsets) else ""
        count = "1 MMEB subset" if len(faults) == 1 else f"{len(faults)} MMEB subsets"
        raise MMEBDataError(f"{count} cannot be evaluated{hint}:\n" + "\n".join(faults))


@dataclass
class Preflight:
    """Subsets that are evaluated in one run: all are checked before the first one is encoded.

    Args:
        subsets: The subsets.
        digests: Digests of those that were checked.
    """

    subsets: tuple[Subset, ...]
    digests: dict[str, str] = field(default_factory=dict)

    def check(self, root: Path, own: Subset, own_digest: str) -> None:
        """Check all of them, unless that was done and one of them is as it was then.

        Args:
            root: Folder of the evaluation data.
            own: The subset that is about to be encoded.
            own_digest: Its digest.

        Raises:
            MMEBDataError: Lists the first fault of each faulty subset.
        """
        if self.digests.get(own.name) != own_digest:
            check_subsets(root, self.subsets)
            self.digests = {subset.name: subset_digest(root, subset.name) for subset in self.subsets}


class MMEBTask(ItemRetrievalTask):
    """A subset of MMEB: each query ranks its own candidates; a hit is the positive at rank 1.

    Data come from ``$MMEB_EVAL_DIR`` or the hub. For a local folder the digest of the data is part of the subset name
    in the result, so a score of other data is never taken for this one's.
    """

    subset: ClassVar[Subset]
    preflight: Preflight | None = None
    """The run that the task is part of; None is a run of its own."""

    def __init__(self, **kwargs: Any) -> None:
        root = local_root()
        if root is not None:
            self.metadata = with_digest(self.metadata, subset_digest(root, self.subset.name))
        super().__init__(**kwargs)

    def retrieval_data(self, subset: str, split: str) -> RetrievalData:
        """Read the rows; see `mteb_tasks.mmeb.subset_reader.read_subset`."""
        preflight = self.preflight or Preflight((self.subset,))
        root = data_root([found.name for found in preflight.subsets])
        own = subset_digest(root, self.subset.name)
        if local_root() is not None and f"local-{own}" != subset:
            raise MMEBDataError(f"{root} is not the folder this task was made for, or has changed: make the task anew")
        if local_root() is None:  # the hub's cache names a snapshot by its commit: it stands in the result
            self.metadata = self.metadata.model_copy(
                update={"dataset": {**self.metadata.dataset, "revision": root.name}}
            )
        preflight.check(root, self.subset, own)
        table = read_subset(root, self.subset)
        return subset_data(table, locate_images(table, ImageFolders(root)))

    def split_tables(self, data: RetrievalData) -> RetrievalSplitData:
        """Build the tables; foreign models read texts without the official instruction."""
        query, target = (partial(official_body, self.subset, side) for side in ("query", "target"))
        return retrieval_split(
            data, self.subset.category, query_body=query, document_body=target, setting=Setting(style=MMEB_STYLE)
        )


def subset_data(table: SubsetTable, files: Mapping[str, Path]) -> RetrievalData:
    """Turn the rows of a subset into retrieval data.

    Args:
        table: The rows.
        files: Image file by path in the table.

    Returns:
        Queries ``q0``, ``q1``, ... in row order; documents are named by a digest of text and image path.
    """
    names = [_document_id(*pair) for pair in zip(table.document_texts, table.document_images)]
    name_of = np.array(names, dtype=object)
    ranked = {f"q{row}": name_of[rows].tolist() for row, rows in enumerate(table.candidates)}
    return RetrievalData(
        queries={
            f"q{row}": Item(text=text, image=files.get(image))
            for row, (text, image) in enumerate(zip(table.query_texts, table.query_images))
        },
        corpus={
            name: Item(text=text, image=files.get(image))
            for name, text, image in zip(names, table.document_texts, table.document_images)
        },
        relevant={query: {found[0]} for query, found in ranked.items()},
        candidates=ranked,
    )


def official_body(subset: Subset, side: str, text: str) -> str:
    """Text of an item without the official instruction, for models that have their own.

    Args:
        subset: The subset.
        side: ``"query"`` or ``"target"``.
        text: The official text.
    """
    return subset.body(side, text) or ""


def _document_id(text: str, image: str) -> str:
    # By content: mteb breaks ties by id, which must not depend on where a document stands in a list.
    return digest(f"{text}\0{image}", length=16)


def _task_class(subset: Subset) -> type[MMEBTask]:
    asks = {
        "query": subset.query.replace("{}", "").strip(' "'),
        "document": subset.target.replace("{}", "").strip(' "'),
    }
    metadata = task_metadata(
        name=subset.task_name,
        description=(
            f"The {subset.name} subset of MMEB ({subset.meta}, {'out of' if subset.out_of_domain else 'in'} domain): "
            "rank the candidates of each query; the share of queries whose positive comes first."
        ),
        category=subset.category,
        dataset={"path": HUB_DATASET, "revision": HUB_REVISION},
        reference="https://arxiv.org/abs/2410.05160",
        date=("2024-01-01", "2024-10-07"),
        domains=["Web"],
        sample_creation="found",
        task_subtypes=_SUBTYPES[subset.meta],
        prompt={side: text for side, text in asks.items() if text},
        bibtex_citation=MMEB_BIBTEX,
    )
    return type(
        subset.class_name,
        (MMEBTask,),
        {"__doc__": metadata.description, "__module__": __name__, "subset": subset, "metadata": metadata},
    )


MMEB_TASKS: tuple[type[MMEBTask], ...] = tuple(_task_class(subset) for subset in SUBSETS)
"""One class for each subset, in the order of `SUBSETS`."""


def available_tasks(tasks: Sequence[type[MMEBTask]]) -> Sequence[type[MMEBTask]]:
    """Leave out the subsets that are missing, where that is allowed.

    Args:
        tasks: Task classes.

    Returns:
        All of them, or, with ``MMEB_ALLOW_MISSING=1`` and a local folder, those whose table is there. With nothing
        there all of them, and the run reports it.
    """
    root = local_root()
    if root is None or os.environ.get(ALLOW_MISSING_VARIABLE, "").lower() not in ("1", "true", "yes"):
        return tasks
    return [task for task in tasks if parquet_files(root, task.subset.name)] or tasks


@contextmanager
def preflight_together(names: Iterable[str]) -> Iterator[None]:
    """Let the first task that reads its data check those of all tasks of a run.

    Args:
        names: Names of the tasks; ``"MMEB"`` stands for its parts.
    """
    named = set(names)
    whole = available_tasks(MMEB_TASKS) if MMEB.metadata.name in named else ()
    found = tuple(task.subset for task in MMEB_TASKS if task.metadata.name in named or task in whole)
    before = MMEBTask.preflight
    MMEBTask.preflight = Preflight(found) if found else None
    try:
        yield
    finally:
        MMEBTask.preflight = before


def mmeb_tasks() -> list[MMEBTask]:
    """Make one task object for each subset to evaluate.

    Returns:
        All 36, or, with ``MMEB_ALLOW_MISSING=1`` and a local folder, those whose table is there.
    """
    tasks = [task() for task in available_tasks(MMEB_TASKS)]
    preflight = Preflight(tuple(task.subset for task in tasks))
    for task in tasks:
        task.preflight = preflight
    return tasks


def mean_scores(score_of: Mapping[str, float]) -> dict[str, float]:
    """Average task scores as the papers do: every mean is the plain mean of its subsets.

    Args:
        score_of: Score of each subset, by official name.

    Returns:
        ``mean`` over all given subsets, ``ind``, ``ood`` and one mean for each meta-task; a mean of nothing is left
        out.

    Example:
        >>> mean_scores({"OK-VQA": 0.5, "GQA": 0.7})
        {'mean': 0.6, 'ind': 0.5, 'ood': 0.7, 'vqa': 0.6}
    """
    groups = {"mean": list(SUBSETS), "ind": [s for s in SUBSETS if not s.out_of_domain]}
    groups["ood"] = [subset for subset in SUBSETS if subset.out_of_domain]
    groups |= {meta: [subset for subset in SUBSETS if subset.meta == meta] for meta in META_TASKS}
    found = {name: [score_of[s.name] for s in group if s.name in score_of] for name, group in groups.items()}
    return {name: statistics.fmean(scores) for name, scores in found.items() if scores}


class MMEB(AbsTaskAggregate):
    """All of MMEB: overall mean, in and out of domain, and the four meta-tasks."""

    def __init__(self, **kwargs: Any) -> None:
        tasks = mmeb_tasks()
        self.metadata = self.metadata.model_copy(update={"tasks": tasks})
        if local_root() is not None:
            parts = "".join(task.metadata.revision for task in tasks)
            self.metadata = with_digest(self.metadata, digest(parts, length=12))
        super().__init__(**kwargs)

    def task_results_to_scores(self, task_results: list[TaskResult]) -> dict[str, Mapping[str, Any]]:
        """Average the results of the subsets.

        Args:
            task_results: One result for each subset.

        Returns:
            ``{"test": {subset name: scores}}`` with `mean_scores`, the number of tasks and the names left out.
        """
        score_of = {
            result.task_name.removeprefix("MMEB-"): float(result.scores["test"][0]["main_score"])
            for result in task_results
            if result.task_name in self.taskname_to_task
        }
        means = mean_scores(score_of)
        left_out = [subset.name for subset in SUBSETS if subset.name not in score_of]
        scores = {**means, "hit_rate_at_1": means["mean"], "main_score": means["mean"]}
        return {"test": {self.hf_subsets[0]: {**scores, "num_tasks": len(score_of), "left_out": left_out}}}


MMEB.metadata = AggregateTaskMetadata(
    name="MMEB",
    description=(
        "The Massive Multimodal Embedding Benchmark: 36 datasets for classification, visual question answering, "
        "retrieval and visual grounding, each query with its own candidates."
    ),
    reference="https://arxiv.org/abs/2410.05160",
    tasks=[],  # every object of the class makes its own: which data there are is known only then
    dataset={"path": HUB_DATASET, "revision": HUB_REVISION},
    main_score="hit_rate_at_1",
    type="Any2AnyRetrieval",
    eval_splits=["test"],
    eval_langs=["eng-Latn"],
    modalities=["text", "image"],
    category="it2it",
    date=("2024-01-01", "2024-10-07"),
    domains=["Web"],
    task_subtypes=["Object recognition", "Question answering", "Image Text Retrieval"],
    license="apache-2.0",
    annotations_creators="derived",
    dialect=[],
    sample_creation="found",
    bibtex_citation=MMEB_BIBTEX,
)
