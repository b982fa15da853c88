"""The reranker trains on the hardest of the stored negatives."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from unime_st.stages.reranker import hardest_negatives


def test_the_hardest_by_score_in_stored_order():
    draw = np.random.default_rng(0)
    scores = draw.random((20, 11)).astype(np.float32)
    names = [f"negative_{index}" for index in range(1, 11)]
    columns = {name: [f"{row}/{name}" for row in range(20)] for name in ("query", "positive", *names)}
    rows = hardest_negatives(Dataset.from_dict({**columns, "label": scores.tolist()}), 4)
    assert rows.column_names == ["query", "positive", *names[:4], "label"]
    for number, row in enumerate(rows):
        best = sorted(sorted(range(10), key=lambda index: -scores[number, 1 + index])[:4])
        assert [row[name] for name in names[:4]] == [f"{number}/{names[index]}" for index in best]
        assert np.allclose(row["label"], scores[number, [0, *(1 + index for index in best)]])
    plain = hardest_negatives(Dataset.from_dict(columns), 4)
    assert plain.column_names == ["query", "positive", *names[:4]] and plain[3]["negative_2"] == "3/negative_2"
