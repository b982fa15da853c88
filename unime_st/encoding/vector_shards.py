"""Vector sinks and shards: collect encoded vectors in memory or as ``.npy`` shards on disk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from unime_st.data.manifest import is_complete, is_whole_shard, open_stage, record_shard
from unime_st.encoding.item_keys import ItemKeys
from unime_st.files import atomic_write


class VectorSink(Protocol):
    """Receives the vectors of a stream in order."""

    def add(self, vectors: torch.Tensor | None, size: int) -> None:
        """Append the next ``size`` rows; None if none of them has a vector."""

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Return earlier rows."""
        ...


class MemorySink:
    """Sink that keeps all vectors in memory."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor | None] = []
        self._sizes: list[int] = []

    def add(self, vectors: torch.Tensor | None, size: int) -> None:
        """Append the next rows."""
        self._blocks.append(vectors)
        self._sizes.append(size)

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Return earlier rows, all of which have a vector."""
        starts = np.cumsum([0, *self._sizes[:-1]])
        blocks = np.searchsorted(starts, rows, side="right") - 1
        found = [self._blocks[block][row - starts[block]] for row, block in zip(rows, blocks)]  # type: ignore[index]
        return torch.stack(found)

    @property
    def size(self) -> int:
        """Number of rows so far."""
        return sum(self._sizes)

    def tensor(self) -> torch.Tensor | None:
        """All rows, NaN where there is no vector; None if no row has a vector."""
        example = next((block for block in self._blocks if block is not None), None)
        if example is None:
            return None
        filled = (
            example.new_full((size, *example.shape[1:]), float("nan")) if block is None else block
            for block, size in zip(self._blocks, self._sizes)
        )
        return torch.cat(list(filled)) if len(self._blocks) > 1 else next(filled)


class ShardSink:
    """Sink that writes vectors to ``vectors-00000.npy``, ``vectors-00001.npy``, ... after existing shards."""

    def __init__(
        self, folder: Path, dim: int, dtype: npt.DTypeLike = np.float32, keys: ItemKeys | None = None
    ) -> None:
        self.folder, self.dim, self.dtype, self.keys = folder, dim, np.dtype(dtype), keys
        folder.mkdir(parents=True, exist_ok=True)
        existing = takewhile(is_whole_shard, (shard_path(folder, number) for number in count()))
        self.sizes = [len(np.load(path, mmap_mode="r")) for path in existing]
        self.before = sum(self.sizes)
        """Number of rows that an interrupted run wrote."""

    def add(self, vectors: torch.Tensor | None, size: int) -> None:
        """Write the next rows as one shard."""
        if vectors is None:
            content = np.full((size, self.dim), np.nan, dtype=self.dtype)
        else:
            content = vectors.float().cpu().numpy().astype(self.dtype)
        if self.keys is not None:
            self.keys.write(len(self.sizes), size)
        write_shard(self.folder, len(self.sizes), content)
        self.sizes.append(size)

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Read rows that were written in this run."""
        return torch.from_numpy(_read(self.folder, self.sizes, self.dim, np.asarray(rows) + self.before))

    def without_vector(self) -> list[int]:
        """Rows without a vector that an interrupted run wrote."""
        rows = np.arange(self.before)
        return [
            int(row)
            for part in np.array_split(rows, max(1, len(rows) // 4096))
            for row in part[np.isnan(_read(self.folder, self.sizes, self.dim, part)[:, 0])]
        ]


class VectorShards:
    """Vectors written by :func:`~unime_st.encoding.encode_to_shards`, read from disk on access.

    Args:
        folder: Folder of the shards.

    Raises:
        FileNotFoundError: If the folder is not finished.
        ValueError: If a shard is missing, damaged or replaced, or the folder is that of another stage.

    Example:
        >>> import tempfile
        >>> from unime_st import UniME
        >>> from unime_st.encoding import VectorShards, encode_to_shards
        >>> folder, model = tempfile.mkdtemp(), UniME("unime-tiny", device="cpu")
        >>> _ = encode_to_shards(model, ["a red circle", "a star"], folder, show_progress_bar=False)
        >>> vectors = VectorShards(folder)
        >>> vectors[:1].shape, [shard.shape for shard in vectors.shards()]
        ((1, 128), [(2, 128)])
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not is_complete(self.folder):
            raise FileNotFoundError(f"{self.folder}: no finished vectors; run encode_to_shards again")
        manifest = open_stage(self.folder)
        if not {"dim", "shards"} <= {*manifest}:
            raise ValueError(
                f"{self.folder}: expected vectors, found the output of the stage {manifest.get('stage')!r}"
            )
        self.dim, self._sizes = int(manifest["dim"]), [int(size) for size in manifest["shards"]]

    def __len__(self) -> int:
        return sum(self._sizes)

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Read one row, a slice or any rows."""
        indices = np.arange(len(self))[rows]
        found = _read(self.folder, self._sizes, self.dim, np.atleast_1d(indices))
        return found[0] if np.ndim(indices) == 0 else found

    def shards(self) -> list[np.ndarray]:
        """Memory maps of all shards in order."""
        return [np.load(shard_path(self.folder, number), mmap_mode="r") for number in range(len(self._sizes))]


def shard_path(folder: Path, number: int) -> Path:
    """Path of a shard of vectors."""
    return folder / f"vectors-{number:05d}.npy"


def write_shard(folder: Path, number: int, content: np.ndarray) -> None:
    """Write a shard of vectors atomically."""
    path = shard_path(folder, number)
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            np.save(file, content)
        record_shard(folder, temporary, path.name)


def _read(folder: Path, sizes: list[int], dim: int, rows: np.ndarray) -> np.ndarray:
    found = np.empty((len(rows), dim), dtype=np.float32)
    starts = np.cumsum([0, *sizes[:-1]])
    blocks = np.searchsorted(starts, rows, side="right") - 1
    for block in np.unique(blocks):
        here = blocks == block
        found[here] = np.load(shard_path(folder, int(block)), mmap_mode="r")[rows[here] - starts[block]]
    return found
