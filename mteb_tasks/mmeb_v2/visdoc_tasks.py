"""The 24 visual-document tasks of MMEB-V2: text queries rank the pages of a corpus; nDCG at 5."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mteb_tasks.metadata import UniMETaskMetadata, task_metadata
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb_v2.citations import VIDORAG_BIBTEX
from mteb_tasks.mmeb_v2.data_digest import set_digest
from mteb_tasks.mmeb_v2.data_folder import DataFolder, HubFolder, local_root
from mteb_tasks.mmeb_v2.ndcg import official_ndcg
from mteb_tasks.mmeb_v2.page_files import page_files
from mteb_tasks.mmeb_v2.preflight import check_set, read_set
from mteb_tasks.mmeb_v2.profiles import PAGE, PAGE_QUERY, joined
from mteb_tasks.mmeb_v2.v2_task import MMEBV2Task
from mteb_tasks.mmeb_v2.visdoc_sets import VISDOC_SETS, VisDocSet
from mteb_tasks.retrieval_task import ScoredSplit, retrieval_split
from unime_st.data.items import Item
from unime_st.data.scenes import RetrievalData

if TYPE_CHECKING:
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    from mteb_tasks.mmeb.base_tasks import BenchmarkTask


class VisDocTask(MMEBV2Task):
    """A visual-document set of MMEB-V2: each query ranks all pages. Data come from ``$MMEB_V2_DIR`` or the hub."""

    row: ClassVar[VisDocSet]

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        asks = {"query": self.profile.page_query, "document": self.profile.candidates or PAGE}
        self.metadata = self.metadata.model_copy(update={"prompt": asks})
        self._integer_ids = False

    def local_root(self) -> Path | None:
        """See `BenchmarkTask.local_root`."""
        return local_root()

    def hub_root(self, run: Sequence[BenchmarkTask]) -> Path:
        """Fetch this set alone; see `BenchmarkTask.hub_root`."""
        return HubFolder(self.row).root

    def data_digest(self, root: Path) -> str:
        """See `BenchmarkTask.data_digest`."""
        return set_digest(root, self.row)

    def is_missing(self, root: Path) -> bool:
        """See `BenchmarkTask.is_missing`."""
        try:
            return not DataFolder(root).tables(self.row)
        except MMEBDataError:
            return False  # said aloud when the data are needed

    def check_data(self, root: Path) -> str:
        """See `BenchmarkTask.check_data`."""
        return check_set(DataFolder(root), self.row)

    def retrieval_data(self, subset: str, split: str) -> RetrievalData:
        """Read queries, pages and graded judgements; see `mteb_tasks.mmeb_v2.page_tables.read_page_tables`."""
        root = self.checked_root()
        folder = HubFolder(self.row) if self.local_root() is None else DataFolder(root)
        tables = read_set(folder, self.row)
        self._integer_ids = tables.integer_ids
        in_text = self.profile.instruction_in == "text"
        asked = partial(joined, self.profile.page_query) if in_text else str
        page_text = joined(PAGE, image=True) if in_text else None
        pages = zip(tables.pages, page_files(tables, folder))
        return RetrievalData(
            queries={query: Item(text=asked(text)) for query, text in tables.queries.items()},
            corpus={page: Item(text=page_text, image=file) for page, file in pages},
            relevant={query: set(grades) for query, grades in tables.grades.items()},
            grades=tables.grades,
        )

    def split_tables(self, data: RetrievalData) -> RetrievalSplitData:
        """Build the tables; foreign models read queries without the instruction, which mteb gives them apart."""
        queries, pages = self.profile.encoding(self.profile.page_query, self.profile.style)
        head = f"{self.profile.page_query} "
        return retrieval_split(
            data,
            "t2i",
            query_body=lambda text: text.removeprefix(head),
            setting=queries,
            document_setting=pages,
        )

    def added_scores(self, split: ScoredSplit) -> dict[str, Any]:
        """nDCG at full precision and, for graded sets, the official variant of it."""
        found = super().added_scores(split)
        found["ndcg_at_5"] = statistics.fmean(of_query["ndcg_cut_5"] for of_query in split.scores.values())
        if self.row.graded and self._integer_ids:
            found["ndcg_at_5_official"] = statistics.fmean(
                official_ndcg(_ranked(split.results[query]), {int(page): grade for page, grade in grades.items()})
                for query, grades in split.tables["relevant_docs"].items()
            )
        return found

    def protocol(self) -> dict[str, str]:
        """See `MMEBV2Task.protocol`."""
        return self.profile.facts(self.profile.page_query, PAGE)


def _ranked(scores: Mapping[str, float]) -> list[int]:
    """Page ids, best first; among equal scores the larger id as text, as trec_eval breaks ties."""
    return [int(page) for page in sorted(scores, key=lambda page: (scores[page], page), reverse=True)]


def _task_class(row: VisDocSet) -> type[VisDocTask]:
    theirs = row.mteb_metadata
    if theirs is None and row.key.startswith("MMLongBench"):  # the documents of MMLongBench-doc, judged by page
        theirs = next(other for other in VISDOC_SETS if other.key == "MMLongBench-doc").mteb_metadata
    facts: dict[str, Any] = {
        "reference": "https://arxiv.org/abs/2502.18017",
        "date": ("2025-01-01", "2025-03-01"),
        "license": "not specified",
        "sample_creation": "found",
        "bibtex_citation": VIDORAG_BIBTEX,
    }
    if theirs is not None:
        names = ("reference", "date", "domains", "license", "annotations_creators", "sample_creation")
        facts = {name: getattr(theirs, name) for name in names}
        facts |= {"eval_langs": theirs.bcp47_codes, "bibtex_citation": theirs.bibtex_citation}
    metadata: UniMETaskMetadata = task_metadata(
        **{
            "domains": ["Academic", "Web"],
            **facts,
            "name": row.task_name,
            "description": (
                f"The visual-document set {row.key} of MMEB-V2 ({row.column}): rank the pages of the corpus for each "
                "query, by the protocol of VLM2Vec-V2; nDCG at 5."
            ),
            "category": "t2i",
            "type": "DocumentUnderstanding",
            "dataset": row.source,
            "main_score": "ndcg_at_5",
            "prompt": {"query": PAGE_QUERY, "document": PAGE},
        }
    )
    name = "MMEBV2" + "".join(part[:1].upper() + part[1:] for part in row.key.replace("-", "_").split("_"))
    return type(
        name,
        (VisDocTask,),
        {"__doc__": metadata.description, "__module__": __name__, "key": row.key, "row": row, "metadata": metadata},
    )


VISDOC_TASKS: tuple[type[VisDocTask], ...] = tuple(_task_class(row) for row in VISDOC_SETS)
"""One class for each set, in the order of the leaderboard."""
