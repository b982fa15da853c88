"""What a judge costs and how good it is, a cascade of two, and the work cut in parts."""

from __future__ import annotations

import logging
import multiprocessing
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_reranker as tiny
from word_judge import WordJudge

from unime_st.data import Item, RecordSet, StageConflictError
from unime_st.data.scenes import training_records
from unime_st.judging import CascadeJudge, Group, LocalJudge, PairError
from unime_st.judging.calibration import LEAST_AUC, LOW_AUC_ADVICE, calibrate, report
from unime_st.judging.estimate import estimate_judging
from unime_st.judging.judge_pools import judge_part, judge_pools
from unime_st.judging.score_store import Scores
from unime_st.model import UniME
from unime_st.retrieval import Pools, mine
from unime_st.stages import JudgeArguments, run_judge


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Pools:
    folder = tmp_path_factory.mktemp("scenes")
    records = RecordSet.write(folder / "records", training_records(24, seed=5), {})
    return mine(records, UniME("unime-tiny", device="cpu"), folder / "pools", num_candidates=4, max_similarity=None)


@pytest.fixture(scope="module")
def judge() -> LocalJudge:
    return LocalJudge("unime-tiny", template="tiny", device="cpu")


def test_cost(pools: Pools, judge: LocalJudge):
    cost = estimate_judging(pools, judge, sample=24, seconds=float("inf"))
    pairs = len(pools) + pools.manifest["candidates"]
    assert cost.pairs == cost.sample == pairs and cost.hours > 0 and cost.disk_mb > 0
    lengths = judge.scorer.count_tokens([(pool.query, [pool.positive, *pool.candidates]) for pool in pools])
    assert (cost.tokens, cost.tokens_unshared) == pytest.approx(lengths) and lengths[0] < lengths[1]
    decoder = judge.model[0].model.model.language_model
    weights = sum(p.numel() for name, p in decoder.named_parameters() if "embed_tokens" not in name)
    assert cost.flops == pytest.approx(2 * weights * cost.tokens)
    assert re.search(r"about [\d.]+ \w+ here", str(cost))
    assert cost.to_dict()["pairs"] == pairs
    other = estimate_judging(pools, WordJudge(), sample=4)
    assert other.tokens is None and other.flops is None and "tokens" not in str(other)


def test_a_judge_that_does_not_answer_is_refused_before_it_is_paid(pools: Pools, tmp_path: Path):
    random = LocalJudge(tiny.checkpoint(tmp_path), device="cpu")
    for judge in (random, CascadeJudge(random, WordJudge())):
        with pytest.raises(ValueError, match=r"less than 1% .*thinks or explains first"):
            estimate_judging(pools, judge, sample=4)


def test_calibration(pools: Pools, judge: LocalJudge):
    found = calibrate([judge, WordJudge()], pools, 24)
    good, words = found["judges"]["unime-tiny"], found["judges"]["words"]
    assert found["sample"]["positive"] == 24 and found["sample"]["hard"] > 0 and found["sample"]["random"] > 0
    assert good["auc_random"] > 0.8 and 0 <= good["ece"] <= 1 and good["set_aside"] == 0
    assert set(found["agreement"]["unime-tiny / words"]) == {"rank_correlation", "same_decision"}
    assert calibrate([judge, judge], pools, 8)["agreement"]["unime-tiny / unime-tiny (2)"][
        "rank_correlation"
    ] == pytest.approx(1.0)
    assert "| unime-tiny | " in report(found) and words["auc"] is not None


class BlindJudge(WordJudge):
    """Scores that say nothing about images, and a little too much about texts."""

    name = "blind"

    def score(self, groups: Sequence[Group], *, errors: list[PairError] | None = None) -> list[np.ndarray]:
        return [np.array([float(c.image is None) for c in group.candidates], np.float32) for group in groups]


