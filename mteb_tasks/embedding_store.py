"""Embedding store: vectors by item id, in memory or on disk, shared by tasks and resumed by a later run."""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_ID_BYTES = 16


class EmbeddingStore:
    """Vectors by item id.

    On disk, every process appends to a pair of files of its own (``<name>-<dim>.vectors`` with float32 rows, then
    ``<name>-<dim>.ids``), so a vector counts only once its id is written: a process killed at any moment leaves nothing
    half-written to be read, and two processes do not disturb each other. Memory holds only the location of each vector.

    Args:
        folder: Where to keep vectors; None keeps them in memory. The folder must stand for one model at one setting.

    Example:
        >>> store = EmbeddingStore()
        >>> store.add(["00" * 16], np.ones((1, 2), dtype=np.float32))
        >>> "00" * 16 in store, store.take(["00" * 16]).tolist()
        (True, [[1.0, 1.0]])
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._sources: list[np.ndarray | Path] = []
        self._index: dict[bytes, tuple[int, int]] = {}
        self._folder = None if folder is None else Path(folder)
        self._own: Path | None = None
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for ids in sorted(self._folder.glob("*.ids")):
                self._open(ids)

    def __contains__(self, item_id: str) -> bool:
        return bytes.fromhex(item_id) in self._index

    def __len__(self) -> int:
        return len(self._index)

    def add(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Keep vectors.

        Args:
            ids: Item ids (32 hexadecimal digits).
            vectors: float32 ``(len(ids), dim)``.

        Raises:
            ValueError: If a vector is not finite: it must not be found by a later run.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if not np.isfinite(vectors).all():
            broken = ids[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]
            raise ValueError(f"the embedding of item {broken} is not finite: load the model in float32 or bfloat16")
        keys = [bytes.fromhex(item_id) for item_id in ids]
        if self._folder is None:
            self._note(keys, vectors, 0)
        else:
            self._append(self._folder, keys, vectors)

    def take(self, ids: Sequence[str]) -> np.ndarray:
        """Look vectors up.

        Args:
            ids: Item ids, all of them known.

        Returns:
            float32 ``(len(ids), dim)``.

        Raises:
            KeyError: If an id is unknown.
        """
        indices = [self._index[bytes.fromhex(item_id)] for item_id in ids]
        opened = {number: _rows_of(self._sources[number]) for number in {number for number, _ in indices}}
        return np.stack([opened[number][row] for number, row in indices])

    def _note(self, keys: Iterable[bytes], source: np.ndarray | Path, first: int) -> None:
        if not self._sources or self._sources[-1] is not source:
            self._sources.append(source)
        self._index.update((key, (len(self._sources) - 1, row)) for row, key in enumerate(keys, first))

    def _append(self, folder: Path, keys: list[bytes], vectors: np.ndarray) -> None:
        dim = vectors.shape[1]
        own = self._own
        if own is None or _dim(own) != dim:
            own = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}-{dim}.vectors"
        self._own = None  # should writing fail, what comes after must not follow half a block
        with own.open("ab") as file, own.with_suffix(".ids").open("ab") as ids:
            first = file.tell() // (4 * dim)
            file.write(vectors.tobytes())
            file.flush()
            os.fsync(file.fileno())  # before their ids, also where the power fails
            ids.write(b"".join(keys))
        self._own = own
        self._note(keys, own, first)

    def _open(self, ids: Path) -> None:
        names, vectors = ids.read_bytes(), ids.with_suffix(".vectors")
        whole = min(len(names) // _ID_BYTES, vectors.stat().st_size // (4 * _dim(vectors)))
        if whole:
            keys = (names[start : start + _ID_BYTES] for start in range(0, whole * _ID_BYTES, _ID_BYTES))
            self._note(keys, vectors, 0)


def _dim(vectors: Path) -> int:
    return int(vectors.stem.rsplit("-", 1)[1])


def _rows_of(source: np.ndarray | Path) -> np.ndarray:
    """The array itself, or the whole rows of a file, which other processes may still be writing."""
    if isinstance(source, np.ndarray):
        return source
    dim = _dim(source)
    return np.memmap(source, dtype=np.float32, mode="r", shape=(source.stat().st_size // (4 * dim), dim))


class NewEmbeddings:
    """Takes vectors as they are made, and keeps each under the id of its item.

    Args:
        store: Where they are kept.

    Example:
        >>> import torch
        >>> store = EmbeddingStore()
        >>> new = NewEmbeddings(store)
        >>> [new.awaits(item_id) for item_id in ("00" * 16, "01" * 16, "00" * 16)]
        [True, True, False]
        >>> new.add(torch.eye(2), 2)
        >>> store.take(["01" * 16]).tolist()
        [[0.0, 1.0]]
    """

    def __init__(self, store: EmbeddingStore) -> None:
        self._store, self._seen, self._ids = store, set[str](), deque[str]()

    def awaits(self, item_id: str) -> bool:
        """Whether this item is new; if so, the next vector is its."""
        if item_id in self._seen or item_id in self._store:
            return False
        self._seen.add(item_id)
        self._ids.append(item_id)
        return True

    def add(self, vectors: torch.Tensor | None, size: int) -> None:
        """Keep the next vectors."""
        assert vectors is not None  # a faulty item would have stopped the run
        self._store.add([self._ids.popleft() for _ in range(size)], vectors.float().cpu().numpy())

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Never asked for: no item of the stream repeats another."""
        raise LookupError(f"rows {rows} repeat items that were embedded before")
