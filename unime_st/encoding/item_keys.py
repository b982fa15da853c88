"""Item keys: 8 bytes of the content of every item of a shard folder, by which a call with other items is found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path

import numpy as np

from unime_st.data.manifest import StageConflictError, is_whole_shard, record_shard
from unime_st.encoding.content_keys import content_key
from unime_st.encoding.model_inputs import ModelInput, normalize_input
from unime_st.files import atomic_write, digest

_UNREADABLE = 0


class ItemKeys:
    """Keys of the items in a folder of vectors, in ``keys-00000.npy``, ``keys-00001.npy``, ... beside their vectors.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._new: list[int] = []

    def compare(self, items: Iterable[ModelInput], shards: int, rows: int) -> None:
        """Compare the first ``rows`` items with those of the first ``shards`` shards.

        An iterator that ends early is not another one. Folders of earlier versions have no keys; they are accepted.

        Raises:
            StageConflictError: If an item is another one; the message names it.
        """
        paths = takewhile(is_whole_shard, map(self._path, range(shards)))
        stored = [key for path in paths for key in np.load(path).tolist()]
        for row, value in enumerate(islice(items, rows)):
            if row < len(stored) and stored[row] != _key(value):
                raise StageConflictError(
                    f"{self.folder} holds the vectors of other items: item {row} is not {value!r:.80}. Choose another "
                    "output folder, or pass overwrite=True (--overwrite) to delete the old result."
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
        return int(digest(repr(content_key(normalize_input(value))), length=16), 16)
    except ValueError:  # reported when it is encoded; a file may be there next time
        return _UNREADABLE
