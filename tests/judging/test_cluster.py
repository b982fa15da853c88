"""Embedding and judging on a real Ray cluster of two workers, one of them killed: what one process gives."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from unime_st.data import RecordSet
from unime_st.data.scenes import training_records
from unime_st.judging.score_store import Scores
from unime_st.retrieval import Pools
from unime_st.stages import JudgeArguments, MineArguments, run_judge, run_mine

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray")  # in the extra [dev]; absent only where Ray has no wheel


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=3, include_dashboard=False, logging_level="ERROR", object_store_memory=10**8)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RecordSet:
    return RecordSet.write(tmp_path_factory.mktemp("cluster") / "records", list(training_records(60)), {})


def _actors(kind: str) -> list[psutil.Process]:
    """Processes in which actors of a class run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if line.startswith("ray::") and kind in line:
            found.append(process)
    return found


def _kill_one_when(folder: Path, pattern: str, killed: list[int]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not killed:
        if list(folder.glob(pattern)) and (actors := _actors("Judges")):
            os.kill(actors[0].pid, signal.SIGKILL)
            killed.append(actors[0].pid)
        time.sleep(0.02)


def test_a_cluster_gives_what_one_process_gives(records: RecordSet, tmp_path: Path) -> None:
    mined = {}
    for engine in ("local", "ray"):
        out = str(tmp_path / f"pools-{engine}")
        arguments = MineArguments(data=str(records.folder), output=out, num_candidates=8, max_similarity="none")
        arguments.engine = engine
        mined[engine] = Pools(run_mine(arguments))
    for left, right in zip(mined["local"], mined["ray"], strict=True):
        assert (left.query, left.candidates) == (right.query, right.candidates)
        assert left.similarities == pytest.approx(right.similarities, abs=1e-5)

    judged = {}
    for engine in ("local", "ray"):
        scores = tmp_path / f"scores-{engine}"
        arguments = JudgeArguments(
            data=str(mined["local"].folder),
            model="unime-tiny",
            template="tiny",
            scores=str(scores),
            output=str(tmp_path / f"rows-{engine}"),
            shard_size=2,
            num_negatives=3,
            engine=engine,
        )
        killed: list[int] = []
        watcher = threading.Thread(target=_kill_one_when, args=(scores, "rows-*.parquet", killed), daemon=True)
        if engine == "ray":
            watcher.start()
        run_judge(arguments)
        assert engine == "local" or killed, "no actor was there to be killed"
        judged[engine] = Scores(scores)
    assert len(judged["local"]) == len(judged["ray"]) == 60
    for left, right in zip(judged["local"], judged["ray"], strict=True):
        assert (left.query, left.positive, left.candidates) == (right.query, right.positive, right.candidates)
        assert [left.positive_logit, *left.logits] == pytest.approx([right.positive_logit, *right.logits], abs=1e-4)


def test_ray_deals_out_everything_itself(records: RecordSet, tmp_path: Path) -> None:
    pools = run_mine(MineArguments(data=str(records.folder), output=str(tmp_path / "pools"), max_similarity="none"))
    with pytest.raises(ValueError, match="leave out shard"):
        run_judge(JudgeArguments(data=str(pools), output=str(tmp_path / "rows"), engine="ray", shard="0/2"))
    with pytest.raises(ValueError, match="engine: expected one of local, ray, found spark"):
        MineArguments(engine="spark")
