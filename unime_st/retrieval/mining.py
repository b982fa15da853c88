"""Global retrieval: for every pair, the candidates that resemble its positive most."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.lib.format import open_memmap
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from unime_st.data.checking import RejectedWriter
from unime_st.data.items import Item
from unime_st.data.manifest import begin_stage, finish_stage, read_json, write_json
from unime_st.data.records import ItemFolder, RecordSet
from unime_st.data.tables import ShardWriter, link_items
from unime_st.encoding import encode_items, weights_fingerprint
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
_CHUNK = 2048
_VECTORS, _PROGRESS = "vectors.npy", "vectors.json"


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
    embed: ChunkEmbedder | None = None,
    overwrite: bool = False,
) -> Pools:
    """Find the hard candidates of every pair among the positives of all others (UniME-V2, global retrieval).

    Every distinct item is embedded once; candidates are the exact nearest neighbours. Never a candidate of a query:
    any positive that the records give for it, the query itself, and whatever has the same content. Killed and started
    again, the embedding goes on where it was.

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
        embed: Where the items are embedded, by the same model: see :class:`unime_st.cluster.Cluster`. Defaults to
            None, this process.
        overwrite: Replace an output made with other options. Defaults to False.

    Returns:
        Pools: One row per pair, in the order of the records. Pairs whose own images cannot be read are in
        ``rejected.jsonl`` instead; unreadable candidates are left out. If the output is finished, nothing is done.

    Raises:
        ValueError: If an option is unknown or the model gives vectors that are not finite.
        StageConflictError: If the output was made of something else and ``overwrite`` is False.

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
        return ((chunk[0], embed_chunk(folder, model, chunk, batch_size=batch_size)) for chunk in chunks)

    vectors = embed_once(records, dim, output, embed or here)
    rows = _Rows(records, vectors)
    facts = _search(rows, vectors, num_candidates, pool, max_similarity, device)
    facts |= _write(rows, output, num_candidates)
    (output / _VECTORS).unlink()
    (output / _PROGRESS).unlink()
    finish_stage(output, {"image_root": records.manifest.get("image_root"), "items": len(records.items), **facts})
    return Pools(output)


class ChunkEmbedder(Protocol):
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


def embed_chunk(
    records: ItemFolder, model: SentenceTransformer, chunk: tuple[int, int], *, batch_size: int = 64
) -> np.ndarray:
    """Embed a chunk of the items of a folder.

    Args:
        records: Whose items.
        model: The embedder.
        chunk: Positions (start, stop) of the items, in stored order.
        batch_size: Items per forward pass.

    Returns:
        np.ndarray: float32 of shape (items, dim); NaN for items with unreadable images.

    Raises:
        ValueError: If the model gives vectors that are not finite.
    """
    items = [records.item(item_id) for item_id in records.item_ids[slice(*chunk)]]
    found, readable = encode_items(model, items, batch_size=batch_size, on_error="skip")
    broken = np.flatnonzero(readable & ~np.isfinite(found).all(axis=1))
    if len(broken):
        raise ValueError(f"the model gives a vector that is not finite for {items[broken[0]]!r:.200}")
    return np.asarray(found, dtype=np.float32)


