"""Where vectors go: into memory, or straight to shards on disk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from unime_st.data.manifest import is_complete, read_manifest
from unime_st.files import atomic_write


class VectorSink(Protocol):
    """Takes rows of vectors in the order of the stream."""

    def add(self, vectors: torch.Tensor | None, size: int) -> None:
        """Take the next ``size`` rows; None when none of them has a vector."""

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Return rows taken earlier."""
        ...


class MemorySink:
    """Keeps all vectors as tensors."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor | None] = []
        self._sizes: list[int] = []

    def add(self, vectors: torch.Tensor | None, size: int) -> None:
        """Take the next rows."""
        self._blocks.append(vectors)
        self._sizes.append(size)

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Return rows taken earlier, all of which have a vector."""
        starts = np.cumsum([0, *self._sizes[:-1]])
        blocks = np.searchsorted(starts, rows, side="right") - 1
        found = [self._blocks[block][row - starts[block]] for row, block in zip(rows, blocks)]  # type: ignore[index]
        return torch.stack(found)

    @property
    def size(self) -> int:
        """Rows taken so far."""
        return sum(self._sizes)

    def tensor(self) -> torch.Tensor | None:
        """All rows; None when there is no vector at all."""
        example = next((block for block in self._blocks if block is not None), None)
        if example is None:
            return None
        filled = (
            example.new_full((size, *example.shape[1:]), float("nan")) if block is None else block
            for block, size in zip(self._blocks, self._sizes)
        )
        return torch.cat(list(filled)) if len(self._blocks) > 1 else next(filled)


class ShardSink:
    """Writes vectors to ``vectors-00000.npy``, ``vectors-00001.npy``, ... as they come, after those that are there.

    Args:
        folder: Where to.
        dim: Width of a vector.
        dtype: Type in the files.
    """

    def __init__(self, folder: Path, dim: int, dtype: Any = np.float32) -> None:
        self.folder, self.dim, self.dtype = folder, dim, np.dtype(dtype)
        folder.mkdir(parents=True, exist_ok=True)
        there = (shard_path(folder, number) for number in count())
        self.sizes = [len(np.load(path, mmap_mode="r")) for path in takewhile(Path.is_file, there)]
        self.before = sum(self.sizes)
        """Rows that an earlier, killed run wrote."""

    def add(self, vectors: torch.Tensor | None, size: int) -> None:
        """Write the next rows as one shard."""
        if vectors is None:
            content = np.full((size, self.dim), np.nan, dtype=self.dtype)
        else:
            content = vectors.float().cpu().numpy().astype(self.dtype)
        write_shard(self.folder, len(self.sizes), content)
        self.sizes.append(size)

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Read rows written earlier in this run."""
        return torch.from_numpy(_read(self.folder, self.sizes, self.dim, np.asarray(rows) + self.before))

    def without_vector(self) -> list[int]:
        """Rows that an earlier run left without a vector."""
        rows = np.arange(self.before)
        return [
            int(row)
            for part in np.array_split(rows, max(1, len(rows) // 4096))
            for row in part[np.isnan(_read(self.folder, self.sizes, self.dim, part)[:, 0])]
        ]


class VectorShards:
    """Vectors that :func:`~unime_st.encoding.encode_to_shards` wrote; they stay on disk until they are asked for.

    Args:
        folder: Where they are.

    Raises:
        FileNotFoundError: If the folder is not finished.

    Example:
        >>> from unime_st.encoding import VectorShards
        >>> vectors = VectorShards("runs/vectors")  # doctest: +SKIP
        >>> vectors[:2].shape, [shard.shape for shard in vectors.shards()]  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not is_complete(self.folder):
            raise FileNotFoundError(f"{self.folder} holds no finished vectors; run encode_to_shards again")
        manifest = read_manifest(self.folder)
        self.dim, self._sizes = int(manifest["dim"]), [int(size) for size in manifest["shards"]]

    def __len__(self) -> int:
        return sum(self._sizes)

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Read one row, a slice or any rows."""
        indices = np.arange(len(self))[rows]
        found = _read(self.folder, self._sizes, self.dim, np.atleast_1d(indices))
        return found[0] if np.ndim(indices) == 0 else found

    def shards(self) -> list[np.ndarray]:
        """All vectors as read-only memory maps, in order."""
        return [np.load(shard_path(self.folder, number), mmap_mode="r") for number in range(len(self._sizes))]


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard of vectors lies."""
    return folder / f"vectors-{number:05d}.npy"


def write_shard(folder: Path, number: int, content: np.ndarray) -> None:
    """Write a shard of vectors that appears whole or not at all."""
    with atomic_write(shard_path(folder, number)) as temporary, temporary.open("wb") as file:
        np.save(file, content)


def _read(folder: Path, sizes: list[int], dim: int, rows: np.ndarray) -> np.ndarray:
    found = np.empty((len(rows), dim), dtype=np.float32)
    starts = np.cumsum([0, *sizes[:-1]])
    blocks = np.searchsorted(starts, rows, side="right") - 1
    for block in np.unique(blocks):
        here = blocks == block
        found[here] = np.load(shard_path(folder, int(block)), mmap_mode="r")[rows[here] - starts[block]]
    return found
