"""Item vectors for mining: every distinct item of a record folder, encoded once to float16 shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from tqdm.auto import tqdm

from unime_st.data.manifest import StageConflictError, begin_stage, finish_stage, is_whole_shard
from unime_st.data.records import ItemFolder
from unime_st.data.validation import RejectedWriter
from unime_st.encoding import VectorShards, encode_items
from unime_st.encoding.vector_shards import shard_path, write_shard
from unime_st.files import folder_lock

_CHUNK = 4096


class ChunkEncoder(Protocol):
    """Encodes chunks of the items of a folder, in this process or on a cluster."""

    def __call__(self, chunks: Sequence[tuple[int, int]]) -> Iterable[tuple[int, np.ndarray]]:
        """Encode chunks of items.

        Args:
            chunks: Positions (start, stop) of the items of each chunk in stored order.

        Returns:
            Iterable[tuple[int, np.ndarray]]: Start and vectors of each chunk, in any order. Rows of unreadable items
            are NaN.
        """
        ...


def encode_chunk(
    records: ItemFolder,
    model: SentenceTransformer,
    chunk: tuple[int, int],
    *,
    prompt: str | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Encode a chunk of the items of a folder.

    Args:
        records: Folder of the items.
        model: The embedding model.
        chunk: Positions (start, stop) of the items in stored order.
        prompt: As for :func:`~unime_st.encoding.encode_items`. Defaults to None, the default prompt of the model.
        batch_size: As for :func:`~unime_st.encoding.encode_items`. Defaults to 64.

    Returns:
        np.ndarray: float16 vectors of shape (num_items, dim). Rows of unreadable items are NaN.

    Raises:
        ValueError: If the model computes vectors that are not finite in float16.
    """
    items = [records.items.at(position) for position in range(*chunk)]
    found, readable = encode_items(
        model,
        items,
        batch_size=batch_size,
        prompt=prompt,
        normalize_embeddings=needs_normalization(model),
        on_error="skip",
    )
    with np.errstate(over="ignore"):  # overflow is checked below
        vectors = np.asarray(found).astype(np.float16)
    broken = np.flatnonzero(readable & ~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise ValueError(f"the model computes a vector that is not finite in float16 for {items[broken[0]]!r:.200}")
    return vectors


def chunk_encoder(
    records: ItemFolder, model: SentenceTransformer, *, prompt: str | None = None, batch_size: int = 64
) -> ChunkEncoder:
    """Make an encoder of chunks that runs in this process, see :func:`encode_chunk`.

    Args:
        records: Folder of the items.
        model: The embedding model.
        prompt: As for :func:`encode_chunk`.
        batch_size: As for :func:`encode_chunk`.
    """

    def encode(chunks: Sequence[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
        return (
            (chunk[0], encode_chunk(records, model, chunk, prompt=prompt, batch_size=batch_size)) for chunk in chunks
        )

    return encode


def needs_normalization(model: SentenceTransformer) -> bool:
    """Whether vectors must be scaled to unit length, so that dot products are the similarity that the model declares.

    Args:
        model: The embedding model.

    Raises:
        ValueError: If the similarity function of the model is neither cosine nor dot.
    """
    if model.similarity_fn_name not in ("cosine", "dot"):
        raise ValueError(
            f"the model declares the similarity function {model.similarity_fn_name!r}; search supports cosine and dot"
        )
    return model.similarity_fn_name == "cosine" and not isinstance(list(model.children())[-1], Normalize)


def encode_once(
    records: ItemFolder,
    identity: Mapping[str, object],
    folder: str | Path,
    embed: ChunkEncoder,
    *,
    overwrite: bool = False,
) -> VectorShards:
    """Encode all distinct items of a folder to shards. An interrupted run resumes; finished vectors are reused.

    Every chunk is one shard of :class:`~unime_st.encoding.VectorShards` with the number of the chunk, so that a cluster
    may return chunks in any order. If several processes use the same folder, one encodes and the others wait.

    Args:
        records: Folder of the items.
        identity: What determines the vectors: fingerprint of the model, prompt, and "dim", their dimension.
        folder: Output folder.
        embed: Encoder of the chunks.
        overwrite: Replace vectors of other records or another model. Defaults to False.

    Returns:
        VectorShards: One float16 row per item in stored order. Rows of unreadable items are NaN; the items are listed in
        ``rejected.jsonl``.

    Raises:
        StageConflictError: If the folder contains vectors of other records or another model and ``overwrite`` is False.
        ValueError: If the model computes vectors that are not finite in float16.
    """
    folder, total = Path(folder), len(records.items)
    with folder_lock(folder):
        if _begin(folder, records, {**identity, "dtype": "float16", "shard_size": _CHUNK}, overwrite):
            chunks = [(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]
            due = [chunk for chunk in chunks if not is_whole_shard(shard_path(folder, chunk[0] // _CHUNK))]
            with tqdm(total=total, desc="encoding", unit="item") as progress:
                progress.update(total - sum(stop - start for start, stop in due))
                for start, found in embed(due):
                    write_shard(folder, start // _CHUNK, found.astype(np.float16, copy=False))
                    progress.update(len(found))
            rejected = _write_rejected(records, folder, len(chunks))
            sizes = [stop - start for start, stop in chunks]
            finish_stage(folder, {"rows": total, "shards": sizes, "dim": identity["dim"], "rejected": rejected})
    return VectorShards(folder)


def _begin(folder: Path, records: ItemFolder, options: dict[str, object], overwrite: bool) -> bool:
    try:
        return begin_stage(folder, "embed", inputs=[records.folder], options=options)
    except StageConflictError:
        if not overwrite:
            raise
        return begin_stage(folder, "embed", inputs=[records.folder], options=options, overwrite=True)


def _write_rejected(records: ItemFolder, folder: Path, shards: int) -> int:
    ids = records.item_ids
    with RejectedWriter(folder, log_count=False) as rejected:
        for number in range(shards):
            for row in np.flatnonzero(np.isnan(np.load(shard_path(folder, number), mmap_mode="r")[:, 0])).tolist():
                rejected.add("its image cannot be read", row=number * _CHUNK + row, id=ids[number * _CHUNK + row])
    return rejected.count
