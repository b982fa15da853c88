"""Batch sampler: no duplicates, the same rows for any number of processes, datasets in the wanted shares."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from datasets import Dataset

from unime_st.training.batches import RowBatches, sampler
from unime_st.training.hard_clusters import hard_clusters


def _rows(positives: list[str]) -> Dataset:
    return Dataset.from_dict({"query": [f"q{row}" for row in range(len(positives))], "positive": positives})


PLAIN = _rows([f"p{row}" for row in range(50)])


def test_a_pass_is_every_row_once_in_another_order_each_time() -> None:
    batches = RowBatches(PLAIN, 5, drop_last=True, seed=1)
    passes = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        passes.append(list(batches))
    assert sorted(chain.from_iterable(passes[0])) == list(range(50)) and len(passes[0]) == len(batches) == 10
    assert passes[0] == passes[2] != passes[1]


@pytest.mark.parametrize("drop_last", [True, False])
def test_processes_share_what_one_would_see(drop_last: bool) -> None:
    one = RowBatches(_rows([f"p{row}" for row in range(47)]), 10, drop_last=drop_last)
    two = RowBatches(_rows([f"p{row}" for row in range(47)]), 5, drop_last=drop_last, world_size=2)
    whole, halves = list(one), list(two)
    assert len(two) == len(halves) == 2 * len(whole)
    assert [first + second for first, second in zip(halves[::2], halves[1::2])] == whole
    assert [len(batch) for batch in halves[-2:]] == ([5, 5] if drop_last else [4, 3])


@pytest.mark.parametrize(("world_size", "passes"), [(1, 5), (2, 4), (3, 3), (4, 4)])
def test_the_rows_of_the_last_step_are_shared_out(world_size: int, passes: int) -> None:
    rows = _rows([f"p{row}" for row in range(29)])  # two steps of 12, and one of 5
    for costs in (None, np.arange(29)):
        batches = RowBatches(
            rows, 1, drop_last=False, world_size=world_size, balanced=12 // world_size, costs=costs, distinct=False
        )
        found = list(batches)
        assert len(found) == len(batches) == 24 + passes and min(map(len, found)) == 1
        assert sorted(chain.from_iterable(found)) == list(range(29))


def test_rows_that_cannot_be_shared_out_are_left_out_where_the_loss_wants_it() -> None:
    make = sampler(world_size=2, even=True, drop_last=False)
    batches = make(_rows([f"p{row}" for row in range(29)]), batch_size=4, drop_last=True)
    assert [len(batch) for batch in batches] == [4] * 6 + [2, 2] and len(batches) == 8


def test_no_positive_comes_twice_and_the_number_of_batches_holds() -> None:
    rows = _rows(["yes", "no"] * 20 + [f"p{row}" for row in range(60)])
    batches = RowBatches(rows, 5, drop_last=True, world_size=2)
    found = list(batches)
    assert len(found) == len(batches) == 20
    for first, second in zip(found[::2], found[1::2]):
        positives = [rows[row]["positive"] for row in first + second]
        assert len(set(positives)) == 10


def test_an_impossible_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="the data have 2 distinct"):
        RowBatches(_rows(["yes", "no"] * 20), 5, drop_last=True)


def test_datasets_by_temperature_and_in_sub_batches() -> None:
    names = ["large"] * 80 + ["small"] * 20
    rows = _rows([f"p{row}" for row in range(100)])
    shares = {}
    for temperature in (1.0, 2.0, 1e9):
        batches = sampler(datasets=names, temperature=temperature, sub_batch_size=5)(
            rows, batch_size=10, drop_last=True
        )
        drawn = [[names[row] for row in batch] for batch in batches]
        shares[temperature] = Counter(chain.from_iterable(drawn))["small"]
        if temperature == 1.0:
            assert all(len(set(batch[:5])) == len(set(batch[5:])) == 1 for batch in drawn)
    assert shares == {1.0: 20, 2.0: 33, 1e9: 50} or shares == {1.0: 20, 2.0: 34, 1e9: 50}


def test_sub_batches_are_whole_except_where_a_dataset_ends() -> None:
    names = np.array(["large"] * 103 + ["small"] * 50 + ["least"] * 21)
    rows = _rows([f"{name} {row % 15}" for row, name in enumerate(names)])  # every positive several times
    batches = sampler(datasets=names.tolist(), sub_batch_size=4)(rows, batch_size=12, drop_last=True)
    drawn = list(batches)
    mixed = 0
    for batch in drawn:
        assert len({rows[row]["positive"] for row in batch}) == 12
        runs = [len(set(names[batch[start : start + 4]])) for start in (0, 4, 8)]
        assert runs == sorted(runs), "what is no whole sub-batch stands at the end"
        mixed += sum(kinds > 1 for kinds in runs)
    assert mixed <= 3 and len(set(chain.from_iterable(drawn))) >= 160


@pytest.mark.parametrize(("sizes", "sub_batch", "size"), [((100, 60, 40), 8, 20), ((1000, 10, 300), 16, 64)])
def test_a_pass_takes_every_row_once(sizes: tuple[int, ...], sub_batch: int, size: int) -> None:
    names = [f"set {number}" for number, count in enumerate(sizes) for _ in range(count)]
    rows = _rows([str(row) for row in range(len(names))])
    batches = sampler(datasets=names, sub_batch_size=sub_batch)(rows, batch_size=size, drop_last=False)
    assert sorted(chain.from_iterable(batches)) == list(range(len(names)))


def test_a_dataset_with_few_labels_gives_shorter_sub_batches() -> None:
    rows = _rows([f"p{row}" for row in range(60)] + ["yes", "no"] * 10)
    batches = sampler(datasets=["large"] * 60 + ["labels"] * 20, sub_batch_size=5)(rows, batch_size=10, drop_last=True)
    for batch in batches:
        assert len({rows[row]["positive"] for row in batch}) == 10
    ring = Dataset.from_dict(
        {"query": list("abcdefghij"), "positive": list("bcdefghija")}
    )  # neighbours exclude each other
    with pytest.raises(ValueError, match="no batch of 10 rows without duplicates was found"):
        list(sampler(datasets=["one"] * 10, sub_batch_size=5)(ring, batch_size=10, drop_last=True))


def test_costs_are_dealt_out_evenly() -> None:
    costs = np.arange(48)
    batches = list(RowBatches(_rows(["same"] * 48), 4, drop_last=True, distinct=False, costs=costs, balanced=12))
    assert len(batches) == 12 and all(len(batch) == 4 for batch in batches)
    totals = [costs[batch].sum() for batch in batches]
    assert max(totals) - min(totals) <= 1 and sorted(chain.from_iterable(batches)) == list(range(48))


def _planted(groups: int, size: int, seed: int) -> tuple[list[str], list[str], list[np.ndarray], np.ndarray]:
    """Rows in hidden groups whose members are each other's candidates, and one candidate of another group."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(groups), size))
    edges = []
    for row in range(len(group)):
        inside = np.flatnonzero(group == group[row])
        edges.append(np.append(rng.permutation(inside[inside != row]), rng.integers(len(group))))
    return [f"q{row}" for row in range(len(group))], [f"p{row}" for row in range(len(group))], edges, group


