"""Fusion: weight of an embedder's similarity beside a reranker's log-odds, fitted on labeled pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from sentence_transformers import CrossEncoder, SentenceTransformer

from unime_st.data.records import RecordSet
from unime_st.options import check_count
from unime_st.reranking.search import retrieve, second_stage
from unime_st.scoring.groups import Judge, PairOrder

_RIDGE = 1e-3  # keeps weights finite where the scores separate all positives
_LEAST_WEIGHT = 1e-3  # of standardized log-odds, below which they say nothing about the positives


def fit_alpha(similarities: Sequence[np.ndarray], log_odds: Sequence[np.ndarray], positives: Sequence[int]) -> float:
    """Fit the weight alpha of ``alpha * similarity + log_odds``.

    A conditional logit: the weights of both scores maximize the likelihood of each query's positive under a softmax over
    its candidates, and alpha is their ratio.

    Args:
        similarities: Per query the cosine of each candidate, positive included.
        log_odds: Per query the reranker's log-odds of each candidate; NaN where there is none.
        positives: Per query the index of the positive.

    Returns:
        float: alpha, at least 0. A fixed start without labels is 1 / the temperature that the embedder was trained with.

    Raises:
        ValueError: If no query has a scored positive beside another scored candidate, or the log-odds do not favor the
            positives, so that the embedder alone is better.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> similarities, log_odds = rng.normal(size=(2, 4000, 5)) * [[[0.1]], [[2.0]]]
        >>> chances = np.exp(10 * similarities + log_odds)
        >>> positives = [rng.choice(5, p=row / row.sum()) for row in chances]
        >>> 8 < fit_alpha(similarities, log_odds, positives) < 12
        True
    """
    centered = []
    for cosines, odds, positive in zip(similarities, log_odds, positives, strict=True):
        scored = np.isfinite(odds)
        if scored.sum() > 1 and scored[positive]:
            both = np.stack([cosines, odds]).astype(np.float64)
            centered.append((both - both[:, [positive]])[:, scored])
    if not centered:
        raise ValueError("no query has a scored positive beside another scored candidate: raise top_k, or add pairs")
    scale = np.concatenate(centered, axis=1).std(axis=1)
    scale[scale == 0] = 1.0

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _RIDGE / 2 * float(weights @ weights), _RIDGE * weights
        for rows in centered:
            logits = (weights / scale) @ rows
            top = logits.max()
            chances = np.exp(logits - top)
            value += (top + np.log(chances.sum())) / len(centered)
            gradient = gradient + rows @ (chances / chances.sum()) / scale / len(centered)
        return value, gradient

    weights = minimize(loss, np.ones(2), jac=True, bounds=[(0, None)] * 2).x
    if weights[1] < _LEAST_WEIGHT:
        raise ValueError("the reranker's log-odds do not favor the positives: search without it, or see pair_order")
    return float(weights[0] / scale[0] / (weights[1] / scale[1]))


def fit_fusion(
    records: RecordSet,
    embedder: SentenceTransformer,
    reranker: CrossEncoder | Judge,
    *,
    top_k: int = 10,
    queries: int = 200,
    pair_order: PairOrder = "query_first",
    batch_size: int = 32,
    seed: int = 0,
) -> float:
    """Fit the weight alpha of :func:`~unime_st.reranking.search` on labeled pairs.

    The positives of all records are the corpus. Queries whose positive is not among the ``top_k`` nearest teach nothing
    about their order and are left out.

    Args:
        records: Labeled pairs, which no model was trained on.
        embedder: First stage.
        reranker: Second stage, pairwise.
        top_k: Candidates of a query. Defaults to 10.
        queries: Maximum number of queries, drawn at random. Defaults to 200.
        pair_order: As for :func:`~unime_st.reranking.search`.
        batch_size: Items and pairs per forward pass. Defaults to 32.
        seed: Seed of the draw. Defaults to 0.

    Returns:
        float: alpha.

    Raises:
        ValueError: See :func:`fit_alpha`.

    Example:
        ::

            from unime_st.reranking.fusion import fit_fusion

            alpha = fit_fusion(RecordSet.load("runs/held_out"), embedder, reranker)
            found = search(queries, corpus, embedder, reranker, alpha=alpha)
    """
    check_count("queries", queries)
    table = records.row_shards.table(["query", "positive"])
    right: dict[str, set[str]] = {}
    for query, positive in zip(table["query"].to_pylist(), table["positive"].to_pylist(), strict=True):
        right.setdefault(query, set()).add(positive)
    corpus = list(dict.fromkeys(table["positive"].to_pylist()))
    names = sorted(right)
    drawn = [names[index] for index in np.random.default_rng(seed).permutation(len(names))[:queries]]
    found = retrieve(list(map(records.item, drawn)), list(map(records.item, corpus)), embedder, top_k, batch_size)
    groups = [(own.query, own.documents) for own in found]
    labels = [[f"corpus[{name}]" for name in own.names] for own in found]
    scored = second_stage(reranker, "pairwise", batch_size=batch_size, pair_order=pair_order)(groups, labels)
    cosines, odds, positives = [], [], []
    for query, own, scores in zip(drawn, found, scored, strict=True):
        is_right = np.array([corpus[int(name)] in right[query] for name in own.names])
        if is_right.any():
            first = int(is_right.argmax())
            kept = ~is_right
            kept[first] = True  # of several positives the nearest
            cosines.append(np.array(own.similarities)[kept])
            odds.append(np.asarray(scores.scores)[kept])
            positives.append(int(kept[:first].sum()))
    return fit_alpha(cosines, odds, positives)
