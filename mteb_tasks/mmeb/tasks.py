"""The 36 MMEB tasks, their aggregate and the benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata

from mteb_tasks.columns import Setting
from mteb_tasks.metadata import task_metadata
from mteb_tasks.mmeb.base_tasks import BenchmarkAggregate, BenchmarkTask, preflight, run_of
from mteb_tasks.mmeb.content_digest import subset_digest
from mteb_tasks.mmeb.location import (
    HUB_DATASET,
    HUB_REVISION,
    ImageFolders,
    data_root,
    local_root,
    parquet_files,
)
from mteb_tasks.mmeb.subset_reader import SubsetTable, locate_images, read_subset
from mteb_tasks.mmeb.subsets import META_TASKS, SUBSETS, Subset
from mteb_tasks.retrieval_task import retrieval_split
from unime_st.data.items import Item
from unime_st.data.scenes import RetrievalData
from unime_st.files import digest

if TYPE_CHECKING:
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

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
_QUERIES = 1000
"""Queries of each subset in the published runs."""
_SUBTYPES = {
    "classification": ["Object recognition"],
    "vqa": ["Question answering"],
    "retrieval": ["Image Text Retrieval"],
    "grounding": ["Object recognition"],
}


class SubsetTask(BenchmarkTask):
    """A subset of MMEB: each query ranks its own candidates; a hit is the positive at rank 1."""

    kind = "MMEB subset"
    subset: ClassVar[Subset]

    def local_root(self) -> Path | None:
        """See `BenchmarkTask.local_root`."""
        return local_root()

    def hub_root(self, run: Sequence[BenchmarkTask]) -> Path:
        """Fetch and check all subsets of the run; see `BenchmarkTask.hub_root`."""
        tasks = [task for task in run if isinstance(task, SubsetTask)]
        root = data_root([task.subset.name for task in tasks])
        if self.checked != self.data_digest(root):
            preflight(dict.fromkeys(tasks, root))
        return root

    def data_digest(self, root: Path) -> str:
        """See `BenchmarkTask.data_digest`."""
        return subset_digest(root, self.subset.name)

    def is_missing(self, root: Path) -> bool:
        """See `BenchmarkTask.is_missing`."""
        return not parquet_files(root, self.subset.name)

    def image_folders(self, root: Path) -> ImageFolders:
        """Where the images lie.

        Args:
            root: Folder of the data.
        """
        return ImageFolders(root)

    def check_data(self, root: Path) -> str:
        """See `BenchmarkTask.check_data`."""
        table = read_subset(root, self.subset)
        locate_images(table, self.image_folders(root), look=True)
        queries = len(table.query_texts)
        note = "" if queries == _QUERIES else f" (published: {_QUERIES:,})"
        return f"{self.key}: {queries:,} queries{note}, {len(table.document_texts):,} candidates"

    def retrieval_data(self, subset: str, split: str) -> RetrievalData:
        """Read the rows; see `mteb_tasks.mmeb.subset_reader.read_subset`."""
        root = self.checked_root()
        table = read_subset(root, self.subset)
        return subset_data(table, locate_images(table, self.image_folders(root)))


class MMEBTask(SubsetTask):
    """A subset of MMEB under the settings of MMEB. Data come from ``$MMEB_EVAL_DIR`` or the hub."""

    def split_tables(self, data: RetrievalData) -> RetrievalSplitData:
        """Build the tables; foreign models read texts without the official instruction."""
        query, target = (partial(official_body, self.subset, side) for side in ("query", "target"))
        return retrieval_split(
            data, self.subset.category, query_body=query, document_body=target, setting=Setting(style=MMEB_STYLE)
        )


def subset_data(table: SubsetTable, files: Mapping[str, str]) -> RetrievalData:
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
        {"__doc__": metadata.description, "__module__": __name__, "key": subset.name}
        | {"subset": subset, "metadata": metadata},
    )


MMEB_TASKS: tuple[type[MMEBTask], ...] = tuple(_task_class(subset) for subset in SUBSETS)
"""One class for each subset, in the order of `SUBSETS`."""


def mmeb_tasks() -> list[MMEBTask]:
    """Make one task object for each subset to evaluate, see `mteb_tasks.mmeb.base_tasks.run_of`."""
    return run_of(MMEB_TASKS)


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


class MMEB(BenchmarkAggregate):
    """All of MMEB: overall mean, in and out of domain, and the four meta-tasks."""

    classes = MMEB_TASKS
    keys = tuple(subset.name for subset in SUBSETS)

    def means(self, score_of: Mapping[str, float]) -> dict[str, object]:
        """See `BenchmarkAggregate.means` and `mean_scores`."""
        found = mean_scores(score_of)
        return {**found, "hit_rate_at_1": found["mean"], "main_score": found["mean"]}


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
