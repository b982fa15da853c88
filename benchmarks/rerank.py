"""Reranking: ten candidates in one list against generating the answer, fifty pairs against `CrossEncoder.rank`.

python benchmarks/rerank.py [--model FOLDER --template tiny --queries 4 --repeats 5]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from harness import compare, table
from sentence_transformers import CrossEncoder
from torch.nn import Identity

from unime_st import Item, UniMEReranker
from unime_st.data.records import PairRecord
from unime_st.data.scenes import training_records
from unime_st.reranking.cost import measured
from unime_st.reranking.official import choose


def _scores(ranking: list[dict[str, Any]]) -> np.ndarray:
    return np.array([entry["score"] for entry in sorted(ranking, key=lambda entry: entry["corpus_id"])])


def _image_queries(count: int) -> list[tuple[Item, list[Item]]]:
    """Pictures, each with 50 short captions."""
    pairs: list[PairRecord] = [
        pair for pair in training_records(8000) if pair.query.image is not None and pair.positive.image is None
    ]
    short = sorted(pairs, key=lambda pair: len(pair.positive.text or ""))[: 50 * count]
    texts = list(dict.fromkeys(pair.positive for pair in short))
    pictures = [pair.query for pair in short[:count]]
    return [
        (picture, [texts[(number + place) % len(texts)] for place in range(50)])
        for number, picture in enumerate(pictures)
    ]


def main() -> None:
    """Measure, check that the answers agree, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="unime-tiny", help="alias or folder of a generative model")
    parser.add_argument("--template", default="tiny", help="prompt template; none with a saved reranker")
    parser.add_argument("--queries", type=int, default=4, help="queries per run")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each variant")
    options = parser.parse_args()
    reranker = UniMEReranker(options.model, template=None if options.template == "none" else options.template)
    queries = _image_queries(options.queries)
    winners: dict[str, list[int | None]] = {}
    scores: dict[str, np.ndarray] = {}

    def forget() -> None:
        reranker._engine().pairs.clear()  # so that every run sees its pictures anew

    def generated() -> None:
        winners["generated"] = [choose(reranker, query, texts[:10]).index for query, texts in queries]

    def listed() -> None:
        forget()
        winners["listed"] = [int(reranker.listwise_scores(query, texts[:10]).argmax()) for query, texts in queries]

    def stock() -> None:
        rankings = [
            CrossEncoder.rank(reranker, query.to_input(), [text.text for text in texts], activation_fn=Identity())
            for query, texts in queries
        ]
        scores["stock"] = np.concatenate([_scores(ranking) for ranking in rankings])

    def shared() -> None:
        forget()
        rankings = [reranker.rank(query, texts, activation_fn=Identity()) for query, texts in queries]
        scores["shared"] = np.concatenate([_scores(ranking) for ranking in rankings])

    lists = {"generate up to 128 tokens (official)": generated, "one list of 10": listed}
    sys.stdout.write(table(compare("rerank_listwise", lists, repeats=options.repeats)))
    agree = sum(left == right for left, right in zip(winners["generated"], winners["listed"], strict=True))
    named = sum(winner is not None for winner in winners["generated"])
    sys.stdout.write(f"\nsame winner: {agree} of {len(queries)} (generation named one of the ten in {named})\n\n")
    pairs = {"CrossEncoder.rank": stock, "rank, beginning shared": shared}
    sys.stdout.write(table(compare("rerank_pairwise", pairs, repeats=options.repeats)))
    sys.stdout.write(f"\nlargest difference of a score: {np.abs(scores['stock'] - scores['shared']).max():.1e}\n")
    for name, run in {**lists, **pairs}.items():
        with measured(reranker) as cost:
            run()
        sys.stdout.write(f"{name}: per query {cost.per_query(len(queries))}\n")


if __name__ == "__main__":
    main()
