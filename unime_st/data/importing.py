"""Importer of JSON, JSON Lines, CSV, Parquet and `datasets` files into a record folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path

from tqdm.auto import tqdm

from unime_st.data.column_values import as_item, is_empty
from unime_st.data.items import check_unicode
from unime_st.data.logits import check_scores, to_logits
from unime_st.data.manifest import begin_stage, finish_stage
from unime_st.data.pair_specs import (
    DEFAULT_COLUMNS,
    JoinSpec,
    PairSpec,
    build_item,
    default_pairs,
    matches,
    parse_pairs,
    resolve_columns,
)
from unime_st.data.records import PairRecord, RecordSet, RecordWriter
from unime_st.data.sources import SourceRow, read_rows, source_files
from unime_st.data.validation import Candidate, ImageChecker, RejectedWriter, raise_if_empty, write_checked
from unime_st.files import locks_folder

logger = logging.getLogger(__name__)
_BATCH = 256


@locks_folder("output")
def import_records(
    source: str | Path,
    output: str | Path,
    *,
    pairs: Sequence[Mapping[str, object]] | None = None,
    image_root: str | Path | None = None,
    embed_images: bool = False,
    limit: int | None = None,
    verify_images: bool = True,
    workers: int = 4,
    overwrite: bool = False,
) -> RecordSet:
    """Import pair records from JSON, JSON Lines, CSV, Parquet or `datasets` files.

    Each row of the source gives one pair per specification. An invalid pair (missing value, unreadable image, score
    outside [0, 1], ...) goes to ``rejected.jsonl`` in the output with its row and the reason; the others are imported.
    Images are checked here so that training does not fail on them later.

    Args:
        source: File, folder of files, or saved dataset; see :func:`~unime_st.data.sources.read_rows`.
        output: Output folder.
        pairs: Pair specifications, as mappings with the fields of :class:`~unime_st.data.pair_specs.PairSpec`.
            Defaults to None: the columns query, positive (or query_text, query_image, positive_text,
            positive_image), negatives, scores, dataset.
        image_root: Folder that contains the images; paths in the data are relative to it. Defaults to the folder of
            the source.
        embed_images: Copy image files into the output. Defaults to False, which stores their paths.
        limit: Maximum number of rows. Defaults to None, all.
        verify_images: Decode every image once. False checks the headers only. Defaults to True.
        workers: Number of decoding threads. Defaults to 4.
        overwrite: Replace an output that was made with other options. Defaults to False.

    Returns:
        RecordSet: The imported records. A finished output with the same options is returned as it is.

    Raises:
        ValueError: If a specification names an unknown key or column, or no pair could be imported.
        StageConflictError: If the output was made with other inputs or options and ``overwrite`` is False.

    Example:
        >>> import json, pathlib, tempfile
        >>> from unime_st.data.importing import import_records
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "own.jsonl").write_text(json.dumps({"word": "melon", "kind": "fruit"}))
        >>> pairs = [{"query": {"text": "What is a {word}?"}, "positive": {"text": "kind"}}]
        >>> import_records(folder / "own.jsonl", folder / "records", pairs=pairs)[0].query.text
        'What is a melon?'
    """
    source, output = Path(source), Path(output)
    specs = None if pairs is None else parse_pairs(pairs)
    root = Path(image_root) if image_root is not None else source if source.is_dir() else source.parent
    options = {
        "pairs": pairs,
        "image_root": None if image_root is None else str(image_root),
        "embed_images": embed_images,
        "limit": limit,
        "verify_images": verify_images,
    }
    if not begin_stage(output, "import", inputs=source_files(source), options=options, overwrite=overwrite):
        return RecordSet.load(output)
    with (
        RecordWriter(output, image_root=None if embed_images else root) as writer,
        RejectedWriter(output) as rejected,
        ImageChecker(workers, full=verify_images) as checker,
    ):
        rows = tqdm(islice(read_rows(source), limit), desc=f"importing {source.name}", unit="row")
        _import_all(rows, specs, root, writer, rejected, checker)
    raise_if_empty(writer, rejected, source)
    finish_stage(output, {**writer.counts, "source": str(source), "rejected": rejected.count})
    return RecordSet.load(output)


def _import_all(
    rows: Iterable[SourceRow],
    specs: list[PairSpec] | None,
    root: Path,
    writer: RecordWriter,
    rejected: RejectedWriter,
    checker: ImageChecker,
) -> None:
    groups: list[_JoinGroups] = []
    iterator = iter(rows)
    resolved: list[PairSpec] | None = None
    columns: set[str] = set()
    while batch := list(islice(iterator, _BATCH)):
        good = []
        for row in batch:
            if row.values is None:
                rejected.add(row.error, file=row.file, row=row.number)
            else:
                good.append(row)
        new = {name for row in good for name in row.values or ()} - columns
        if good and (resolved is None or (new and specs is None)):
            # Rows of JSON may lack keys, so the columns are the union over all batches so far.
            columns |= new
            resolved = [resolve_columns(spec, columns) for spec in specs or default_pairs(columns)]
            groups = groups or [_JoinGroups(spec, spec.join) for spec in resolved if spec.join is not None]
        plain = [spec for spec in resolved or () if spec.join is None]
        write_checked(_pairs_of(good, plain, root, rejected), writer, rejected, checker)
        for group in groups:
            group.add(good, rejected)
    if specs is None and (unused := columns - DEFAULT_COLUMNS):
        logger.warning("columns that are not used: %s; name them in `pairs` to use them.", ", ".join(sorted(unused)))
    for group in groups:
        write_checked(group.pairs(root, rejected), writer, rejected, checker)


def _pairs_of(
    rows: Sequence[SourceRow], specs: Sequence[PairSpec], root: Path, rejected: RejectedWriter
) -> Iterator[Candidate]:
    for row, spec in product(rows, specs):
        where = {"file": row.file, "row": row.number, "dataset": spec.dataset}
        values = row.values or {}
        try:
            yield Candidate(where, _build(spec, {"query": values, "positive": values}, root))
        except (ValueError, TypeError) as error:
            rejected.add(str(error), **where)


def _build(spec: PairSpec, rows: Mapping[str, Mapping[str, object]], root: Path) -> PairRecord:
    query = build_item(spec.query, rows, "query", root)
    positive = build_item(spec.positive, rows, "positive", root)
    row = rows["positive"]
    dataset = spec.dataset if spec.dataset_column is None else str(row.get(spec.dataset_column) or "")
    check_unicode(dataset)
    found = row.get(spec.negatives) or [] if spec.negatives is not None else []
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"column {spec.negatives} contains {type(found).__name__}, expected a list")
    # Lists may be padded to one length: empty entries are dropped together with their scores.
    present = [index for index, value in enumerate(found) if not is_empty(value)]
    negatives = tuple(as_item(found[index], root) for index in present)
    scores = None if spec.scores is None else row.get(spec.scores)
    if scores is None:
        return PairRecord(query, positive, dataset, negatives)
    indices = [0, *(1 + index for index in present)]
    logits = to_logits(check_scores(scores, 1 + len(found), indices)).tolist()
    return PairRecord(query, positive, dataset, negatives, logits[0], tuple(logits[1:]))


class _JoinGroups:
    """Rows of a join, grouped by the value of its column and held in memory with their encoded images."""

    def __init__(self, spec: PairSpec, join: JoinSpec) -> None:
        self.spec, self.join = spec, join
        self._groups: dict[str, dict[str, list[SourceRow]]] = {}

    def add(self, rows: Iterable[SourceRow], rejected: RejectedWriter) -> None:
        for row in rows:
            values = row.values or {}
            roles = [role for role in ("query", "positive") if matches(getattr(self.join, role), values)]
            key = values.get(self.join.on)
            if roles and key is None:
                reason = f"column {self.join.on} has no value"
                rejected.add(reason, file=row.file, row=row.number, dataset=self.spec.dataset)
                continue
            for role in roles:
                group = self._groups.setdefault(json.dumps(key, default=str), {"query": [], "positive": []})
                group[role].append(row)

    def pairs(self, root: Path, rejected: RejectedWriter) -> Iterator[Candidate]:
        for group in self._groups.values():
            for query, positive in product(group["query"], group["positive"]):
                if query is positive:
                    continue
                where = {"file": query.file, "row": query.number, "positive_row": positive.number}
                try:
                    rows = {"query": query.values or {}, "positive": positive.values or {}}
                    yield Candidate({**where, "dataset": self.spec.dataset}, _build(self.spec, rows, root))
                except (ValueError, TypeError) as error:
                    rejected.add(str(error), **where, dataset=self.spec.dataset)
