"""Clusters of mutual hard negatives: groups of rows whose positives are each other's mined candidates."""

from __future__ import annotations

import heapq
import logging
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from unime_st.data.records import ItemFolder
from unime_st.retrieval.mining import Pools

logger = logging.getLogger(__name__)
_POOLS_AT_ONCE = 1 << 16


def hard_clusters(
    queries: Sequence[str],
    positives: Sequence[str],
    edges: Sequence[np.ndarray],
    size: int,
    *,
    seed: int = 0,
) -> list[np.ndarray]:
    """Group rows so that the positives of a group are hard negatives for each other's queries.

    Rows are nodes of a graph with an edge from each row to the rows of its candidates. A cluster grows from a random row
    by the row with the most edges to it, until it is full. Every row is in one cluster. The time is linear in the number
    of edges, up to the logarithm of a cluster's neighbors.

    Args:
        queries: Id of each row's query.
        positives: Id of each row's positive.
        edges: Per row the numbers of the rows of its candidates.
        size: Rows of a cluster.
        seed: Seed of the order in which clusters begin. Defaults to 0.

    Returns:
        list[np.ndarray]: Row numbers of each cluster. No query and no positive occurs twice in a cluster, except in the
        last ones, which hold what has no free neighbor left. The very last one may be smaller.

    References:
        - B3 (https://arxiv.org/abs/2505.11293): batches of communities in the graph of mined ranks; there METIS finds
          them.
        - SaHa (https://arxiv.org/abs/2508.00955): clusters of hard negatives.

    Example:
        >>> from unime_st.training.hard_clusters import hard_clusters
        >>> edges = [[2], [3], [0], [1]]
        >>> sorted(sorted(cluster.tolist()) for cluster in hard_clusters("abcd", "wxyz", edges, 2))
        [[0, 2], [1, 3]]
    """
    rows = len(queries)
    begin = np.random.default_rng(seed).permutation(rows)
    graph = _Graph(edges, begin)
    keys = list(zip(_codes(queries), _codes(positives), strict=True))
    free = bytearray(b"\1") * rows
    full, left = [], []
    for first in begin.tolist():
        if free[first]:
            members = graph.grow(first, size, free, keys)
            if len(members) == size:
                full.append(members)
            else:
                left += members
    clusters = full + [left[start : start + size] for start in range(0, len(left), size)]
    return [np.array(members, dtype=np.int64) for members in clusters]


class _Graph:
    """Rows and their candidates, without direction; an edge that both rows have counts twice."""

    def __init__(self, edges: Sequence[Sequence[int] | np.ndarray], order: np.ndarray) -> None:
        counts = [len(own) for own in edges]
        source = np.repeat(np.arange(len(edges), dtype=np.int64), counts)
        target = np.concatenate([np.zeros(0, np.int64), *(np.asarray(own, dtype=np.int64) for own in edges)])
        both = np.concatenate([source, target])
        self._neighbors = np.concatenate([target, source])[np.argsort(both, kind="stable")]
        self._ends = np.cumsum(np.bincount(both, minlength=len(edges)))
        self._rank = np.argsort(order).tolist()  # among equal neighbors the first of the order is taken

    def neighbors(self, row: int) -> list[int]:
        return self._neighbors[self._ends[row - 1] if row else 0 : self._ends[row]].tolist()

    def grow(self, first: int, size: int, free: bytearray, keys: Sequence[tuple[int, int]]) -> list[int]:
        """Rows of the cluster that begins with a row; they are free no longer."""
        members: list[int] = []
        weight: defaultdict[int, int] = defaultdict(int)
        frontier = [(0, 0, first)]
        queries, positives, blocked = set[int](), set[int](), list[int]()
        while frontier and len(members) < size:
            negative, _, row = heapq.heappop(frontier)
            if not free[row] or -negative != weight[row]:  # taken, or pushed again with a larger weight
                continue
            free[row] = 0
            query, positive = keys[row]
            if query in queries or positive in positives:
                blocked.append(row)
                continue
            members.append(row)
            queries.add(query)
            positives.add(positive)
            for other in self.neighbors(row):
                if free[other]:
                    weight[other] += 1
                    heapq.heappush(frontier, (-weight[other], self._rank[other], other))
        for row in blocked:
            free[row] = 1
        return members


def _codes(names: Sequence[str]) -> list[int]:
    """Number of each name, equal names alike."""
    codes: list[int] = np.unique(np.array(list(names)), return_inverse=True)[1].tolist()
    return codes


def mined_edges(
    pools: Pools, records: ItemFolder, queries: Sequence[str], positives: Sequence[str], *, skip: int, count: int
) -> list[np.ndarray]:
    """Rows of the mined candidates of each row, for :func:`hard_clusters`.

    Args:
        pools: Pools mined among the positives of the records.
        records: The records, for the check that pools belong to them.
        queries: Id of each row's query.
        positives: Id of each row's positive.
        skip: Nearest candidates that are left out, as likely false negatives.
        count: Candidates behind those that become edges.

    Returns:
        list[np.ndarray]: Row numbers, one array per row; a candidate that is the positive of several rows stands for one
        of them, in turn. Rows without a pool have none.

    Raises:
        ValueError: If an id of the pools is not in the records, or no row has a pool.
    """
    known = set(records.item_ids)
    row_of = {pair: row for row, pair in enumerate(zip(queries, positives, strict=True))}
    rows_with: defaultdict[str, list[int]] = defaultdict(list)
    for row, positive in enumerate(positives):
        rows_with[positive].append(row)
    turn: defaultdict[str, int] = defaultdict(int)
    edges = [np.zeros(0, dtype=np.int64) for _ in queries]
    found = 0
    table = pools.row_shards.table(["query", "positive", "candidates"])
    for batch in table.to_batches(max_chunksize=_POOLS_AT_ONCE):
        for pool in batch.to_pylist():
            if missing := [name for name in (pool["query"], pool["positive"]) if name not in known]:
                raise ValueError(
                    f"{pools.folder}: item {missing[0]} of its pools is not in the records {records.folder}: mine these "
                    "records (unime mine)"
                )
            index = row_of.get((pool["query"], pool["positive"]))
            if index is None:
                continue
            found += 1
            own = []
            for candidate in pool["candidates"][skip : skip + count]:
                if others := rows_with.get(candidate):
                    own.append(others[turn[candidate] % len(others)])
                    turn[candidate] += 1
            edges[index] = np.array([other for other in own if other != index], dtype=np.int64)
    if not found:
        raise ValueError(f"{pools.folder}: no pool belongs to a row of {records.folder}: mine these records")
    logger.info("clusters: %d of %d rows have a pool, %d edges", found, len(edges), sum(map(len, edges)))
    return edges