def embed_once(records: ItemFolder, dim: int, folder: Path, embed: ChunkEmbedder) -> np.ndarray:
    """Embed all distinct items into a file, so that memory stays bounded and a kill costs the chunks in flight.

    Args:
        records: Whose items.
        dim: Width of the vectors.
        folder: Where ``vectors.npy`` is kept while the stage runs.
        embed: What makes the vectors.

    Returns:
        np.ndarray: float32 memory map of shape (items, dim), in stored order; NaN for items with unreadable images.

    Raises:
        ValueError: If the model gives vectors that are not finite.
    """
    total, done = len(records.item_ids), _done(folder)
    mode: Literal["r+", "w+"] = "r+" if done else "w+"
    vectors = open_memmap(folder / _VECTORS, mode=mode, dtype=np.float32, shape=None if done else (total, dim))
    chunks = [(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]
    with tqdm(total=total, desc="embedding", unit="item") as progress:
        progress.update(sum(stop - start for start, stop in chunks if (start, stop) in done))
        for start, found in embed([chunk for chunk in chunks if chunk not in done]):
            vectors[start : start + len(found)] = found
            vectors.flush()
            done.add((start, start + len(found)))
            write_json(folder / _PROGRESS, {"done": sorted(done)})
            progress.update(len(found))
    return vectors


def _done(folder: Path) -> set[tuple[int, int]]:
    """The chunks that are done."""
    path = folder / _PROGRESS
    if not (path.is_file() and (folder / _VECTORS).is_file()):
        return set()
    return {(start, stop) for start, stop in read_json(path)["done"]}


class _Rows:
    """The pairs as positions of items, and what is found for them."""

    def __init__(self, records: RecordSet, vectors: np.ndarray) -> None:
        table = records.row_shards.table(["query", "positive", "dataset"])
        self.ids = records.item_ids
        self.query, self.positive = (
            np.array([records.items.position(item_id) for item_id in table[name].to_pylist()], dtype=np.int64)
            for name in ("query", "positive")
        )
        self.dataset = table["dataset"].to_pylist()
        readable = ~np.isnan(vectors[:, 0]) if len(vectors) else np.zeros(0, dtype=bool)
        self.usable = readable[self.query] & readable[self.positive]
        self.modality = _modalities(records)
        self.positive_similarity = np.full(len(self.query), np.nan)
        self.found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64), np.zeros(0, np.float32))] * len(
            self.query
        )
        self.relevant: dict[int, set[int]] = defaultdict(set)
        for query, positive in zip(self.query.tolist(), self.positive.tolist()):
            self.relevant[query].add(positive)

    def by_pool(self, pool: str) -> dict[str, np.ndarray]:
        """Rows of each pool."""
        groups: dict[str, list[int]] = defaultdict(list)
        for row in np.flatnonzero(self.usable).tolist():
            key = {"modality": self.modality[self.positive[row]], "dataset": self.dataset[row], "global": ""}[pool]
            groups[key].append(row)
        return {key: np.array(rows) for key, rows in groups.items()}


def _modalities(records: RecordSet) -> list[str]:
    return [item.modality for item in records.items]


def _search(
    rows: _Rows,
    vectors: np.ndarray,
    k: int,
    pool: str,
    max_similarity: str | float | None,
    device: str | torch.device | None,
) -> dict[str, Any]:
    sizes = {}
    for name, members in rows.by_pool(pool).items():
        corpus = np.unique(rows.positive[members])
        sizes[name] = len(corpus)
        local = {int(position): place for place, position in enumerate(corpus)}
        queries, positives = vectors[rows.query[members]], vectors[rows.positive[members]]
        rows.positive_similarity[members] = paired_similarity(queries, positives)
        margin = 0.0 if max_similarity == "positive" else np.inf if max_similarity is None else float(max_similarity)
        hidden = [
            [local[position] for position in {query, *rows.relevant[query]} if position in local]
            for query in rows.query[members].tolist()
        ]
        scores, places = top_k(
            queries,
            vectors[corpus],
            k,
            max_similarity=rows.positive_similarity[members] + margin,
            exclude=hidden,
            device=device,
            show_progress_bar=True,
        )
        for row, score, place in zip(members, scores, places):
            rows.found[row] = (corpus[place[place >= 0]], score[place >= 0])
    return {"pool_sizes": sizes}


def _write(rows: _Rows, output: Path, k: int) -> dict[str, Any]:
    lengths = np.array([len(rows.found[row][0]) for row in np.flatnonzero(rows.usable)], dtype=np.int64)
    with ShardWriter(output, "rows", POOL_SCHEMA) as shards, RejectedWriter(output) as rejected:
        for row, usable in enumerate(rows.usable):
            query, positive = rows.ids[rows.query[row]], rows.ids[rows.positive[row]]
            if not usable:
                rejected.add("an image of the pair cannot be read", row=row, query=query, positive=positive)
                continue
            places, similarities = rows.found[row]
            shards.add(
                {
                    "query": query,
                    "positive": positive,
                    "dataset": rows.dataset[row],
                    "positive_similarity": rows.positive_similarity[row],
                    "candidates": [rows.ids[place] for place in places],
                    "similarities": similarities.tolist(),
                }
            )
    facts = {
        "rows": shards.rows,
        "rejected": rejected.count,
        "candidates": int(lengths.sum()),
        "short_pools": int((lengths < k).sum()),
        "empty_pools": int((lengths == 0).sum()),
    }
    logger.info("mine: %(candidates)d candidates for %(rows)d pairs; %(short_pools)d pools are short", facts)
    return facts
