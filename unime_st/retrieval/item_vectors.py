"""The vectors that are searched: every distinct item once, in half precision on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from unime_st.data.manifest import StageConflictError, begin_stage, finish_stage
from unime_st.data.records import ItemFolder
from unime_st.data.validation import RejectedWriter
from unime_st.encoding import VectorShards, encode_items
from unime_st.encoding.vector_shards import shard_path, write_shard
from unime_st.files import folder_lock

_CHUNK = 4096


class ChunkEncoder(Protocol):
    """Embeds chunks of the items of a folder, here or elsewhere."""

    def __call__(self, chunks: Sequence[tuple[int, int]]) -> Iterable[tuple[int, np.ndarray]]:
        """Embed items.

        Args:
            chunks: Positions (start, stop) of the items of each, in stored order.

        Returns:
            Iterable[tuple[int, np.ndarray]]: Start and vectors of each chunk, in any order; NaN for items with
            unreadable images.
        """
        ...


def encode_chunk(
    records: ItemFolder, model: SentenceTransformer, chunk: tuple[int, int], *, batch_size: int = 64
) -> np.ndarray:
    """Embed a chunk of the items of a folder.

    Args:
        records: Whose items.
        model: The embedder.
        chunk: Positions (start, stop) of the items, in stored order.
        batch_size: Items per forward pass.

    Returns:
        np.ndarray: float16 of shape (items, dim); NaN for items with unreadable images.

    Raises:
        ValueError: If the model gives vectors that are not finite in float16.
    """
    items = [records.items.at(position) for position in range(*chunk)]
    found, readable = encode_items(model, items, batch_size=batch_size, on_error="skip")
    with np.errstate(over="ignore"):  # found out below
        vectors = np.asarray(found).astype(np.float16)
    broken = np.flatnonzero(readable & ~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise ValueError(f"the model gives a vector that is not finite in float16 for {items[broken[0]]!r:.200}")
    return vectors


def encode_once(
    records: ItemFolder, model: str, dim: int, folder: str | Path, embed: ChunkEncoder, *, overwrite: bool = False
) -> VectorShards:
    """Embed all distinct items to disk; finished chunks survive a kill, finished vectors serve the next run.

    The chunks are shards of :class:`~unime_st.encoding.VectorShards`, known by their numbers, so that a cluster may
    give them in any order. Of several processes on one folder, one embeds and the others wait for it.

    Args:
        records: Whose items.
        model: Fingerprint of the embedder.
        dim: Width of the vectors.
        folder: Where they go.
        embed: What makes the vectors.
        overwrite: Replace vectors of other records or another model. Defaults to False.

    Returns:
        VectorShards: One float16 row per item, in stored order; NaN for items with unreadable images, which are in
        ``rejected.jsonl``.

    Raises:
        StageConflictError: If the folder holds vectors of other records or another model, unless ``overwrite``.
        ValueError: If the model gives vectors that are not finite in float16.
    """
    folder, total = Path(folder), len(records.items)
    with folder_lock(folder):
        if _begin(folder, records, {"model": model, "dim": dim, "dtype": "float16", "shard_size": _CHUNK}, overwrite):
            chunks = [(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]
            due = [chunk for chunk in chunks if not shard_path(folder, chunk[0] // _CHUNK).is_file()]
            with tqdm(total=total, desc="embedding", unit="item") as progress:
                progress.update(total - sum(stop - start for start, stop in due))
                for start, found in embed(due):
                    write_shard(folder, start // _CHUNK, found.astype(np.float16, copy=False))
                    progress.update(len(found))
            rejected = _set_aside(records, folder, len(chunks))
            sizes = [stop - start for start, stop in chunks]
            finish_stage(folder, {"rows": total, "shards": sizes, "dim": dim, "rejected": rejected})
    return VectorShards(folder)


def _begin(folder: Path, records: ItemFolder, options: dict[str, object], overwrite: bool) -> bool:
    try:
        return begin_stage(folder, "embed", inputs=[records.folder], options=options)
    except StageConflictError:
        if not overwrite:
            raise
        return begin_stage(folder, "embed", inputs=[records.folder], options=options, overwrite=True)


def _set_aside(records: ItemFolder, folder: Path, shards: int) -> int:
    ids = records.item_ids
    with RejectedWriter(folder, log_count=False) as rejected:
        for number in range(shards):
            for row in np.flatnonzero(np.isnan(np.load(shard_path(folder, number), mmap_mode="r")[:, 0])).tolist():
                rejected.add("its image cannot be read", row=number * _CHUNK + row, id=ids[number * _CHUNK + row])
    return rejected.count
