"""Item keys: 8 bytes of the content of every item of a shard folder, by which a call with other items is found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice, repeat, takewhile
from pathlib import Path

import numpy as np

from unime_st.data.images import ImageRef
from unime_st.data.manifest import StageConflictError, is_whole_shard, record_shard
from unime_st.encoding.content_keys import content_key
from unime_st.encoding.model_inputs import ModelInput, image_paths, normalize_input
from unime_st.files import atomic_write, digest

_UNREADABLE = 0
"""Key of an item that cannot be read."""


class ItemKeys:
    """Keys of the items in a folder of vectors, in ``keys-00000.npy``, ``keys-00001.npy``, ... beside their vectors.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._new: list[int] = []

    def compare(self, items: Iterator[ModelInput], shards: int, rows: int, *, finished: bool = False) -> None:
        """Compare the first ``rows`` items with those of the first ``shards`` shards; memory holds one shard of keys.

        Folders of earlier versions have no keys, and items that could not be read have none: they are not compared.

        Args:
            items: The items; those that are compared are taken from the iterator.
            shards: Number of shards of the folder.
            rows: Number of their rows.
            finished: Whether there may be no more items.

        Raises:
            StageConflictError: If an item is another one, or there are fewer or more; the message says which.
        """
        paths = takewhile(is_whole_shard, map(self._path, range(shards)))
        stored = chain((key for path in paths for key in np.load(path).tolist()), repeat(_UNREADABLE))
        count = 0
        for count, (key, value) in enumerate(zip(islice(stored, rows), items), 1):
            if key != _UNREADABLE and key != _key(value):
                raise self._conflict(f"item {count - 1} is not {value!r:.80}")
        if count < rows:
            used = "" if count else ", as those of an iterator that was read before do"
            raise self._conflict(f"there are {rows} of them, and the items end after {count}{used}")
        if finished and (more := list(islice(items, 1))):
            raise self._conflict(f"there are {rows} of them, and item {rows} is {more[0]!r:.80}")

    def _conflict(self, difference: str) -> StageConflictError:
        return StageConflictError(
            f"{self.folder} holds the vectors of other items: {difference}. Choose another output folder, or pass "
            "overwrite=True (--overwrite) to delete the old result."
        )

    def record(self, items: Iterable[ModelInput]) -> Iterator[ModelInput]:
        """Items as they are, with their keys kept for :meth:`write`."""
        for value in items:
            self._new.append(_key(value))
            yield value

    def write(self, number: int, size: int) -> None:
        """Write the keys of the next shard. They come before its vectors, so that no vectors lack them."""
        content = np.array(self._new[:size], np.uint64)
        del self._new[:size]
        with atomic_write(self._path(number)) as temporary:
            with temporary.open("wb") as file:
                np.save(file, content)
            record_shard(self.folder, temporary, self._path(number).name)

    def _path(self, number: int) -> Path:
        return self.folder / f"keys-{number:05d}.npy"


def _key(value: object) -> int:
    try:
        return int(digest(repr(content_key(_by_content(normalize_input(value)))), length=16), 16)
    except ValueError:  # reported when it is encoded; a file may be there next time
        return _UNREADABLE


def _by_content(value: object) -> object:
    """A normalized input whose image files are known by their content: a copied or mounted folder has other files."""
    if not image_paths(value):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("image"), str):
        return {**value, "image": ImageRef(path=value["image"])}
    return ImageRef(path=value) if isinstance(value, str) else value
