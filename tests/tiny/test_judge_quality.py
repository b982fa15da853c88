"""Quality of `unime-tiny` as a judge: the record, the page that shows it, and a small run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from train_scripts.tiny.judge_quality import KINDS, ORDERS, measure, table
from unime_st import UniME
from unime_st.data.scenes import retrieval_data
from unime_st.files import read_json
from unime_st.judging import Group, LocalJudge

ROOT = Path(__file__).resolve().parents[2]


def test_page_has_the_numbers_of_the_record() -> None:
    record = read_json(ROOT / "benchmarks" / "results" / "judge_quality.json")
    assert [row["kind"] for row in record["rows"]] == list(KINDS)
    assert table(record["rows"]) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["short_i2t", "grounding"])
def test_judge_against_truth(kind: str) -> None:
    """The AUC is that of pairs judged one by one."""
    embedder, judge = UniME("unime-tiny"), LocalJudge("unime-tiny", template="tiny")
    found = measure(kind, 12, embedder, judge)
    data = retrieval_data(kind, split="test", size=12, seed=7)
    expected: dict[str, list[Any]] = {"true": [], "odds": []}
    for query, item in data.queries.items():
        names = (data.candidates or {}).get(query, list(data.corpus))
        vectors = embedder.encode([item, *map(data.corpus.get, names)], normalize_embeddings=True)
        nearest = [names[index] for index in np.argsort(-vectors[1:] @ vectors[0])[:12]]
        for name in {*nearest, min(data.relevant[query])}:
            expected["true"].append(name in data.relevant[query])
            expected["odds"].append(judge.score([Group(item, [data.corpus[name]])])[0][0])
    assert found["pairs"] == len(expected["true"])
    assert found[ORDERS[0]] == pytest.approx(roc_auc_score(expected["true"], expected["odds"]), abs=1e-3)
