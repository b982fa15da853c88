"""Pair records (query, positive, judged negatives) and the record folder that stores them."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import pyarrow as pa
from tqdm.auto import tqdm

from unime_st.data.items import Item
from unime_st.data.manifest import is_complete, open_stage, write_manifest
from unime_st.data.parquet_shards import ItemReader, ItemWriter, Row, ShardReader, ShardWriter

logger = logging.getLogger(__name__)
RowT = TypeVar("RowT")

ROW_SCHEMA = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("positive", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("negatives", pa.list_(pa.string()), nullable=False),
        pa.field("positive_logit", pa.float32()),
        pa.field("negative_logits", pa.list_(pa.float32()), nullable=False),
    ]
)
"""One row per pair record; items are referenced by their ids."""


@dataclass(frozen=True)
class PairRecord:
    """A query and its positive, optionally with judged negatives.

    Args:
        query: The query item.
        positive: The item that matches the query.
        dataset: Name of the dataset the pair comes from. Defaults to "".
        negatives: Negatives of the query, in the order in which they were selected.
        positive_logit: Log-odds Yes - No of the judge for the positive, before any temperature. None if not judged.
        negative_logits: The same for each negative; empty if not judged.

    Raises:
        ValueError: If a field has a wrong type, or logits are given, but not exactly one finite logit for the positive
            and each negative.

    Example:
        >>> from unime_st.data import Item, PairRecord
        >>> PairRecord(Item("2 + 2"), Item("4"), negatives=(Item("5"),), positive_logit=3.0, negative_logits=(-4.0,)).dataset
        ''
    """

    query: Item
    positive: Item
    dataset: str = ""
    negatives: tuple[Item, ...] = ()
    positive_logit: float | None = None
    negative_logits: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.negatives, (tuple, list)):
            raise ValueError(f"negatives must be a tuple of items, got {self.negatives!r:.80}")
        for item in (self.query, self.positive, *self.negatives):
            if not isinstance(item, Item):
                raise ValueError(f"a record holds items, got {item!r:.80}: expected Item(text, image)")
        if not isinstance(self.dataset, str):
            raise ValueError(f"dataset must be the name of a dataset, got {self.dataset!r:.80}")
        if not isinstance(self.negative_logits, (tuple, list)):
            raise ValueError(f"negative_logits must be a tuple of judge logits, got {self.negative_logits!r:.80}")
        if self.positive_logit is None and not self.negative_logits:
            return
        if self.positive_logit is None or len(self.negative_logits) != len(self.negatives):
            raise ValueError(
                f"a judged record needs one logit for its positive and one for each of its {len(self.negatives)} negatives, "
                f"got {self.positive_logit} for the positive and {len(self.negative_logits)} for the negatives"
            )
        logits = (self.positive_logit, *self.negative_logits)
        if not all(
            isinstance(logit, Real) and not isinstance(logit, bool) and math.isfinite(logit) for logit in logits
        ):
            raise ValueError(f"judge logits must be finite numbers, got {logits!r:.80}")


class ItemFolder:
    """A finished stage folder: the distinct items, rows that reference items by id, and a manifest.

    Rows are read on access and images stay undecoded, so a folder may be larger than memory. Instances can be pickled
    for data loader workers.

    Args:
        folder: Folder of a finished stage.

    Attributes:
        manifest: Content of ``manifest.json``.
        items: Reader of the distinct items.
        row_shards: Reader of the rows as stored.

    Raises:
        FileNotFoundError: If the folder is not a finished stage.
        ValueError: If a file of the folder is missing, damaged or replaced, or the rows are those of another stage.
    """

    content: ClassVar[str] = "the output of a stage"
    row_columns: ClassVar[tuple[str, ...]] = ("query", "positive", "dataset")

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = open_stage(folder)
        self.items = ItemReader(self.folder, self.manifest.get("image_root"))
        self.row_shards = ShardReader(self.folder, "rows")
        if missing := {*self.row_columns} - {*self.row_shards.names}:
            raise ValueError(
                f"{folder}: expected {self.content}, found rows without {', '.join(sorted(missing))}: it is the output "
                f"of the stage {self.manifest.get('stage') or 'import'!r}"
            )

    @property
    def rows(self) -> pa.Table:
        """All rows as an Arrow table; items are referenced by their ids."""
        return self.row_shards.table()

    @property
    def item_ids(self) -> list[str]:
        """Ids of the distinct items in stored order."""
        return self.items.ids

    def item(self, item_id: str) -> Item:
        """Return the item with an id; KeyError if there is no such item."""
        return self.items.item(item_id)

    def __len__(self) -> int:
        return len(self.row_shards)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.folder,)


class RowFolder(ItemFolder, ABC, Generic[RowT]):
    """An item folder as a sequence: each row is built into an object that holds its items."""

    def __getitem__(self, index: int) -> RowT:
        return self._build(self.row_shards.row(index + len(self) if index < 0 else index))

    def __iter__(self) -> Iterator[RowT]:
        return map(self._build, self.row_shards.rows())

    @abstractmethod
    def _build(self, row: Row) -> RowT: ...


class RecordSet(RowFolder[PairRecord]):
    """A folder of pair records, as a sequence of :class:`PairRecord`.

    Args:
        folder: Folder of finished records.

    Attributes:
        manifest: Content of ``manifest.json``.
        items: Reader of the distinct items.
        row_shards: Reader of the rows as stored, including additional columns.

    Raises:
        FileNotFoundError: If the folder is not a finished stage.

    Example:
        >>> import tempfile
        >>> from unime_st.data import Item, PairRecord, RecordSet
        >>> pair = PairRecord(Item("a red square"), Item("the square is red"), dataset="demo")
        >>> records = RecordSet.write(tempfile.mkdtemp(), [pair], {"source": "made up"})
        >>> len(records), records[0] == pair, records.manifest["items"]
        (1, True, 2)
    """

    content = "pair records"
    row_columns = tuple(ROW_SCHEMA.names)

    @classmethod
    def load(cls, folder: str | Path) -> RecordSet:
        """Open a folder of finished records."""
        return cls(folder)

    @classmethod
    def write(
        cls,
        folder: str | Path,
        records: Iterable[PairRecord],
        manifest: Mapping[str, object],
        *,
        image_root: str | Path | None = None,
    ) -> RecordSet:
        """Write a stream of records; the folder is valid only after the last one was written.

        Args:
            folder: Output folder, created if absent. Remains of an interrupted write are replaced.
            records: Iterable of records, consumed once without holding them in memory.
            manifest: Facts to store with the records, such as their source.
            image_root: Image files below this folder are stored as relative paths, all other images as bytes.
                Defaults to None, which stores every image as bytes, so that the folder can be moved.

        Returns:
            RecordSet: The written records.

        Raises:
            FileExistsError: If the folder already holds finished records.
            BadImageError: If an image cannot be read.
        """
        with RecordWriter(folder, image_root=image_root) as writer:
            for record in tqdm(records, desc="writing records", unit="row", leave=False):
                writer.add(record)
        writer.finish(manifest)
        return cls(folder)

    @property
    def positive_ids(self) -> list[str]:
        """Ids of the distinct positives, in order of their first rows."""
        return list(dict.fromkeys(self.row_shards.column("positive").to_pylist()))

    def _build(self, row: Row) -> PairRecord:
        return PairRecord(
            query=self.item(row["query"]),
            positive=self.item(row["positive"]),
            dataset=row["dataset"],
            negatives=tuple(map(self.item, row["negatives"])),
            positive_logit=row["positive_logit"],
            negative_logits=tuple(row["negative_logits"]),
        )


class RecordWriter:
    """Writer of a :class:`RecordSet`, row by row and with optional additional columns.

    Use it as a context manager and call :meth:`finish` afterwards; until then the folder is unfinished.

    Args:
        folder: Output folder.
        image_root: As for :meth:`RecordSet.write`.
        extra: Arrow fields of additional columns. Defaults to none.

    Raises:
        FileExistsError: If the folder already holds finished records.
    """

    def __init__(
        self, folder: str | Path, *, image_root: str | Path | None = None, extra: Iterable[pa.Field] = ()
    ) -> None:
        self.folder = Path(folder)
        if is_complete(self.folder):
            raise FileExistsError(
                f"{folder}: already contains finished records; choose another folder or remove this one"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in [*self.folder.glob("items-*.parquet*"), *self.folder.glob("rows-*.parquet*")]:
            stale.unlink()
        self.items = ItemWriter(self.folder, image_root)
        self.rows = ShardWriter(self.folder, "rows", pa.schema([*ROW_SCHEMA, *extra]))

    def add(self, record: PairRecord, **extra: object) -> None:
        """Append one record, with the values of the additional columns.

        Raises:
            BadImageError: If one of its images cannot be read. The row is not appended then.
        """
        query, positive, *negatives = [
            self.items.add(item) for item in (record.query, record.positive, *record.negatives)
        ]
        self.rows.add(
            {
                "query": query,
                "positive": positive,
                "dataset": record.dataset,
                "negatives": negatives,
                "positive_logit": record.positive_logit,
                "negative_logits": list(record.negative_logits),
                **extra,
            }
        )

    def finish(self, manifest: Mapping[str, object]) -> None:
        """Write the manifest, which marks the folder as finished; counts and the image root are added to the facts."""
        write_manifest(self.folder, {**manifest, **self.counts})

    @property
    def counts(self) -> dict[str, object]:
        """Entries of every record manifest: number of items, number of rows and the image root."""
        root = None if self.items.root is None else str(self.items.root)
        return {"items": self.items.shards.rows, "rows": self.rows.rows, "image_root": root}

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        for shards in (self.items.shards, self.rows):
            shards.close() if kind is None else shards.abort()
