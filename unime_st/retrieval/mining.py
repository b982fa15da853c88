"""Hard-negative mining (UniME-V2, "global retrieval"): the candidates of every pair among all other positives."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from sentence_transformers import SentenceTransformer

from unime_st.data.items import Item
from unime_st.data.manifest import begin_stage, finish_stage, link_items
from unime_st.data.parquet_shards import Row, ShardWriter
from unime_st.data.records import RecordSet, RowFolder
from unime_st.data.validation import RejectedWriter
from unime_st.encoding import VectorShards, model_fingerprint
from unime_st.encoding.encode import resolve_prompt
from unime_st.files import locks_folder
from unime_st.options import check_count
from unime_st.retrieval.item_vectors import ChunkEncoder, chunk_encoder, encode_once, needs_normalization
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
"""One row per pair, with its candidates in order of decreasing similarity to the query."""

POOLS = ("modality", "dataset", "global")
_QUERIES = 1 << 16  # queries per search
_GATHERED = 4096  # vectors per read from disk


@dataclass(frozen=True)
class Pool:
    """A pair with its candidate pool.

    Args:
        query: The query.
        positive: Its positive.
        dataset: Dataset of the pair.
        candidates: Hard-negative candidates in order of decreasing similarity to the query.
        positive_similarity: Similarity of query and positive.
        similarities: Similarity of the query and each candidate.
    """

    query: Item
    positive: Item
    dataset: str
    candidates: list[Item]
    positive_similarity: float
    similarities: list[float]


class Pools(RowFolder[Pool]):
    """Mined candidate pools, as a sequence of :class:`Pool`.

    Args:
        folder: Folder written by :func:`mine`.

    Raises:
        FileNotFoundError: If mining has not finished there.
    """

    content = "candidate pools"
    row_columns = tuple(POOL_SCHEMA.names)

    def _build(self, row: Row) -> Pool:
        query, positive, *candidates = map(self.item, (row["query"], row["positive"], *row["candidates"]))
        return Pool(query, positive, row["dataset"], candidates, row["positive_similarity"], row["similarities"])


@locks_folder("output")
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
    """Mine hard-negative candidates for every pair among the positives of all other pairs (UniME-V2).

    Every distinct item is encoded once, to float16 shards on disk. Candidates are the exact nearest neighbors among
    these vectors by the similarity function of the model (cosine or dot), with its default prompt. Excluded from the
    candidates of a query are all its positives in the records, the query itself, and items with equal content. An
    interrupted run resumes.

    Memory holds blocks of :func:`~unime_st.retrieval.top_k`, the float16 vectors of one pool's distinct positives
    (2 x dim bytes each) and of 65,536 queries, 8 x ``num_candidates`` bytes of results per pair, and a few hundred bytes
    per pair and item.

    Args:
        records: Pair records, or their folder.
        model: The embedding model.
        output: Output folder.
        num_candidates: Number of candidates per pair. Defaults to 50, as in the paper.
        pool: Source of candidates: positives of the same modality as the pair's own ("modality"), of the same dataset
            ("dataset"), or all ("global"). Defaults to "modality".
        max_similarity: Upper limit of the similarity of a candidate to the query. "positive" keeps candidates strictly
            less similar than the pair's own positive, our reading of the paper's delta. A number m sets the limit to the
            similarity of the positive plus m. None sets no limit. Defaults to "positive", which leaves few candidates
            with a weak embedding model.
        batch_size: Batch size, as for :func:`~unime_st.encoding.encode_items`. Defaults to 64.
        device: Device of the similarity computation. Defaults to None, the CPU.
        embed: Encoder of the items that uses the same model, see :class:`unime_st.stages.ray_engine.Cluster`. Defaults to
            None, this process.
        vectors: Folder of the vectors (2 x dim bytes per item). Runs on the same records and model that share this
            folder encode only once, :meth:`Index.build <unime_st.retrieval.Index.build>` included. Defaults to None,
            ``vectors`` in the output folder.
        overwrite: Replace an output made with other options, and vectors of other records or another model. Defaults
            to False.

    Returns:
        Pools: One row per pair in the order of the records. Pairs with unreadable images go to ``rejected.jsonl``;
        unreadable candidates are left out. A finished output with the same options is returned as it is.

    Raises:
        ValueError: If an option is invalid, the model takes no images and an item has one, it computes vectors that are
            not finite in float16, or its similarity function is neither cosine nor dot.
        StageConflictError: If the output or the vectors were made with other inputs or options and ``overwrite`` is
            False.

    References:
        UniME-V2 (https://arxiv.org/abs/2510.13515), "Potential hard negative mining": top 50 with similarity < delta.

    Example:
        >>> import tempfile
        >>> from sentence_transformers import SentenceTransformer
        >>> from unime_st import Item
        >>> from unime_st.data import PairRecord, RecordSet
        >>> from unime_st.retrieval import mine
        >>> shapes = [PairRecord(Item(f"a {name}"), Item(name)) for name in ("circle", "star", "ring")]
        >>> records = RecordSet.write(tempfile.mkdtemp(), shapes, {"source": "example"})
        >>> model = SentenceTransformer("unime-tiny", device="cpu")
        >>> pools = mine(records, model, tempfile.mkdtemp(), num_candidates=1, max_similarity=None)
        >>> pools[0].query.text, len(pools[0].candidates)
        ('a circle', 1)
    """
    records = records if isinstance(records, RecordSet) else RecordSet.load(records)
    needs_normalization(model)
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
    check_count("num_candidates", num_candidates)
    if max_similarity not in ("positive", None) and (
        isinstance(max_similarity, (bool, str)) or not np.isfinite(max_similarity)
    ):
        raise ValueError(f"max_similarity must be 'positive', a number or None, got {max_similarity!r}")
    if "image" not in model.modalities and any("image" in item.modality for item in records.items):
        raise ValueError(
            f"the model takes {' and '.join(map(str, model.modalities))} only, but items of {records.folder} have images: choose a "
            "model that takes them"
        )
    options = {
        "model": model_fingerprint(model),
        "prompt": resolve_prompt(model, None),
        "num_candidates": num_candidates,
        "pool": pool,
        "max_similarity": max_similarity,
    }
    output = Path(output)
    if not begin_stage(output, "mine", inputs=[records.folder], options=options, overwrite=overwrite):
        return Pools(output)
    link_items(records.folder, output)
    dim = int(model.get_embedding_dimension() or 0)
    identity = {"model": options["model"], "prompt": options["prompt"], "dim": dim}
    embed = embed or chunk_encoder(records, model, batch_size=batch_size)
    found = encode_once(records, identity, vectors or output / "vectors", embed, overwrite=overwrite)
    pairs = _MinedPairs(records, found, num_candidates)
    margin = 0.0 if max_similarity == "positive" else np.inf if max_similarity is None else float(max_similarity)
    sizes = {name: _search(pairs, members, found, margin, device) for name, members in pairs.by_pool(pool)}
    facts = {"pool_sizes": sizes, **_write(pairs, output)}
    finish_stage(output, {"image_root": records.manifest.get("image_root"), "items": len(records.items), **facts})
    return Pools(output)


class _MinedPairs:
    """The pairs as positions of items, and the candidates that are found for them."""

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
        self._sorted_queries = self.query[self._by_query]

    def by_pool(self, pool: str) -> Iterator[tuple[str, np.ndarray]]:
        """Name and rows of each candidate pool."""
        codes, names = {
            "modality": (self.modality[self.positive], self.modalities),
            "dataset": (self.dataset, self.datasets),
            "global": (np.zeros(len(self.query), dtype=np.int64), [""]),
        }[pool]
        for code in np.unique(codes[self.usable]).tolist():
            yield names[code], np.flatnonzero(self.usable & (codes == code))

    def excluded(self, rows: np.ndarray, corpus: np.ndarray) -> list[list[int]]:
        """Positions in a sorted corpus that are excluded for each row: the query and its positives."""
        queries, which = np.unique(self.query[rows], return_inverse=True)
        first, last = (np.searchsorted(self._sorted_queries, queries, side) for side in ("left", "right"))
        positions = []
        for query, start, stop in zip(queries, first, last):
            wanted = np.unique(np.append(self.positive[self._by_query[start:stop]], query))
            position = np.minimum(np.searchsorted(corpus, wanted), len(corpus) - 1)
            positions.append(position[corpus[position] == wanted].tolist())
        return [positions[index] for index in which]


def _coded(values: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Dictionary encoding: integer codes and the distinct strings."""
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    coded = values.dictionary_encode()
    return coded.indices.to_numpy(zero_copy_only=False), coded.dictionary.to_pylist()


def _search(
    pairs: _MinedPairs, members: np.ndarray, vectors: VectorShards, margin: float, device: str | torch.device | None
) -> int:
    """Find the candidates of all rows of a pool. Returns the pool size."""
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
            exclude=pairs.excluded(rows, corpus),
            device=device,
            show_progress_bar=True,
        )
        pairs.candidates[rows] = np.where(positions < 0, -1, corpus[positions])
        pairs.similarities[rows] = scores
    return len(corpus)


def _gather(vectors: VectorShards, rows: np.ndarray) -> np.ndarray:
    """Vectors as stored, in float16 rather than the float32 of ``VectorShards``."""
    found = np.empty((len(rows), vectors.dim), dtype=np.float16)
    for start in range(0, len(rows), _GATHERED):
        part = slice(start, start + _GATHERED)
        found[part] = vectors[rows[part]]
    return found


def _write(pairs: _MinedPairs, output: Path) -> dict[str, int]:
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
