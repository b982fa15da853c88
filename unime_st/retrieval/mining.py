"""Global retrieval: for every pair, the candidates that resemble its positive most."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from sentence_transformers import SentenceTransformer

from unime_st.data.items import Item
from unime_st.data.manifest import begin_stage, finish_stage
from unime_st.data.parquet_shards import ShardWriter, link_items
from unime_st.data.records import ItemFolder, RecordSet
from unime_st.data.validation import RejectedWriter
from unime_st.encoding import VectorShards, weights_fingerprint
from unime_st.retrieval.item_vectors import ChunkEncoder, encode_chunk, encode_once
from unime_st.retrieval.top_k import paired_similarity, top_k

logger = logging.getLogger(__name__)

POOL_SCHEMA = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("positive", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("positive_similarity", pa.float32(), nullable=False),
        pa.field("candidates", pa.list_(pa.string()), nullable=False),
        pa.field("similarities", pa.list_(pa.float32()), nullable=False),
    ]
)
"""One row per pair: its candidates by falling similarity to the query."""

POOLS = ("modality", "dataset", "global")
_QUERIES = 1 << 16  # searched together
_GATHERED = 4096  # read from disk together


@dataclass(frozen=True)
class Pool:
    """A pair and its candidates.

    Args:
        query: What is asked for.
        positive: What answers it.
        dataset: Where the pair comes from.
        candidates: Items that resemble the answer, most similar to the query first.
        positive_similarity: Similarity of query and positive.
        similarities: Similarity of the query and each candidate.
    """

    query: Item
    positive: Item
    dataset: str
    candidates: list[Item]
    positive_similarity: float
    similarities: list[float]


class Pools(ItemFolder):
    """The result of :func:`mine`, as a sequence of :class:`Pool`.

    Args:
        folder: Folder written by :func:`mine`.

    Raises:
        FileNotFoundError: If mining has not finished there.
    """

    def __getitem__(self, index: int) -> Pool:
        return self._build(self.row_shards.row(index + len(self) if index < 0 else index))

    def __iter__(self) -> Iterator[Pool]:
        return (self._build(row) for row in self.row_shards.rows())

    def _build(self, row: dict[str, Any]) -> Pool:
        query, positive, *candidates = map(self.item, (row["query"], row["positive"], *row["candidates"]))
        return Pool(query, positive, row["dataset"], candidates, row["positive_similarity"], row["similarities"])


def mine(
    records: RecordSet | str | Path,
    model: SentenceTransformer,
    output: str | Path,
    *,
    num_candidates: int = 50,
    pool: Literal["modality", "dataset", "global"] = "modality",
    max_similarity: Literal["positive"] | float | None = "positive",
    batch_size: int = 64,
    device: str | torch.device | None = None,
    embed: ChunkEncoder | None = None,
    vectors: str | Path | None = None,
    overwrite: bool = False,
) -> Pools:
    """Find the hard candidates of every pair among the positives of all others (UniME-V2, global retrieval).

    Every distinct item is embedded once, to float16 shards that stay on disk; candidates are the exact nearest
    neighbours among these vectors, and the ceilings are similarities of the same vectors. Never a candidate of a query:
    any positive that the records give for it, the query itself, and whatever has the same content. Killed and started
    again, the embedding goes on where it was.

    Memory holds, beside the blocks of :func:`~unime_st.retrieval.top_k` and others of at most 8192 vectors, the vectors
    of one pool's distinct positives in float16 (2 x dim bytes each), those of 65,536 queries, for each pair
    8 x ``num_candidates`` bytes of results, and a few hundred bytes for each pair and item.

    Args:
        records: Pair records, or their folder.
        model: The embedder.
        output: Folder to write.
        num_candidates: Candidates per pair. Defaults to the paper's 50.
        pool: Where candidates come from: positives of the same modality as the pair's own ("modality", the default),
            of the same data set ("dataset"), or all ("global").
        max_similarity: "positive" (default) keeps candidates that are strictly less similar to the query than its own
            positive, which is how we read the paper's delta; a number m raises this ceiling to that similarity + m;
            None sets no ceiling. A weak embedder under a strict ceiling leaves few candidates.
        batch_size: Items per forward pass. Defaults to 64.
        device: Where similarities are computed. Defaults to None, the CPU.
        embed: Where the items are embedded, by the same model: see :class:`unime_st.stages.ray_engine.Cluster`. Defaults to
            None, this process.
        vectors: Folder of the vectors, 2 x dim bytes per item. Runs on the same records and model that name the same
            folder embed once. Defaults to None, ``vectors`` in the output.
        overwrite: Replace an output made with other options, and vectors of other records or another model. Defaults
            to False.

    Returns:
        Pools: One row per pair, in the order of the records. Pairs whose own images cannot be read are in
        ``rejected.jsonl`` instead; unreadable candidates are left out. If the output is finished, nothing is done.

    Raises:
        ValueError: If an option makes no sense or the model gives vectors that are not finite in float16.
        StageConflictError: If the output or the vectors were made of something else and ``overwrite`` is False.

    References:
        UniME-V2 (https://arxiv.org/abs/2510.13515), "Potential hard negative mining": top 50 with similarity < delta.

    Example:
        ::

            from sentence_transformers import SentenceTransformer
            from unime_st.retrieval import mine

            pools = mine("runs/own/records", SentenceTransformer("unime-tiny"), "runs/own/pools")
            print(pools[0].query, pools[0].candidates[:3])
    """
    records = records if isinstance(records, RecordSet) else RecordSet.load(records)
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
    if max_similarity not in ("positive", None) and not isinstance(max_similarity, (int, float)):
        raise ValueError(f"max_similarity must be 'positive', a number or None, got {max_similarity!r}")
    options = {
        "model": weights_fingerprint(model),
        "num_candidates": num_candidates,
        "pool": pool,
        "max_similarity": max_similarity,
    }
    output = Path(output)
    if not begin_stage(output, "mine", inputs=[records.folder], options=options, overwrite=overwrite):
        return Pools(output)
    link_items(records.folder, output)
    folder, dim = records, int(model.get_embedding_dimension() or 0)

    def here(chunks: Sequence[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
        return ((chunk[0], encode_chunk(folder, model, chunk, batch_size=batch_size)) for chunk in chunks)

    found = encode_once(
        records, str(options["model"]), dim, vectors or output / "vectors", embed or here, overwrite=overwrite
    )
    pairs = _Pairs(records, found, num_candidates)
    margin = 0.0 if max_similarity == "positive" else np.inf if max_similarity is None else float(max_similarity)
    sizes = {name: _search(pairs, members, found, margin, device) for name, members in pairs.by_pool(pool)}
    facts = {"pool_sizes": sizes, **_write(pairs, output)}
    finish_stage(output, {"image_root": records.manifest.get("image_root"), "items": len(records.items), **facts})
    return Pools(output)


class _Pairs:
    """The pairs as positions of items, and what is found for them."""

    def __init__(self, records: RecordSet, vectors: VectorShards, k: int) -> None:
        self.ids = records.item_ids
        self.query, self.positive = (
            records.items.positions(records.row_shards.column(name).to_pylist()) for name in ("query", "positive")
        )
        self.dataset, self.datasets = _coded(records.row_shards.column("dataset"))
        self.modality, self.modalities = _coded(pa.array((item.modality for item in records.items), pa.string()))
        readable = [~np.isnan(shard[:, 0]) for shard in vectors.shards()]
        readable_items = np.concatenate([np.zeros(0, dtype=bool), *readable])
        self.usable = readable_items[self.query] & readable_items[self.positive]
        self.positive_similarity = np.full(len(self.query), np.nan)
        self.candidates = np.full((len(self.query), k), -1, dtype=np.int32)
        self.similarities = np.full((len(self.query), k), -np.inf, dtype=np.float32)
        self._by_query = np.argsort(self.query, kind="stable")
        self._askers = self.query[self._by_query]

    def by_pool(self, pool: str) -> Iterator[tuple[str, np.ndarray]]:
        """Name and rows of each pool."""
        codes, names = {
            "modality": (self.modality[self.positive], self.modalities),
            "dataset": (self.dataset, self.datasets),
            "global": (np.zeros(len(self.query), dtype=np.int64), [""]),
        }[pool]
        for code in np.unique(codes[self.usable]).tolist():
            yield names[code], np.flatnonzero(self.usable & (codes == code))

    def hidden(self, rows: np.ndarray, corpus: np.ndarray) -> list[list[int]]:
        """Places in a sorted corpus that are no candidates of the rows: the query and its positives."""
        queries, which = np.unique(self.query[rows], return_inverse=True)
        first, last = (np.searchsorted(self._askers, queries, side) for side in ("left", "right"))
        positions = []
        for query, start, stop in zip(queries, first, last):
            wanted = np.unique(np.append(self.positive[self._by_query[start:stop]], query))
            position = np.minimum(np.searchsorted(corpus, wanted), len(corpus) - 1)
            positions.append(position[corpus[position] == wanted].tolist())
        return [positions[index] for index in which]


def _coded(values: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Small integers instead of strings, and the strings."""
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    coded = values.dictionary_encode()
    return coded.indices.to_numpy(zero_copy_only=False), coded.dictionary.to_pylist()


def _search(
    pairs: _Pairs, members: np.ndarray, vectors: VectorShards, margin: float, device: str | torch.device | None
) -> int:
    """Find the candidates of the rows of a pool; gives its size."""
    corpus = np.unique(pairs.positive[members])
    corpus_vectors = _gather(vectors, corpus)
    for start in range(0, len(members), _QUERIES):
        rows = members[start : start + _QUERIES]
        queries, positives = _gather(vectors, pairs.query[rows]), np.searchsorted(corpus, pairs.positive[rows])
        for part in np.array_split(np.arange(len(rows)), -(-len(rows) // _GATHERED)):
            similarity = paired_similarity(queries[part], corpus_vectors[positives[part]])
            pairs.positive_similarity[rows[part]] = similarity
        scores, positions = top_k(
            queries,
            corpus_vectors,
            pairs.candidates.shape[1],
            max_similarity=pairs.positive_similarity[rows] + margin,
            exclude=pairs.hidden(rows, corpus),
            device=device,
            show_progress_bar=True,
        )
        pairs.candidates[rows] = np.where(positions < 0, -1, corpus[positions])
        pairs.similarities[rows] = scores
    return len(corpus)


def _gather(vectors: VectorShards, rows: np.ndarray) -> np.ndarray:
    """Rows as they are stored, in half the memory of what reading them gives."""
    found = np.empty((len(rows), vectors.dim), dtype=np.float16)
    for start in range(0, len(rows), _GATHERED):
        part = slice(start, start + _GATHERED)
        found[part] = vectors[rows[part]]
    return found


def _write(pairs: _Pairs, output: Path) -> dict[str, Any]:
    with ShardWriter(output, "rows", POOL_SCHEMA) as shards, RejectedWriter(output) as rejected:
        for row, usable in enumerate(pairs.usable):
            query, positive = pairs.ids[pairs.query[row]], pairs.ids[pairs.positive[row]]
            if not usable:
                rejected.add("an image of the pair cannot be read", row=row, query=query, positive=positive)
                continue
            found = pairs.candidates[row] >= 0
            shards.add(
                {
                    "query": query,
                    "positive": positive,
                    "dataset": pairs.datasets[pairs.dataset[row]],
                    "positive_similarity": pairs.positive_similarity[row],
                    "candidates": [pairs.ids[position] for position in pairs.candidates[row, found]],
                    "similarities": pairs.similarities[row, found].tolist(),
                }
            )
    lengths = (pairs.candidates[pairs.usable] >= 0).sum(axis=1)
    facts = {
        "rows": shards.rows,
        "rejected": rejected.count,
        "candidates": int(lengths.sum()),
        "short_pools": int((lengths < pairs.candidates.shape[1]).sum()),
        "empty_pools": int((lengths == 0).sum()),
    }
    logger.info("mine: %(candidates)d candidates for %(rows)d pairs; %(short_pools)d pools are short", facts)
    return facts
