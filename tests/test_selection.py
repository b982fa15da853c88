"""The selection of hard negatives: the published cases, and properties on arbitrary pools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unime_st.judging.select import select_negatives

scores = st.floats(0.0, 1.0)
pools = st.lists(scores, min_size=1, max_size=60)
counts = st.integers(1, 12)
margins = st.floats(-0.2, 0.2)


def test_published_cases(golden_cases: Path) -> None:
    cases = json.loads((golden_cases / "selection" / "paper_rule.json").read_text())["cases"]
    assert len(cases) >= 9
    for case in cases:
        pool, n = case["pool_scores_in_similarity_order"], case["n"]
        indices, chosen = select_negatives(
            pool, case["positive_score"], margin=case["beta"], stride=case["step"], num_negatives=n
        )
        if case["n_surviving"]:
            assert indices.tolist() == case["selected_restart"], case["name"]
            assert chosen.tolist() == case["selected_scores_restart"], case["name"]
        else:
            assert len(set(indices.tolist())) == n and set(indices.tolist()) <= set(range(len(pool))), case["name"]
            assert chosen.tolist() == [1.0] * n, case["name"]


@given(pools, scores, margins, st.integers(1, 9), counts)
def test_survivors_are_walked_fairly(pool: list[float], positive: float, margin: float, stride: int, n: int) -> None:
    survivors = [index for index, score in enumerate(pool) if score <= positive - margin]
    indices, chosen = select_negatives(pool, positive, margin=margin, stride=stride, num_negatives=n)
    assert indices.shape == chosen.shape == (n,)
    assert indices.dtype == np.int64 and chosen.dtype == np.float64
    if not survivors:
        assert chosen.tolist() == [1.0] * n
        return
    assert set(indices.tolist()) <= set(survivors)
    assert chosen.tolist() == [pool[index] for index in indices]
    # Nobody comes a second time before everybody has come once.
    assert len(set(indices.tolist())) == min(n, len(survivors))
    _, times = np.unique(indices, return_counts=True)
    assert times.max() - (times.min() if n >= len(survivors) else 0) <= 1
    # The first pass is the stride walk itself.
    first_pass = survivors[::stride][:n]
    assert indices.tolist()[: len(first_pass)] == first_pass


@given(pools, scores, counts, st.integers(0, 60))
def test_filtered_candidates_have_no_influence(pool: list[float], positive: float, n: int, position: int) -> None:
    indices, chosen = select_negatives(pool, positive, num_negatives=n)
    if not any(score <= positive - 0.01 for score in pool):
        return
    position %= len(pool) + 1
    extended, extended_scores = select_negatives([*pool[:position], 1.0, *pool[position:]], positive, num_negatives=n)
    assert [index - (index > position) for index in extended] == indices.tolist()
    assert extended_scores.tolist() == chosen.tolist()


@given(st.integers(1, 30), counts, st.integers(0, 2**32 - 1))
def test_none_left(pool_size: int, n: int, seed: int) -> None:
    pool = np.linspace(0.5, 1.0, pool_size)
    indices, chosen = select_negatives(pool, 0.4, num_negatives=n, generator=np.random.default_rng(seed))
    assert chosen.tolist() == [1.0] * n
    assert set(indices.tolist()) <= set(range(pool_size))
    assert pool_size < n or len(set(indices.tolist())) == n
    repeat, _ = select_negatives(pool, 0.4, num_negatives=n, generator=np.random.default_rng(seed))
    assert repeat.tolist() == indices.tolist()


def test_none_left_draws_from_the_whole_pool() -> None:
    generator = np.random.default_rng(0)
    drawn = {int(i) for _ in range(50) for i in select_negatives(np.ones(20), 0.5, generator=generator)[0]}
    assert drawn == set(range(20))


def test_a_positive_judged_below_the_margin() -> None:
    pool = [0.004, 0.0085, 0.2, 0.001]
    _, chosen = select_negatives(pool, 0.0085, num_negatives=3)
    assert chosen.tolist() == [1.0] * 3
    indices, chosen = select_negatives(pool, 0.0085, num_negatives=3, relax_low_positive=True)
    assert indices.tolist() == [0, 3, 0] and chosen.tolist() == [0.004, 0.001, 0.004]
    # Above the margin the option changes nothing, and where nothing is below the positive either, nothing is left.
    assert select_negatives(pool, 0.2, relax_low_positive=True)[0].tolist() == [0, 1, 3] * 3 + [0]
    assert select_negatives(pool, 0.001, num_negatives=2, relax_low_positive=True)[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], 0.5), {}, "non-empty"),
        (([[0.1]], 0.5), {}, "non-empty"),
        (([0.1, np.nan, 0.2], 0.5), {}, r"scores\[1\] is nan"),
        (([0.1, 1.2], 0.5), {}, r"scores\[1\] is 1.2.*1 of 2"),
        (([-3.0], 0.5), {}, "sigmoid"),
        (([0.1], np.nan), {}, "positive_score is nan"),
        (([0.1], 4.0), {}, "positive_score is 4.0"),
        (([0.1], 0.5), {"margin": np.nan}, "margin"),
        (([0.1], 0.5), {"stride": 0}, "stride"),
        (([0.1], 0.5), {"num_negatives": 0}, "num_negatives"),
    ],
)
def test_wrong_arguments(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_negatives(*arguments, **options)


@pytest.mark.parametrize("wrong", [{"scores": [0.1, "x"]}, {"positive_score": None}, {"margin": "x"}, {"margin": [1]}])
def test_what_is_not_a_number_is_refused(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"scores": [0.1, 0.2], "positive_score": 0.9, **wrong}
    with pytest.raises(ValueError, match="must be numbers"):
        select_negatives(**arguments)
