"""Reranking: ten candidates in one list against generating the answer, fifty pairs against `CrossEncoder.rank`.

python benchmarks/rerank.py [--model FOLDER --template tiny --queries 4 --repeats 3]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import compare, table
from official_reranker import Choice, choose
from sentence_transformers import CrossEncoder
from torch.nn import Identity
from workloads import images, random_qwen2_5_vl, sentences

from unime_st import Item, UniMEReranker
from unime_st.data.records import PairRecord
from unime_st.data.scenes import training_records
from unime_st.losses.list_answers import LIST_ANSWER_START, append_tokens
from unime_st.scoring.forward_counter import ForwardCounter


def _scores(ranking: list[dict[str, Any]]) -> np.ndarray:
    return np.array([entry["score"] for entry in sorted(ranking, key=lambda entry: entry["corpus_id"])])


def _image_queries(count: int) -> list[tuple[Item, list[Item]]]:
    """Images, each with 50 short captions."""
    pairs: list[PairRecord] = [
        pair for pair in training_records(8000) if pair.query.image is not None and pair.positive.image is None
    ]
    short = sorted(pairs, key=lambda pair: len(pair.positive.text or ""))[: 50 * count]
    texts = list(dict.fromkeys(pair.positive for pair in short))
    images = [pair.query for pair in short[:count]]
    return [
        (image, [texts[(number + index) % len(texts)] for index in range(50)]) for number, image in enumerate(images)
    ]


def _teach(reranker: UniMEReranker, steps: int) -> None:
    """Teach the format of the official answers, which our loss leaves out: "Ans: (k)" and the end of the turn."""
    model: Any = reranker[0].model
    tokenizer: Any = reranker.tokenizer
    pairs = [pair for pair in training_records(4000) if pair.query.image is not None and pair.positive.image is None]
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(steps):
        index = draw.randrange(10)  # the same in the whole batch, so that all answers are as long
        rows = draw.sample(pairs, 4)
        lists = [[pair.positive for pair in draw.sample(pairs, 10)] for _ in rows]
        for row, listed in zip(rows, lists, strict=True):
            listed[index] = row.positive
        features = reranker.preprocess_lists([row.query for row in rows], lists, share=False)
        given = tokenizer.encode(f"{LIST_ANSWER_START}{index + 1})", add_special_tokens=False)
        begun = len(tokenizer.encode(LIST_ANSWER_START, add_special_tokens=False))
        for token in (*given[begun:], tokenizer.eos_token_id):
            append_tokens(features, [token] * len(rows))
        inputs = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
        answer = torch.tensor([*given, tokenizer.eos_token_id]).repeat(len(rows))
        logits = model(**inputs, logits_to_keep=len(given) + 2).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits.float(), answer).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def lists(options: argparse.Namespace) -> None:
    """Generation against one list, with the embedded default, which learns to write answers in the official format."""
    reranker = UniMEReranker(options.model, template=None if options.template == "none" else options.template)
    _teach(reranker, options.teach_steps)
    queries = _image_queries(options.queries)
    answers: dict[str, list[Choice]] = {}
    winners: dict[str, list[int | None]] = {}

    def generated() -> None:
        answers["generated"] = [choose(reranker, query, texts[:10]) for query, texts in queries]
        winners["generated"] = [choice.index for choice in answers["generated"]]

    def listed() -> None:
        reranker.ranker().pairs.clear()  # so that every run sees its images anew
        winners["listed"] = [int(reranker.listwise_scores(query, texts[:10]).argmax()) for query, texts in queries]

    variants = {"generate up to 128 tokens (official)": generated, "one list of 10": listed}
    sys.stdout.write(table(compare("rerank_listwise", variants, repeats=options.repeats)))
    agree = sum(left == right for left, right in zip(winners["generated"], winners["listed"], strict=True))
    named = sum(winner is not None for winner in winners["generated"])
    written = ", ".join(sorted({choice.answer for choice in answers["generated"]}))
    sys.stdout.write(
        f"\nsame winner: {agree} of {len(queries)} (generation named one of the ten in {named}: {written})\n\n"
    )
    _costs(reranker, variants, len(queries))


def pairs(options: argparse.Namespace, work: Path) -> None:
    """Stock pair by pair against ours, with a random model of middle size and images of 300 to 400 pixels."""
    reranker = UniMEReranker(str(random_qwen2_5_vl(work / "model", "mid", "cpu")), template="tiny")
    shown, said = images(work, options.queries, shortest=300, longest=400), sentences(50, least=5, most=15)
    scores: dict[str, np.ndarray] = {}

    def stock() -> None:
        rankings = [CrossEncoder.rank(reranker, {"image": path}, said, activation_fn=Identity()) for path in shown]
        scores["stock"] = np.concatenate([_scores(ranking) for ranking in rankings])

    def shared() -> None:
        reranker.ranker().pairs.clear()
        rankings = [reranker.rank({"image": path}, said, activation_fn=Identity()) for path in shown]
        scores["shared"] = np.concatenate([_scores(ranking) for ranking in rankings])

    variants = {"CrossEncoder.rank": stock, "rank, beginning shared": shared}
    sys.stdout.write(table(compare("rerank_pairwise", variants, repeats=options.repeats)))
    sys.stdout.write(f"\nlargest difference of a score: {np.abs(scores['stock'] - scores['shared']).max():.1e}\n")
    _costs(reranker, variants, len(shown))


def _costs(reranker: UniMEReranker, variants: dict[str, Callable[[], None]], queries: int) -> None:
    for name, run in variants.items():
        with ForwardCounter(reranker) as count:
            run()
        sys.stdout.write(f"{name}: per query {count.per_query(queries)}\n")


def main() -> None:
    """Measure, check that the answers agree, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="unime-tiny", help="of the lists: alias or folder of a generative model")
    parser.add_argument("--template", default="tiny", help="of the lists: prompt template; none with a saved reranker")
    parser.add_argument(
        "--teach-steps", type=int, default=150, help="of the lists: steps that teach the official answers; 0: it knows"
    )
    parser.add_argument("--queries", type=int, default=4, help="queries per run")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each variant")
    options = parser.parse_args()
    lists(options)
    with tempfile.TemporaryDirectory() as folder:
        pairs(options, Path(folder))


if __name__ == "__main__":
    main()
