"""mteb retrieval task made of a record folder, for evaluation on data of your own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from mteb_tasks.local_data import with_digest, without_digest
from mteb_tasks.metadata import task_metadata
from mteb_tasks.retrieval_task import ItemRetrievalTask
from unime_st.data.items import Item
from unime_st.data.pdf_pages import PdfPage, read_pages
from unime_st.data.records import RecordSet
from unime_st.data.scenes import RetrievalData
from unime_st.files import digest


class RecordsRetrieval(ItemRetrievalTask):
    """Find the positive of each query among all positives of its dataset.

    One subset per ``dataset`` name in the records. Every positive paired with the same query (by content) counts as
    relevant, so duplicates in the data are not punished. Of a folder made by `unime_st.data.pdf_pages.import_pdf_pages`
    all pages are the corpus, and a page is named by its file and number (``"report.pdf#page=3"``). In results, the name
    of a subset carries a digest of the records, so a score of other records is never taken for that of these.

    Args:
        folder: A record folder, for instance made by `unime_st.data.importing.import_records`.
        name: Task name; the default is ``Records-<folder name>``.
        **kwargs: mteb's task arguments.

    Raises:
        ValueError: If the folder holds no records.

    Example:
        >>> import mteb
        >>> from mteb_tasks import wrap
        >>> mteb.evaluate(wrap(model), RecordsRetrieval("runs/emoji/test"), cache=None)  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path, *, name: str | None = None, **kwargs: object) -> None:
        self.records = RecordSet.load(folder)
        if len(self.records) == 0:
            raise ValueError(f"{folder} holds no records: there is nothing to evaluate")
        names = sorted(set(self.records.rows["dataset"].to_pylist()))
        self._dataset_of = {subset or "default": subset for subset in names}
        # Records may mix texts, images and both on either side.
        metadata = task_metadata(
            name=name or f"Records-{Path(folder).name}",
            description=f"Find the positive of each query among the positives of its dataset ({folder}).",
            category="it2it",
            dataset={"path": str(folder), "revision": "local"},
            eval_langs={subset: ["eng-Latn"] for subset in self._dataset_of},
        )
        self.metadata = with_digest(metadata, _fingerprint(self.records))
        super().__init__(**kwargs)

    def retrieval_data(self, subset: str, split: str) -> RetrievalData:
        """Collect queries, positives and pairs of one dataset; of PDF files, all pages are the corpus."""
        if pages := read_pages(self.records.folder):
            return self._page_data(pages)
        rows, dataset = (
            self.records.rows.select(["query", "positive", "dataset"]),
            self._dataset_of[without_digest(subset)],
        )
        relevant: dict[str, set[str]] = {}
        for row in rows.to_pylist():
            if row["dataset"] == dataset:
                relevant.setdefault(row["query"], set()).add(row["positive"])
        positives = {positive: None for found in relevant.values() for positive in sorted(found)}
        return RetrievalData(
            queries=self._items(relevant), corpus=self._items(positives), relevant=relevant, candidates=None
        )

    def _page_data(self, pages: Sequence[PdfPage]) -> RetrievalData:
        relevant: dict[str, set[str]] = {}
        for row in self.records.rows.select(["query", "file", "page"]).to_pylist():
            relevant.setdefault(row["query"], set()).add(PdfPage(row["file"], row["page"], "").name)
        corpus = {page.name: self.records.item(page.item) for page in pages}
        return RetrievalData(queries=self._items(relevant), corpus=corpus, relevant=relevant)

    def _items(self, ids: Iterable[str]) -> dict[str, Item]:
        return {item_id: self.records.item(item_id) for item_id in ids}


def _fingerprint(records: RecordSet) -> str:
    """Digest of the records that changes when one of them does."""
    return digest(json.dumps(records.rows.to_pydict(), default=str), length=12)
