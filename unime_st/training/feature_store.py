"""Feature store: tensors by key in append-only safetensors shards, shared by any number of processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from unime_st.files import atomic_write, digest

_SHARD_BYTES = 128 << 20


class FeatureStore:
    """Append-only store of a few tensors for each key.

    A shard appears complete or not at all, and is never changed: writers need no lock, and a killed one loses its last
    shard only. A damaged shard is a ValueError.

    Example:
        >>> import tempfile
        >>> store = FeatureStore(Path(tempfile.mkdtemp()))
        >>> store.add("a", {"tokens": torch.ones(2, 3)})
        >>> store.flush()
        >>> store.refresh()
        >>> store.read("a")["tokens"].shape, store.missing(np.array([b"a", b"b"])).tolist()
        (torch.Size([2, 3]), [False, True])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._held = 0
        self.refresh()

    def refresh(self) -> None:
        """Read the index of all shards in the folder again."""
        self._paths = [str(path) for path in sorted(self.folder.glob("*.safetensors"))]
        found = [np.array(sorted({name.partition("/")[0] for name in _opened(path)[1]}), "S") for path in self._paths]
        keys = np.concatenate([np.array([], dtype="S1"), *found])
        shards = np.repeat(np.arange(len(found)), [len(part) for part in found])
        order = np.argsort(keys, kind="stable")
        self._keys, self._shards = keys[order], shards[order]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(os.path.getsize(path) for path in self._paths)

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Whether each key (bytes) had no tensors at the last :meth:`refresh`."""
        return np.isin(keys, self._keys, invert=True)

    def add(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add tensors by name, the same names for every key, under a new key of letters and digits.

        They are on disk after :meth:`flush` or when a shard is full, and can be read after :meth:`refresh`.
        """
        self._waiting[key] = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._held += sum(tensor.nbytes for tensor in tensors.values())
        if self._held >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the tensors added since the last shard; an OSError leaves the earlier shards complete."""
        if self._waiting:
            # Named by its keys: two processes that compute the same shard write the same file.
            path = self.folder / f"{digest(' '.join(self._waiting))}.safetensors"
            named = {
                f"{key}/{name}": t.contiguous() for key, some in self._waiting.items() for name, t in some.items()
            }
            try:
                with atomic_write(path) as temporary:
                    save_file(named, temporary)
            except (OSError, SafetensorError) as error:
                raise OSError(f"{path} could not be written ({error}); the shards before it are whole.") from error
        self._waiting, self._held = {}, 0

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """Tensors of a key by name, mapped from the file: copy them before changing them. KeyError if it is new."""
        index = int(np.searchsorted(self._keys, key.encode()))
        if index == len(self._keys) or self._keys[index] != key.encode():
            raise KeyError(f"{key} is not in {self.folder}")
        shard, names = _opened(self._paths[self._shards[index]])
        kinds = {name.partition("/")[2] for name in names}
        return {kind: shard.get_tensor(f"{key}/{kind}") for kind in kinds}


@lru_cache(maxsize=256)
def _opened(path: str) -> tuple[safe_open, list[str]]:
    """A memory-mapped shard, and the names of its tensors."""
    try:
        shard = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and its tensors are computed again.") from error
    return shard, list(shard.keys())
