"""A judge behind a real server process: the same scores, faults survived, a killed server resumed from."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_embedder import tiny_embedder

from unime_st.data import Item, PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.judging import Group, HttpJudge, LocalJudge, PairError, ServerError
from unime_st.judging.judge_pools import judge_pools
from unime_st.retrieval import mine
from unime_st.training.arguments import JudgeArguments
from unime_st.training.offline import run_judge

Start = Callable[..., tuple[str, subprocess.Popen]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers, which end with the test."""
    running: list[subprocess.Popen] = []

    def begin(*options: str) -> tuple[str, subprocess.Popen]:
        port = tmp_path / f"port-{len(running)}"
        command = [sys.executable, str(Path(__file__).parent / "chat_server.py"), str(port), *options]
        running.append(subprocess.Popen(command))
        while not port.exists():
            assert running[-1].poll() is None, "the server did not start"
            time.sleep(0.1)
        return f"http://127.0.0.1:{port.read_text()}/v1", running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


def groups() -> list[Group]:
    pairs = list(training_records(4, seed=3))
    return [Group(pair.query, [pairs[0].positive, pairs[1].positive, Item("a red square")]) for pair in pairs[:2]]


def difference(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def test_scores_equal_those_of_the_model_itself_and_faults_are_survived(start: Start):
    expected = LocalJudge("unime-tiny", template="tiny", device="cpu").score(groups())
    assert max(np.abs(found).max() for found in expected) > 0.5
    address, process = start()
    assert difference(HttpJudge(address, "unime-tiny", concurrency=3).score(groups()), expected) < 1e-4
    refused = [Group("a", [Item("refuse me"), Item(image=b"no image"), Item("a red square")])]
    errors: list[PairError] = []
    judge = HttpJudge(address, "unime-tiny")
    assert np.isnan(judge.score(refused, errors=errors)[0]).tolist() == [True, True, False]
    assert "bad pair" in errors[0].reason and "image" in errors[1].reason and judge.tries == 2
    with pytest.raises(ValueError, match="group 0, candidate 0: the server refuses the pair"):
        judge.score(refused)
    with pytest.raises(ServerError, match="none of 8 pairs could be judged.*bad pair"):
        judge.score([Group("a", [Item("refuse me")] * 8)], errors=[])
    process.kill()
    process.wait()
    with pytest.raises(ServerError, match="not answered in 2 tries.*finished shards are kept"):
        HttpJudge(address, "unime-tiny", retries=1, pause=0.01).score(groups())


def test_a_run_survives_a_killed_server_and_a_bad_one(start: Start, tmp_path: Path):
    pairs = [PairRecord(Item(f"find number {n}"), Item(f"an image of number {n}"), "plain") for n in range(12)]
    records = RecordSet.write(tmp_path / "records", pairs, {})
    pools = mine(records, tiny_embedder(), tmp_path / "pools", num_candidates=3, max_similarity=None)

    class Watched(HttpJudge):
        """Ends the server after two shards."""

        calls = 0

        def score(self, *args, **kwargs):
            self.calls += 1
            if self.calls == 3:
                process.kill()
                process.wait()
            return super().score(*args, **kwargs)

    address, process = start()
    with pytest.raises(ServerError):
        judge_pools(pools, Watched(address, "unime-tiny", retries=1, pause=0.01), tmp_path / "scores", shard_size=3)
    finished = {path: path.read_bytes() for path in (tmp_path / "scores").glob("rows-*.parquet")}
    assert len(finished) == 2
    address, _ = start("--every", "4", "--faults", "429", "500", "half", "stall")
    judge = HttpJudge(address, "unime-tiny", concurrency=4, pause=0.01, timeout=5.0)
    scores = judge_pools(pools, judge, tmp_path / "scores", shard_size=3)
    assert all(path.read_bytes() == content for path, content in finished.items())
    assert len(scores) == 12 and judge.tries >= 2 * 3 * 4 + 4  # two shards of three rows of four pairs, each fault
    local = LocalJudge("unime-tiny", template="tiny", device="cpu")
    expected = judge_pools(pools, local, tmp_path / "expected", shard_size=3)
    for found, wanted in zip(scores, expected, strict=True):
        assert (found.query, found.positive, found.candidates) == (wanted.query, wanted.positive, wanted.candidates)
        assert abs(found.positive_logit - wanted.positive_logit) < 1e-4
        assert np.allclose(found.logits, wanted.logits, atol=1e-4)


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="url must begin with"):
        HttpJudge("127.0.0.1:8000", "m")
    with pytest.raises(ValueError, match="concurrency"):
        HttpJudge("http://127.0.0.1:8000/v1", "m", concurrency=0)


@pytest.mark.parametrize("option, value", [("template", "tiny"), ("max_text_tokens", 512), ("dtype", "bfloat16")])
def test_options_that_a_server_cannot_be_told_are_refused(option: str, value: object, tmp_path: Path):
    records = RecordSet.write(tmp_path / "records", [PairRecord(Item("a"), Item("b"))], {})
    pools = mine(records, tiny_embedder(), tmp_path / "pools")
    arguments = JudgeArguments(data=str(pools.folder), url="http://127.0.0.1:1/v1", scores=str(tmp_path / "scores"))
    setattr(arguments, option, value)
    with pytest.raises(ValueError, match=f"^{option} {value} has no effect.*leave out {option}"):
        run_judge(arguments)
    assert not (tmp_path / "scores").exists()
