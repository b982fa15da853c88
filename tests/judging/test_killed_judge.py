"""A thousand pairs through the scripts, the judge killed on the way: real processes, `unime-tiny`."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.programs import Program, run
from unime_st.data import RecordSet
from unime_st.data.scenes import training_records
from unime_st.judging.score_store import Scores

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parents[2] / "train_scripts"
ROWS, CANDIDATES = 100, 10


def _command(script: str, **options: object) -> list[str]:
    return [
        str(SCRIPTS / script),
        *(text for name in options for text in (f"--{name}", str(options[name]))),
    ]


def test_mined_judged_killed_and_resumed(tmp_path: Path) -> None:
    RecordSet.write(tmp_path / "records", training_records(ROWS, seed=3), {})
    mine = _command("mine.py", data=tmp_path / "records", output=tmp_path / "pools", num_candidates=CANDIDATES)
    run([*mine, "--max_similarity", "none", "--pool", "global"], check=True)
    scores = tmp_path / "scores"
    judge = _command("judge.py", data=tmp_path / "pools", scores=scores, output=tmp_path / "rows", template="tiny")
    judge += ["--shard_size", "5", "--batch_size", "128"]
    with Program(judge) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and len(list(scores.glob("rows-*.parquet"))) < 3:
            assert process.poll() is None, "the judge ended before it could be killed"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    kept = {path: path.read_bytes() for path in scores.glob("rows-*.parquet")}
    assert 3 <= len(kept) < ROWS // 5 and not (scores / "manifest.json").exists()

    run(judge, check=True)
    assert all(path.read_bytes() == content for path, content in kept.items())
    pairs = [
        (row["query"], row["positive"], name) for row in Scores(scores).row_shards.rows() for name in row["candidates"]
    ]
    assert len(pairs) == len(set(pairs)) == ROWS * CANDIDATES
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert manifest["rows"] == ROWS and manifest["statistics"]["candidates"] == ROWS * CANDIDATES
    assert sum(manifest["statistics"]["rank_histogram"]) > 0
    assert len(RecordSet.load(tmp_path / "rows")) == ROWS
