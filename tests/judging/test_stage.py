"""Judge stage: every pair scored once, resumed after kills, shared by concurrent runs, selected into rows."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_embedder import tiny_embedder
from word_judge import WordJudge

from unime_st.data import Item, PairRecord, RecordSet, StageConflictError, is_complete
from unime_st.data.logits import CERTAIN_LOGIT, to_scores
from unime_st.data.manifest import begin_stage, read_manifest
from unime_st.judging import Group, Judge, LocalJudge, PairError
from unime_st.judging.judge_pools import judge_part, judge_pools
from unime_st.judging.score_store import Scores, ScoreShards
from unime_st.judging.select import select_negatives
from unime_st.judging.select_rows import select_rows
from unime_st.retrieval import Pools, mine

COLOURS, SHAPES = ("red", "blue", "green"), ("square", "circle", "star")


def pairs() -> list[PairRecord]:
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    made = [PairRecord(Item(f"find a {name}"), Item(f"an image of a {name}"), "plain") for name in names]
    # One query with several right answers, whose rows share their candidates.
    return made + [PairRecord(Item("find a square"), made[index].positive, "many") for index in (0, 3, 6)]


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Pools:
    folder = tmp_path_factory.mktemp("pools")
    records = RecordSet.write(folder / "records", pairs(), {})
    return mine(records, tiny_embedder(), folder / "pools", num_candidates=6, max_similarity=None)


def test_every_pair_gets_its_score(pools: Pools, tmp_path: Path):
    scores = judge_pools(pools, WordJudge(), tmp_path / "scores", shard_size=4)
    assert len(list((tmp_path / "scores").glob("rows-*.parquet"))) == 3
    assert len(scores) == len(pools) and scores.manifest["pairs"] == 7 * len(pools)
    judged = {(pool.query.id, pool.positive.id): pool for pool in scores}
    for pool in pools:
        found = judged[pool.query.id, pool.positive.id]
        assert (found.candidates, found.similarities) == (pool.candidates, pool.similarities)
        (expected,) = WordJudge().score([Group(pool.query, [pool.positive, *pool.candidates])])
        assert [found.positive_logit, *found.logits] == expected.tolist()
    assert scores.rows.schema.field("positive_logit").type == "float"
    assert scores.manifest["judge"] == {"name": "words", "revision": "1", "prompt_hash": "none"}
    assert scores[0].query == next(iter(scores)).query


def test_no_pair_is_judged_twice(pools: Pools, tmp_path: Path):
    judge = WordJudge()
    judge_pools(pools, judge, tmp_path / "scores", shard_size=1)
    assert len(judge.seen) == len(set(judge.seen)) > 0


def test_two_runs_at_once_share_what_is_left(pools: Pools, tmp_path: Path):
    class Slow(WordJudge):
        def score(self, groups: Sequence[Group], *, errors: list[PairError] | None = None) -> list[np.ndarray]:
            if not self.seen:  # the other run does everything while this one judges its first shard
                for part in range(2):
                    judge_part(pools, WordJudge(), tmp_path / "scores", (part, 2), shard_size=1)
            return super().score(groups, errors=errors)

    slow = Slow()
    found = judge_pools(pools, slow, tmp_path / "scores", shard_size=1)
    assert {query for query, _ in slow.seen} == {found[0].query.id} and len(found) == len(pools)
    alone = judge_pools(pools, WordJudge(), tmp_path / "alone", shard_size=1)
    assert [row.logits for row in found] == [row.logits for row in alone]


def test_the_same_shard_written_by_two_at_once(pools: Pools, tmp_path: Path):
    """The second comes, and would finish the folder, while the first has its temporary files open."""
    (tmp_path / "scores").mkdir()
    rows = list(pools.row_shards.rows())
    logits = {(row["query"], item): 1.0 for row in rows for item in (row["positive"], *row["candidates"])}
    failed = {(rows[0]["query"], rows[0]["candidates"][0]): "broken"}
    del logits[next(iter(failed))]
    begin_stage(tmp_path / "scores", "judge", inputs=[], options={})

    def second() -> None:
        shards = ScoreShards(tmp_path / "scores", {"name": "words"}, 1)
        shards.write(0, rows, logits, failed)
        assert shards.finish({})

    other = threading.Thread(target=second, daemon=True)

    class Interrupted(list):
        def __iter__(self) -> Iterator[dict]:
            other.start()
            other.join(timeout=1)  # time to do harm
            return super().__iter__()

    ScoreShards(tmp_path / "scores", {"name": "words"}, 1).write(0, Interrupted(rows), logits, failed)
    other.join()
    manifest = read_manifest(tmp_path / "scores")
    assert (manifest["rows"], manifest["rejected"]) == (len(rows), 1)
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [
        "manifest.json", "rejected.jsonl", "rows-00000.parquet"
    ]  # fmt: skip


def test_another_judge_is_refused(pools: Pools, tmp_path: Path):
    judge_pools(pools, WordJudge(), tmp_path / "scores")
    for name, value in (("name", "other"), ("revision", "2"), ("prompt_hash", "else")):
        other = WordJudge()
        setattr(other, name, value)
        with pytest.raises(StageConflictError, match=f"{value}.*--overwrite"):
            judge_pools(pools, other, tmp_path / "scores")
    judge_pools(pools.folder, other, tmp_path / "scores", overwrite=True)


def test_finished_scores_are_not_judged_again(pools: Pools, tmp_path: Path):
    judge_pools(pools, WordJudge(), tmp_path / "scores")
    judge = WordJudge()
    judge_pools(pools, judge, tmp_path / "scores")
    assert judge.seen == []


class Careless(WordJudge):
    def __init__(self, answers: object) -> None:
        super().__init__()
        self.answers = answers

    def score(self, groups: Sequence[Group], *, errors: list[PairError] | None = None) -> list[np.ndarray]:
        return (
            [np.full(len(group.candidates), self.answers) for group in groups]
            if self.answers is not None
            else [np.zeros(1) for _ in groups]
        )


@pytest.mark.parametrize(
    ("answers", "message"), [(np.nan, "gave nan"), (np.inf, "gave inf"), (None, "gave 1 scores for")]
)
def test_careless_judges_stop_the_stage(answers: object, message: str, pools: Pools, tmp_path: Path):
    assert isinstance(Careless(answers), Judge)
    with pytest.raises(ValueError, match=message):
        judge_pools(pools, Careless(answers), tmp_path / "scores")
    assert not is_complete(tmp_path / "scores") and not list((tmp_path / "scores").glob("rows-*"))


def test_corrupt_images_are_set_aside_and_the_rest_is_judged(tmp_path: Path):
    records = []
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        records.append(PairRecord(Item(f"find {index}"), Item(f"image {index}", tmp_path / f"{index}.png")))
    stored = RecordSet.write(tmp_path / "records", records, {}, image_root=tmp_path)
    pools = mine(stored, tiny_embedder(), tmp_path / "pools", max_similarity=None)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    scores = judge_pools(pools, WordJudge(), tmp_path / "scores", shard_size=2)
    bad = pools[2].positive.id
    assert len(scores) == 4 and scores.manifest["rejected"] == 4 + 1 + 1
    assert all(len(pool.candidates) == len(pool.logits) == 3 for pool in scores)
    lines = (tmp_path / "scores" / "rejected.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert (
        sum("truncated" in entry["reason"] and entry["candidate"] == bad for entry in entries if "candidate" in entry)
        == 5
    )
    assert [entry["positive"] for entry in entries if "positive" in entry] == [bad]
    assert not list((tmp_path / "scores").glob("rejected-*"))


def _judge_slowly(folder: Path, output: Path) -> None:
    judge_pools(folder, WordJudge(pause=0.3), output, shard_size=1)


def test_killed_and_started_again(pools: Pools, tmp_path: Path):
    output = tmp_path / "scores"
    process = multiprocessing.get_context("fork").Process(target=_judge_slowly, args=(pools.folder, output))
    process.start()
    while len(list(output.glob("rows-*.parquet"))) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    finished = {path.name: path.read_bytes() for path in output.glob("rows-*.parquet")}
    assert not is_complete(output) and 3 <= len(finished) < 10
    (output / "rows-00009.parquet.1.tmp").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="not finished"):
        Scores(output)
    judge = WordJudge()
    resumed = judge_pools(pools, judge, output, shard_size=1)
    assert all((output / name).read_bytes() == content for name, content in finished.items())
    straight = WordJudge()
    whole = judge_pools(pools, straight, tmp_path / "straight", shard_size=1)
    assert resumed.rows.equals(whole.rows) and resumed.manifest == whole.manifest
    assert 0 < len(judge.seen) < len(straight.seen)
    assert not list(output.glob("*.tmp"))


def scored(folder: Path, rows: list[tuple[float, list[float]]]) -> Scores:
    """A scores folder with given log-odds; the real thing, made through a judge that looks them up."""
    table = {}
    records = []
    for number, (positive, logits) in enumerate(rows):
        query = Item(f"query {number}")
        records.append(PairRecord(query, Item(f"answer {number}"), f"{number}"))
        records += [
            PairRecord(Item(f"other {number} {index}"), Item(f"candidate {number} {index}"), f"{number}")
            for index in range(len(logits))
        ]
        table[query.text] = {f"answer {number}": positive}
        table[query.text] |= {f"candidate {number} {index}": logit for index, logit in enumerate(logits)}
    pools = mine(
        RecordSet.write(folder / "records", records, {}),
        tiny_embedder(),
        folder / "pools",
        pool="dataset",
        max_similarity=None,
    )
    return judge_pools(pools, WordJudge(table=table), folder / "scores")


def test_selection_follows_the_rule(tmp_path: Path):
    rng = np.random.default_rng(0)
    scores = scored(tmp_path, [(2.0, rng.normal(0, 3, 30).tolist()), (-1.0, rng.normal(-4, 1, 4).tolist())])
    records = select_rows(scores, tmp_path / "rows", num_negatives=8)
    assert len(records) == len(scores)
    for record, judged in zip(records, scores, strict=True):
        pool, positive = to_scores(judged.logits), float(to_scores(judged.positive_logit))
        chosen, _ = select_negatives(
            pool, positive, num_negatives=8, relax_low_positive=True, generator=np.random.default_rng(0)
        )
        if (pool <= positive - 0.01).any():
            assert list(record.negatives) == [judged.candidates[index] for index in chosen]
            assert record.negative_logits == tuple(judged.logits[index] for index in chosen)
        assert record.positive_logit == judged.positive_logit and record.dataset == judged.dataset


def test_none_left_counts_as_matches(tmp_path: Path):
    scores = scored(tmp_path, [(0.0, [1.0, 2.0, 3.0])])
    records = select_rows(scores, tmp_path / "rows", num_negatives=2)
    first = next(record for record in records if record.query.text == "query 0")
    assert first.negative_logits == (CERTAIN_LOGIT, CERTAIN_LOGIT) and to_scores(first.negative_logits).tolist() == [
        1,
        1,
    ]
    same = select_rows(scores, tmp_path / "again", num_negatives=2)
    assert same.rows.equals(records.rows)
    other = select_rows(scores, tmp_path / "seed", num_negatives=2, seed=1)
    assert len(other) == len(records)


def test_low_positive_and_divisor(tmp_path: Path):
    scores = scored(tmp_path, [(-5.0, [-5.5, -4.0])])
    relaxed = select_rows(scores, tmp_path / "a", num_negatives=1)
    printed = select_rows(scores, tmp_path / "b", num_negatives=1, relax_low_positive=False)
    pick = lambda records: next(record for record in records if record.query.text == "query 0")
    assert pick(relaxed).negative_logits == (-5.5,) and pick(printed).negative_logits == (CERTAIN_LOGIT,)
    divided = select_rows(scores, tmp_path / "c", num_negatives=1, score_divisor=100.0, margin=0.0)
    assert pick(divided).negative_logits == (-5.5,)
    trusted = pick(select_rows(scores, tmp_path / "d", num_negatives=2, min_positive_score=1.0))
    assert trusted.positive_logit == CERTAIN_LOGIT and sorted(trusted.negative_logits) == [-5.5, -4.0]
    believed = pick(select_rows(scores, tmp_path / "e", num_negatives=1, min_positive_score=0.001))
    assert believed.positive_logit == pytest.approx(-5.0)  # scores more than that
    with pytest.raises(ValueError, match=r"min_positive_score must be between 0 and 1, got 1.5"):
        select_rows(scores, tmp_path / "f", min_positive_score=1.5)


def test_statistics(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "unime_st")
    scores = scored(tmp_path, [(2.0, [3.0, -3.0, -4.0]), (0.0, [1.0, 1.0])])
    only = [row for row in scores if row.query.text.startswith("query")]
    assert len(only) == 2
    records = select_rows(scores, tmp_path / "rows", num_negatives=2)
    facts = records.manifest["statistics"]
    assert facts["rows"] == len(scores) == sum(facts["score_histograms"]["positive"])
    assert facts["candidates"] == sum(facts["score_histograms"]["candidates"])
    assert sum(facts["rank_histogram"]) == 2 * len(scores) == sum(facts["score_histograms"]["negatives"])
    filtered = sum(int((to_scores(row.logits) > to_scores(row.positive_logit) - 0.01).sum()) for row in scores)
    assert facts["false_negatives_filtered"] == filtered >= 3
    assert facts["none_left"] >= 1 and facts["rows_with_filtered"] >= 2
    assert records.manifest["judge"] == scores.manifest["judge"]
    printed = caplog.text
    assert f"{filtered} of {facts['candidates']} candidates filtered" in printed and "ranks of the chosen" in printed
    low = sum(facts["score_histograms"]["candidates"][:2]) / facts["candidates"]
    assert f"scores of candidates by tenths from 0 to 1: {low:.0%} " in printed
    with pytest.raises(StageConflictError, match="margin"):
        select_rows(scores, tmp_path / "rows", num_negatives=2, margin=0.5)


def test_pairs_without_candidates(tmp_path: Path):
    scores = scored(tmp_path, [(1.0, []), (1.0, [0.0])])
    records = select_rows(scores, tmp_path / "rows", num_negatives=2)
    assert len(records) == len(scores) - 1 and records.manifest["rejected"] == 1
    alone = scored(tmp_path / "alone", [(1.0, [])])
    with pytest.raises(ValueError, match="none of 1 pairs has a candidate"):
        select_rows(alone, tmp_path / "none")


def test_shards_are_plain_parquet(pools: Pools, tmp_path: Path):
    judge_pools(pools, WordJudge(), tmp_path / "scores", shard_size=100)
    table = pq.read_table(tmp_path / "scores" / "rows-00000.parquet")
    assert table.column_names == [
        "query", "positive", "dataset", "positive_similarity", "candidates", "similarities", "positive_logit", "logits"
    ]  # fmt: skip


def test_a_real_judge(judge: LocalJudge, tmp_path: Path):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (30, 30, 3), dtype=np.uint8)) for _ in range(3)]
    records = [PairRecord(Item(f"find {index}"), Item(image=image)) for index, image in enumerate(images)]
    records.append(PairRecord(Item("like it", images[0]), Item(image=images[1])))
    stored = RecordSet.write(tmp_path / "records", records, {})
    pools = mine(stored, tiny_embedder(), tmp_path / "pools", max_similarity=None)
    scores = judge_pools(pools, judge, tmp_path / "scores", shard_size=2)
    for judged in scores:
        (alone,) = judge.score([Group(judged.query, [judged.positive, *judged.candidates])])
        np.testing.assert_allclose([judged.positive_logit, *judged.logits], alone, atol=1e-4)
    rows = select_rows(scores, tmp_path / "rows", num_negatives=4)
    assert len(rows) == 4 and all(len(record.negatives) == 4 for record in rows)
    assert rows.manifest["judge"]["prompt_hash"] == judge.prompt_hash
