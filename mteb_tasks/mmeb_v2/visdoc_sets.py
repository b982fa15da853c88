"""Table of the 24 visual-document sets of MMEB-V2.

Meng et al., VLM2Vec-V2 (arXiv:2507.04590); names, folders and splits as in the released evaluation code.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata


@dataclass(frozen=True)
class VisDocSet:
    """One set: text queries, a corpus of page images, relevance judgements.

    Args:
        key: Name on the leaderboard.
        column: Column of the leaderboard.
        queries: Queries of the published run.
        pages: Pages of the published run; None where no source names the number.
        hub: Dataset that the released evaluation code reads.
        mteb: mteb's task on the same data, whose hub id and revision are used; None for a set that mteb lacks.
        split: Split of the hub dataset.
        image_root: Folder of the page images in the official layout; empty for the key.
        files: How the official code names page files: by corpus id (``"png"``), or by a digest of the id with the
            extension of the id (``"hashed"``), in which case pages with a ``.jpg`` id are encoded again.
        graded: Whether judgements have several grades.
        superseded: Folder of an older version of the data, known to be faulty, in released archives.
    """

    key: str
    column: str
    queries: int
    pages: int | None
    hub: str
    mteb: str | None
    split: str = "test"
    image_root: str = ""
    files: Literal["png", "hashed"] = "png"
    graded: bool = False
    superseded: str = ""

    @property
    def task_name(self) -> str:
        """Name of the mteb task."""
        return f"MMEB-V2-{self.key}"

    @property
    def mteb_metadata(self) -> TaskMetadata | None:
        """Metadata of mteb's task on the same data, None where mteb has none."""
        import mteb.tasks

        return getattr(mteb.tasks, self.mteb).metadata if self.mteb else None

    @property
    def source(self) -> dict[str, str]:
        """Hub dataset and revision that are read without a local folder: those of mteb's task where there is one.

        No commit of the three sets that mteb lacks is known; the one that is found is written into each result.
        """
        if found := self.mteb_metadata:
            return {"path": found.dataset["path"], "revision": found.dataset["revision"]}
        return {"path": self.hub, "revision": "main"}

    @property
    def folder(self) -> str:
        """Folder of the page images below ``visdoc-tasks/``."""
        return self.image_root or self.key

    def page_file(self, corpus_id: str) -> str:
        """Name of the file that the official code writes a page to.

        Args:
            corpus_id: Id of the page.

        Example:
            >>> visdoc_set("VisRAG_ChartQA").page_file("two_col_8.jpg")
            'two_col_8_cef678aa.jpg'
            >>> visdoc_set("ViDoRe_tabfquad").page_file("11")
            '11.png'
        """
        if self.files == "png":
            return f"{corpus_id}.png"
        stem, extension = os.path.splitext(corpus_id)
        return f"{stem[:50]}_{hashlib.md5(corpus_id.encode()).hexdigest()[:8]}{extension}"


V1, V2, VISRAG, OOD = "ViDoRe-v1", "ViDoRe-v2", "VisRAG", "VisDoc OOD"


def _vidore(name: str, queries: int, pages: int, mteb: str) -> VisDocSet:
    key = f"ViDoRe_{name.partition('_test_')[0]}"
    return VisDocSet(key, V1, queries, pages, f"vidore/{name}", f"Vidore{mteb}Retrieval")


def _vidore2(name: str, queries: int, pages: int, mteb: str) -> VisDocSet:
    key = f"ViDoRe_{name}_multilingual"
    return VisDocSet(key, V2, queries, pages, f"vidore/{name}", f"Vidore2{mteb}Retrieval", image_root=key[7:])


def _visrag(key: str, queries: int, pages: int) -> VisDocSet:
    mteb = f"VisRAGRet{key.replace('-', '')}"
    hub = f"openbmb/VisRAG-Ret-Test-{key}"
    return VisDocSet(f"VisRAG_{key}", VISRAG, queries, pages, hub, mteb, split="train", files="hashed")


VISDOC_SETS: tuple[VisDocSet, ...] = (
    _vidore("arxivqa_test_subsampled_beir", 500, 500, "ArxivQA"),
    _vidore("docvqa_test_subsampled_beir", 451, 500, "DocVQA"),
    _vidore("infovqa_test_subsampled_beir", 494, 500, "InfoVQA"),
    _vidore("tabfquad_test_subsampled_beir", 280, 70, "Tabfquad"),
    _vidore("tatdqa_test_beir", 1646, 277, "Tatdqa"),
    _vidore("shiftproject_test_beir", 100, 1000, "ShiftProject"),
    _vidore("syntheticDocQA_artificial_intelligence_test_beir", 100, 968, "SyntheticDocQAAI"),
    _vidore("syntheticDocQA_energy_test_beir", 100, 977, "SyntheticDocQAEnergy"),
    _vidore("syntheticDocQA_government_reports_test_beir", 100, 972, "SyntheticDocQAGovernmentReports"),
    _vidore("syntheticDocQA_healthcare_industry_test_beir", 100, 965, "SyntheticDocQAHealthcareIndustry"),
    VisDocSet(
        "ViDoRe_esg_reports_human_labeled_v2",
        V2,
        52,
        1538,
        "vidore/esg_reports_human_labeled_v2",
        "Vidore2ESGReportsHLRetrieval",
        image_root="esg_reports_human_labeled_v2",
        graded=True,
    ),
    _vidore2("biomedical_lectures_v2", 640, 1016, "BioMedicalLectures"),
    _vidore2("economics_reports_v2", 232, 452, "EconomicsReports"),
    _vidore2("esg_reports_v2", 228, 1538, "ESGReports"),
    _visrag("ArxivQA", 816, 8066),
    _visrag("ChartQA", 63, 500),
    _visrag("MP-DocVQA", 591, 741),
    _visrag("SlideVQA", 556, 1284),
    _visrag("InfoVQA", 718, 459),
    _visrag("PlotQA", 863, 9593),
    VisDocSet(
        "ViDoSeek-page-fixed",
        OOD,
        1142,
        5349,
        "VLM2Vec/ViDoSeek-page-fixed",
        None,
        image_root="ViDoSeek-page",
        superseded="ViDoSeek-page",
    ),
    VisDocSet("ViDoSeek-doc", OOD, 1142, None, "VLM2Vec/ViDoSeek", None, graded=True),
    VisDocSet(
        "MMLongBench-page-fixed",
        OOD,
        838,
        None,
        "VLM2Vec/MMLongBench-page-fixed",
        None,
        image_root="MMLongBench-page",
        superseded="MMLongBench",
    ),
    VisDocSet("MMLongBench-doc", OOD, 838, 6492, "VLM2Vec/MMLongBench-doc", "MMLongBenchDocRetrieval", graded=True),
)
"""All sets in the order of the leaderboard."""


def visdoc_set(key: str) -> VisDocSet:
    """Return a set by its leaderboard key.

    Args:
        key: For instance ``"ViDoRe_tabfquad"``.

    Raises:
        KeyError: If there is no such set; the message lists all.
    """
    for row in VISDOC_SETS:
        if row.key == key:
            return row
    raise KeyError(f"MMEB-V2 has no visual-document set {key!r}; it has {', '.join(row.key for row in VISDOC_SETS)}")
