"""Record validation: rows with unreadable images or videos or wrong values go to ``rejected.jsonl`` with a reason."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from unime_st.data.images import BadImageError, ImageRef
from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordWriter
from unime_st.data.videos import VideoRef
from unime_st.files import commit_file, digest, temporary_path

logger = logging.getLogger(__name__)

REJECTED = "rejected.jsonl"
_BATCH = 256

Key = str | tuple[object, ...]
"""What tells images and videos from one another."""


@dataclass(frozen=True)
class Candidate:
    """A parsed record with unchecked images and videos, its origin (file, row, dataset) and additional columns."""

    where: dict[str, object]
    record: PairRecord
    extra: dict[str, object] = field(default_factory=dict)


class RejectedWriter:
    """Context manager that writes rejected rows to ``rejected.jsonl``; the file appears when the block ends cleanly."""

    def __init__(self, folder: Path, name: str = REJECTED, *, log_count: bool = True) -> None:
        self.log_count = log_count
        self.path, self.count, self.first = Path(folder) / name, 0, ""
        self._temporary = temporary_path(self.path)

    def add(self, reason: str, **where: object) -> None:
        """Record why one row was rejected, and which it is: file, row, dataset, ids."""
        entry = json.dumps({**where, "reason": reason}, ensure_ascii=False, default=str)
        # Broken data may hold lone surrogates, which UTF-8 cannot encode.
        self._handle.write(entry.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
        self.count += 1
        self.first = self.first or entry

    def __enter__(self) -> RejectedWriter:
        self.path.unlink(missing_ok=True)  # left by an interrupted run
        self._handle = self._temporary.open("w", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._handle.close()
        if kind is not None or self.count == 0:
            self._temporary.unlink()
            return
        commit_file(self._temporary, self.path)
        if self.log_count:
            logger.warning("%d rows rejected, see %s; the first: %s", self.count, self.path, self.first)


class ImageChecker:
    """Checks in threads whether images and videos can be read, each distinct one once, decoded or by its header."""

    def __init__(self, workers: int, *, full: bool = True) -> None:
        self.full = full
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._sound: set[Key] = set()

    def errors(self, items: Iterable[Item]) -> dict[int, str]:
        """Reasons by ``id(item)``, for items whose image or video is unreadable."""
        with_media = [item for item in items if item.image is not None or item.video is not None]
        reasons = self._pool.map(self._reason, with_media)
        return {id(item): reason for item, reason in zip(with_media, reasons) if reason is not None}

    def _reason(self, item: Item) -> str | None:
        image, video = item.image, item.video
        try:
            if image is not None and (key := _image_key(image)) not in self._sound:
                image.open() if self.full else image.size()
                self._sound.add(key)
            if video is not None and (key := _video_key(video)) not in self._sound:
                video.check() if self.full else video.shape()
                self._sound.add(key)
        except BadImageError as error:
            return str(error)
        return None

    def __enter__(self) -> ImageChecker:
        return self

    def __exit__(self, *details: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def write_checked(
    candidates: Iterator[Candidate], writer: RecordWriter, rejected: RejectedWriter, checker: ImageChecker | None
) -> None:
    """Write the records whose images and videos can be read, reject the others; without a checker all are written."""
    while batch := list(islice(candidates, _BATCH)):
        reasons = {} if checker is None else checker.errors(item for entry in batch for item in _items(entry.record))
        for entry in batch:
            bad = [reasons[id(item)] for item in _items(entry.record) if id(item) in reasons]
            if bad:
                rejected.add("; ".join(bad), **entry.where)
                continue
            writer.add(entry.record, **entry.extra)


def raise_if_empty(writer: RecordWriter, rejected: RejectedWriter, source: Path) -> None:
    """Raise a ValueError if an import produced no record."""
    if writer.rows.rows:
        return
    if rejected.count:
        raise ValueError(
            f"{source}: all {rejected.count} pairs were rejected, see {rejected.path}; the first: {rejected.first}"
        )
    raise ValueError(f"{source}: no pairs found; the source is empty, or no two rows meet the conditions of a join")


def _image_key(image: ImageRef) -> Key:
    return (image.path, image.member) if image.data is None else digest(image.data)


def _video_key(video: VideoRef) -> Key:
    """Key that keeps no frame in memory, as the reference itself would."""
    return video.path, video.decoder, video.num_frames, *map(_image_key, video.frames)


def _items(record: PairRecord) -> tuple[Item, ...]:
    return (record.query, record.positive, *record.negatives)
