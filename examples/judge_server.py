"""Judge pairs with a model behind an OpenAI-compatible server, such as vLLM or SGLang.

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --enable-prefix-caching
    python examples/judge_server.py --url http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-VL-7B-Instruct

The score is P(Yes) for the question "does this candidate meet the query?". The same server judges whole pools with
`unime judge --url URL --model NAME`.
"""

from __future__ import annotations

import argparse

import numpy as np

from unime_st import Item
from unime_st.data.scenes import retrieval_data
from unime_st.judging import Group, HttpJudge, PairError


def main(url: str, model: str) -> None:
    """Judge four captions for each of two drawn images."""
    data = retrieval_data("short_i2t", size=4)
    captions = list(data.corpus.values())
    groups = [Group(query, captions) for query in list(data.queries.values())[:2]]
    groups.append(Group(Item(text="What color is a banana?"), ["yellow", "blue"]))

    errors: list[PairError] = []
    judge = HttpJudge(url, model, concurrency=8)
    for group, log_odds in zip(groups, judge.score(groups, errors=errors)):
        print(f"query: {group.query.text}")
        for score, candidate in zip(1 / (1 + np.exp(-log_odds)), group.candidates):
            print(f"  {score:.2f}  {candidate.text}")
    for error in errors:
        print(f"not judged: {error}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="address up to and including /v1")
    parser.add_argument("--model", required=True, help="name of the model on the server")
    options = parser.parse_args()
    main(options.url, options.model)