def test_clusters_of_mutual_hard_negatives_are_found() -> None:
    queries, positives, edges, group = _planted(30, 8, seed=0)
    clusters = hard_clusters(queries, positives, edges, 8, seed=3)
    assert sorted(chain.from_iterable(cluster.tolist() for cluster in clusters)) == list(range(240))
    pure = sum(len(set(group[cluster].tolist())) == 1 for cluster in clusters)
    assert pure >= 27
    again = hard_clusters(queries, positives, edges, 8, seed=3)
    assert [cluster.tolist() for cluster in clusters] == [cluster.tolist() for cluster in again]
    other = hard_clusters(queries, positives, edges, 8, seed=4)
    assert [cluster.tolist() for cluster in clusters] != [cluster.tolist() for cluster in other]


def test_a_batch_is_made_of_whole_clusters_for_any_number_of_processes() -> None:
    queries, positives, edges, _ = _planted(30, 8, seed=1)
    clusters = hard_clusters(queries, positives, edges, 8)
    number = np.empty(240, dtype=int)
    for index, cluster in enumerate(clusters):
        number[cluster] = index
    rows = Dataset.from_dict({"query": queries, "positive": positives})
    one = RowBatches(rows, 24, drop_last=True, clusters=clusters)
    two = RowBatches(rows, 12, drop_last=True, clusters=clusters, world_size=2)
    passes = []
    for epoch in (0, 1, 0):
        one.set_epoch(epoch)
        two.set_epoch(epoch)
        passes.append(list(one))
        halves = list(two)
        assert [first + second for first, second in zip(halves[::2], halves[1::2])] == passes[-1]
    assert sorted(chain.from_iterable(passes[0])) == list(range(240)) and passes[0] == passes[2] != passes[1]
    assert all(len(set(number[batch].tolist())) == 3 for batch in passes[0])


@pytest.mark.parametrize("size", [10, 16, 23])
def test_clusters_with_items_that_come_twice(size: int) -> None:
    """No query and no positive twice in a batch, every row once a pass, whatever the size of the batch."""
    rng = np.random.default_rng(size)
    queries = [f"q{row // 2}" for row in range(230)]
    positives = [f"p{rng.integers(150)}" for _ in range(230)]
    edges = [rng.integers(230, size=6) for _ in range(230)]
    clusters = hard_clusters(queries, positives, [own[own != row] for row, own in enumerate(edges)], 8)
    for cluster in clusters[:15]:
        assert len({queries[row] for row in cluster}) == len({positives[row] for row in cluster}) == 8
    rows = Dataset.from_dict({"query": queries, "positive": positives})
    found = list(RowBatches(rows, size, drop_last=False, clusters=clusters))
    assert [len(batch) for batch in found] == [size] * (230 // size) + ([230 % size] if 230 % size else [])
    for batch in found:
        assert len({queries[row] for row in batch}) == len({positives[row] for row in batch}) == len(batch)
    assert len(set(chain.from_iterable(found))) > 220
    few = Dataset.from_dict({"query": list("abcd"), "positive": list("wwww")})
    with pytest.raises(ValueError, match="the data have 1 distinct"):
        RowBatches(few, 2, drop_last=True, clusters=[np.arange(4)])


def test_rows_without_candidates_are_drawn_as_well() -> None:
    clusters = hard_clusters(
        [f"q{n}" for n in range(21)], [f"p{n}" for n in range(21)], [np.array([], dtype=int)] * 21, 4
    )
    assert sorted(chain.from_iterable(cluster.tolist() for cluster in clusters)) == list(range(21))
    assert [len(cluster) for cluster in clusters] == [4] * 5 + [1]
