"""Setting bad records aside: what is wrong with them, and where it is written down."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from unime_st.data.images import BadImageError
from unime_st.data.items import Item
from unime_st.data.manifest import publish
from unime_st.data.records import PairRecord, RecordWriter

logger = logging.getLogger(__name__)

REJECTED = "rejected.jsonl"
_BATCH = 256


@dataclass(frozen=True)
class Candidate:
    """A record on its way into a folder.

    Args:
        where: Words that say where it came from: file, row, data set.
        record: The record.
        extra: Values of further columns.
    """

    where: dict[str, Any]
    record: PairRecord
    extra: dict[str, Any] = field(default_factory=dict)


class RejectedWriter:
    """Keeps what could not be used: ``rejected.jsonl``, published when its block ends without an error.

    Args:
        folder: Stage folder.
        name: Name of the file. Defaults to ``rejected.jsonl``.
        log_count: Log how many there are when done. Defaults to True.
    """

    def __init__(self, folder: Path, name: str = REJECTED, *, log_count: bool = True) -> None:
        self.log_count = log_count
        self.path, self.count, self.first = Path(folder) / name, 0, ""
        self._temporary = self.path.with_name(f"{name}.{os.getpid()}.tmp")

    def add(self, reason: str, **where: Any) -> None:
        """Set one thing aside.

        Args:
            reason: Why, in words.
            **where: What it was: file, row, data set, ids.
        """
        entry = json.dumps({**where, "reason": reason}, ensure_ascii=False, default=str)
        # A lone surrogate in broken data must not keep the reason from being written.
        self._handle.write(entry.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
        self.count += 1
        self.first = self.first or entry

    def __enter__(self) -> RejectedWriter:
        self.path.unlink(missing_ok=True)  # of an interrupted run
        self._handle = self._temporary.open("w", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        self._handle.close()
        if kind is not None or self.count == 0:
            self._temporary.unlink()
            return
        publish(self._temporary, self.path)
        if self.log_count:
            logger.warning("%d set aside in %s; the first: %s", self.count, self.path, self.first)


class ImageChecker:
    """Finds out which items have unreadable images, in threads, each distinct image once.

    Args:
        workers: Number of threads.
        full: Decode the pixels; otherwise only the header.
    """

    def __init__(self, workers: int, *, full: bool = True) -> None:
        self.full = full
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._sound: set[Any] = set()

    def errors(self, items: Iterable[Item]) -> dict[int, str]:
        """Check items.

        Args:
            items: Any items.

        Returns:
            dict[int, str]: Reason by ``id(item)`` for those whose image is unreadable.
        """
        with_images = [item for item in items if item.image is not None]
        reasons = self._pool.map(self._reason, with_images)
        return {id(item): reason for item, reason in zip(with_images, reasons) if reason is not None}

    def _reason(self, item: Item) -> str | None:
        image = item.image
        if image is None:
            return None
        key = (image.path, image.member) if image.data is None else hashlib.sha256(image.data).digest()
        try:
            if key not in self._sound:
                image.open() if self.full else image.size()
                self._sound.add(key)
        except BadImageError as error:
            return str(error)
        return None

    def __enter__(self) -> ImageChecker:
        return self

    def __exit__(self, *details: Any) -> None:
        self._pool.shutdown(cancel_futures=True)


def write_checked(
    candidates: Iterator[Candidate], writer: RecordWriter, rejected: RejectedWriter, checker: ImageChecker | None
) -> None:
    """Write records whose images are sound and set the others aside.

    Args:
        candidates: The records, consumed as they come.
        writer: Where sound ones go.
        rejected: Where the others go.
        checker: What looks at the images; None trusts them.
    """
    while batch := list(islice(candidates, _BATCH)):
        reasons = {} if checker is None else checker.errors(item for entry in batch for item in _items(entry.record))
        for entry in batch:
            bad = [reasons[id(item)] for item in _items(entry.record) if id(item) in reasons]
            if bad:
                rejected.add("; ".join(bad), **entry.where)
                continue
            writer.add(entry.record, **entry.extra)


def require_some(writer: RecordWriter, rejected: RejectedWriter, source: Path) -> None:
    """Refuse a result without a single record.

    Args:
        writer: What was written.
        rejected: What was set aside.
        source: What was read.

    Raises:
        ValueError: If nothing was written.
    """
    if writer.rows.rows:
        return
    if rejected.count:
        raise ValueError(
            f"{source}: all {rejected.count} pairs were rejected, see {rejected.path}; first: {rejected.first}"
        )
    raise ValueError(f"{source}: no pairs; the source is empty or no two rows meet the conditions of a join")


def _items(record: PairRecord) -> tuple[Item, ...]:
    return (record.query, record.positive, *record.negatives)
