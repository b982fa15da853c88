"""Evaluation of the demo's models with mteb."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytrec_eval

from mteb_tasks import scenes
from mteb_tasks.in_process import Scores
from mteb_tasks.in_process import evaluate as run_mteb
from mteb_tasks.loader import UniMELoader, wrap
from mteb_tasks.preference_task import group_means
from mteb_tasks.two_stage import TwoStage
from train_scripts.demo.results import RERANKED, TASKS, Reranking
from train_scripts.demo.seed import Seed
from train_scripts.demo.settings import PAIR_ORDERS, RERANK_TOP_K, DemoArguments
from unime_st.data.scenes import FOIL_CATEGORIES
from unime_st.files import read_json, write_json
from unime_st.model import UniME
from unime_st.reranking.unime_reranker import UniMEReranker
from unime_st.scoring.groups import PairOrder

COMPOSITIONAL = "ScenesCompositional"


def evaluate(arguments: DemoArguments, seed: int, model: str, results: Path) -> None:
    """Evaluate one model of a seed.

    Args:
        arguments: The demo's options.
        seed: The seed.
        model: Key of :data:`~train_scripts.demo.results.MODELS` or of :data:`~train_scripts.demo.results.RERANKED`.
        results: JSON file to write: "rows" of ``results.json``, and "ndcg", by task and query.
    """
    run = Seed(arguments, seed)
    scores: Scores = {}
    reranking = RERANKED.get(model)
    retriever = reranking.embedder if reranking else model
    embedder = wrap(UniME("unime-tiny" if retriever == "base" else run.path(retriever)))
    tasks = _tasks(arguments.eval_size, arguments.eval_seed)
    for order in set(PAIR_ORDERS.values()):
        chosen = [task for name, task in tasks.items() if PAIR_ORDERS.get(name, "query_first") == order]
        found = _reranked(run, embedder, reranking, order) if reranking else embedder
        scores |= run_mteb(found, chosen, results.parent)
    rows = [
        {"task": name, "metric": metric, "value": next(iter(scores[TASKS[name]].values()))[metric]}
        for name in TASKS
        for metric in ("ndcg_at_10", "hit_rate_at_1")
    ]
    accuracy = {category: numbers["text_acc"] for category, numbers in scores[COMPOSITIONAL].items()}
    rows.append({"task": "compositional", "metric": "accuracy", "value": group_means(accuracy)["mean"]})
    ndcg = {name: _ndcg(results.parent, tasks[name]) for name in PAIR_ORDERS}
    write_json(results, {"rows": [{"model": model, "seed": seed, **row} for row in rows], "ndcg": ndcg})


@lru_cache(maxsize=1)  # drawn once in a process
def _tasks(size: int, seed: int) -> dict[str, Any]:
    other = 5 * size // 8
    sizes = {name: size if name in PAIR_ORDERS else other for name in TASKS}
    retrieval = {name: getattr(scenes, task)(size=sizes[name], data_seed=seed) for name, task in TASKS.items()}
    foils = scenes.ScenesCompositional(size=-(-other // len(FOIL_CATEGORIES)), data_seed=seed)
    return {**retrieval, "compositional": foils}


def _reranked(run: Seed, embedder: UniMELoader, reranking: Reranking, order: PairOrder) -> TwoStage:
    return TwoStage(
        embedder,
        UniMEReranker(run.path("reranker") if reranking.trained else "unime-tiny", template="tiny"),
        top_k=RERANK_TOP_K,
        method=reranking.method,
        window=1 + run.arguments.num_negatives,  # the longest list that it was trained on
        batch_size=128,
        pair_order="query_first" if reranking.trained else order,  # as it was trained
        alpha=1 / run.arguments.temperature if reranking.fused else None,
    )


def _ndcg(folder: Path, task: Any) -> dict[str, float]:
    """nDCG@10 of every query from the predictions that mteb kept; their mean is mteb's own number."""
    ranked = read_json(folder / f"{task.metadata.name}_predictions.json")["default"]["test"]
    return ndcg_at_10(ranked, task.dataset["default"]["test"]["relevant_docs"])


def ndcg_at_10(
    ranked: Mapping[str, Mapping[str, float]], relevant: Mapping[str, Mapping[str, int]]
) -> dict[str, float]:
    """nDCG@10 of each query by the library that mteb uses.

    Args:
        ranked: Scores of documents, by query.
        relevant: Grades of relevant documents, by query.

    Returns:
        nDCG@10 by query.

    Example:
        >>> from train_scripts.demo.evaluation import ndcg_at_10
        >>> ndcg_at_10({"q": {"a": 0.9, "b": 0.5}}, {"q": {"a": 1}})
        {'q': 1.0}
    """
    found = pytrec_eval.RelevanceEvaluator(relevant, {"ndcg_cut.10"}).evaluate(ranked)
    return {query: scores["ndcg_cut_10"] for query, scores in found.items()}