def test_a_judge_below_the_least_auc_is_warned_of(pools: Pools, judge: LocalJudge):
    found = calibrate([BlindJudge()], pools, 24)
    by_pairs = found["judges"]["blind"]["auc_hard_by_pairs"]
    assert by_pairs["text -> image"] == 0.5 and len(by_pairs) > 2
    options = re.findall(r"--(\w+)", LOW_AUC_ADVICE)
    assert options and set(options) <= set(JudgeArguments.__dataclass_fields__)
    text = report(found)
    assert f"WARNING: blind: AUC 0.50 on mined candidates, text -> image. {LOW_AUC_ADVICE}" in text
    assert text.count("WARNING") == sum(value is not None and value < LEAST_AUC for value in by_pairs.values())
    good = calibrate([judge], pools, 24)["judges"]["unime-tiny"]["auc_hard_by_pairs"]
    assert good.keys() == by_pairs.keys() and max(value for value in good.values() if value is not None) > 0.7


@pytest.mark.slow
def test_each_pair_order_is_measured(pools: Pools, judge: LocalJudge):
    groups = [Group(pool.query, [pool.positive, *pool.candidates]) for pool in pools]
    turned = [Group(candidate, [group.query]) for group in groups for candidate in group.candidates]
    first, second = np.concatenate(judge.score(groups)), np.concatenate(judge.score(turned))
    assert np.abs(first - second).max() > 0.1
    for order, expected in (("query_first", first), ("candidate_first", second), ("both", (first + second) / 2)):
        np.testing.assert_allclose(np.concatenate(judge.in_order(order).score(groups)), expected, atol=2e-5)
    hashes = {judge.in_order(order).prompt_hash for order in ("query_first", "candidate_first", "both")}
    assert len(hashes) == 3 and judge.prompt_hash in hashes
    found = calibrate([judge, WordJudge()], pools, 24)
    assert list(found["pair_orders"]) == ["unime-tiny"]
    rows = found["pair_orders"]["unime-tiny"]
    assert rows["all"]["query_first"] == found["judges"]["unime-tiny"]["auc"] and len(rows) > 2
    orders = ("query_first", "candidate_first", "both")
    assert all(row[row["best"]] == max(row[name] for name in orders) for row in rows.values() if row["best"])
    assert f"unime-tiny: take --pair_order {rows['all']['best']}" in report(found)
    other = calibrate([judge.in_order("candidate_first")], pools, 24)
    assert other["judges"]["unime-tiny"]["auc"] == pytest.approx(rows["all"]["candidate_first"], abs=1e-6)


def test_the_pair_order_is_part_of_the_cost_and_of_the_scores(pools: Pools, judge: LocalJudge, tmp_path: Path):
    groups = [Group(pool.query, [pool.positive, *pool.candidates]) for pool in pools]
    one, other, both = (
        judge.in_order(order).count_tokens(groups) for order in ("query_first", "candidate_first", "both")
    )
    assert both == (one[0] + other[0], one[1] + other[1]) and other[0] <= other[1]
    common = {"data": str(pools.folder), "scores": str(tmp_path / "scores"), "output": str(tmp_path / "rows")}
    run_judge(JudgeArguments(**common, pair_order="both", num_negatives=1, stride=1))
    found = {(pool.query, pool.positive): pool.positive_logit for pool in Scores(tmp_path / "scores")}
    for group, scores in zip(groups, judge.in_order("both").score(groups), strict=True):
        assert found[group.query, group.candidates[0]] == pytest.approx(scores[0], abs=2e-5)
    with pytest.raises(StageConflictError, match="judge"):
        run_judge(JudgeArguments(**common, num_negatives=1, stride=1))
    with pytest.raises(ValueError, match="pair_order"):
        JudgeArguments(**common, pair_order="reversed")
    with pytest.raises(ValueError, match="pair_order must be one of query_first, candidate_first, both"):
        LocalJudge("unime-tiny", pair_order="reversed")
    errors: list[PairError] = []
    broken = [Group("a", [Item(image=b"no image"), "b"])]
    assert np.isnan(judge.in_order("both").score(broken, errors=errors)[0]).tolist() == [True, False]
    assert [(error.group, error.candidate) for error in errors] == [(0, 0)]


def test_dry_run_and_calibration_leave_no_trace(pools: Pools, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "unime_st")
    common = {"data": str(pools.folder), "template": "tiny", "scores": str(tmp_path / "scores")}
    run_judge(JudgeArguments(**common, dry_run=True))
    run_judge(JudgeArguments(**common, calibrate=8))
    assert re.search(r"about [\d.]+ \w+ here", caplog.text)
    assert "auc_hard" in caplog.text and not (tmp_path / "scores").exists()


def test_cascade(judge: LocalJudge, pools: Pools):
    strong = WordJudge()
    groups = [Group(pool.query, [pool.positive, *pool.candidates]) for pool in pools]
    cheap, expected = judge.score(groups), strong.score(groups)
    cascade = CascadeJudge(judge, strong, band=(-1.5, 1.5))
    found = cascade.score(groups)
    inside = [np.abs(scores) <= 1.5 for scores in cheap]
    assert 0 < sum(map(np.sum, inside)) < cascade.asked and cascade.passed_on == sum(map(np.sum, inside))
    for got, low, high, where in zip(found, cheap, expected, inside):
        assert np.array_equal(got[where], high[where]) and np.allclose(got[~where], low[~where], atol=1e-4)
    assert cascade.prompt_hash != CascadeJudge(judge, strong).prompt_hash
    errors: list[PairError] = []
    broken = [Group("a", [Item(image=b"no image"), "b"])]
    assert np.isnan(cascade.score(broken, errors=errors)[0]).tolist() == [True, False]
    assert [(error.group, error.candidate) for error in errors] == [(0, 0)]
    with pytest.raises(ValueError, match="low < high"):
        CascadeJudge(judge, strong, band=(1.0, 1.0))


def work(folder: Path, output: Path, part: int) -> None:
    judge_part(folder, WordJudge(), output, (part, 2), shard_size=3)


def test_two_processes_share_the_shards(pools: Pools, tmp_path: Path):
    output = tmp_path / "scores"
    assert judge_part(pools, WordJudge(), output, (1, 3), shard_size=3) is None
    assert 0 < len(list(output.glob("rows-*.parquet"))) < 8
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(pools.folder, output, part)) for part in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    scores = Scores(output)
    assert len(scores) == len(pools) and not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.glob("*.lock"))
    whole = judge_pools(pools, WordJudge(), tmp_path / "whole", shard_size=3)
    assert [pool.logits for pool in scores] == [pool.logits for pool in whole]
    with pytest.raises(ValueError, match="0 <= i < n"):
        judge_part(pools, WordJudge(), output, (2, 2))
    with pytest.raises(ValueError, match="the other parts"):
        judge_part(pools, WordJudge(), output, (0, 2), overwrite=True)


def test_a_shard_of_another_judge_is_refused(pools: Pools, tmp_path: Path):
    output = tmp_path / "scores"
    assert judge_part(pools, WordJudge(), output, (0, 2), shard_size=3) is None
    path = output / "rows-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"judge": '{"name": "other"}'}), path)
    with pytest.raises(StageConflictError, match=r"rows-00000.parquet holds scores of .*other"):
        judge_pools(pools, WordJudge(), output, shard_size=3)


def test_long_texts_are_cut_where_asked(judge: LocalJudge, caplog: pytest.LogCaptureFixture):
    short = LocalJudge("unime-tiny", template="tiny", device="cpu", max_text_tokens=5)
    long = "a big red square on the left " * 2000
    scores = short.score([Group("a red square", [long, "a big red"])])[0]
    assert np.isfinite(scores).all() and short.shortened == 1 and "1 texts truncated to 5 tokens" in caplog.text
    assert short.prompt_hash != judge.prompt_hash
    tokenizer = judge.model.tokenizer
    ends = tokenizer(long, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert abs(judge.score([Group("a red square", [long[: ends[4][1]]])])[0][0] - scores[0]) < 1e-4
