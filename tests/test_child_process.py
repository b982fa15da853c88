"""Forked child processes: statuses, signals, descriptors and sessions are those of a fresh interpreter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from child_process import Popen, environment, interpreter, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has what the fork server needs"),
]

SHOW = """
import json, os, random, sys
import numpy
heavy = "sentence_transformers" in sys.modules
found = [sys.argv, sys.path[0], os.getcwd(), os.environ.get("UNIME_X"), sys.stdin.read(), os.getppid(), heavy]
print(json.dumps([*found, "unime_st" in sys.modules, random.random(), numpy.random.rand()]))
print("error", file=sys.stderr)
sys.exit(7)
"""
WAIT = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def _programs() -> list[str]:
    return [sys.executable, interpreter()]


def test_surroundings_are_those_that_were_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHOW, "a word"]
    draws = []
    for start in (run, run, subprocess.run):
        done = start(
            command, env=environment(UNIME_X="x"), cwd=tmp_path, input="given", capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (7, "error\n")
        *found, heavy, ours, draw, other = json.loads(done.stdout)
        assert found == [["-c", "a word"], "", str(tmp_path), "x", "given", os.getpid()] and not ours
        assert heavy == (start is run), "not forked"
        draws += [draw, other]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("raise SystemExit('why')", 1),
        ("raise ValueError('why')", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import atexit, os; atexit.register(os._exit, 5)", 5),
    ],
)
def test_statuses(code: str, status: int) -> None:
    for program in _programs():
        done = run([program, "-c", code], env=environment(), capture_output=True, text=True)
        assert done.returncode == status and ("why" in done.stderr) == ("why" in code)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals(number: signal.Signals) -> None:
    for program in _programs():
        with Popen([program, "-c", WAIT], env=environment(), stdout=-1, stderr=-3, start_new_session=True) as process:
            child = psutil.Process(int(process.stdout.readline()))
            if program == sys.executable:
                assert child.pid == process.pid == os.getsid(process.pid)
            process.send_signal(number)
            assert process.wait(300) == -number
        psutil.wait_procs([child], timeout=300)
        assert not child.is_running()


def test_a_program_that_could_tell_the_difference_is_not_forked() -> None:
    code = "import sys; print('torch' in sys.modules)"
    for words, extra in (([], {"HF_HOME": "elsewhere"}), (["-B"], {})):
        done = run([sys.executable, *words, "-c", code], env=environment(**extra), capture_output=True, text=True)
        assert done.stdout == "False\n", done.stderr


def test_coverage_begins_in_the_fork(tmp_path: Path) -> None:
    pytest.importorskip("coverage")
    (tmp_path / "covered.py").write_text("import sys\nif len(sys.argv) > 1:\n    print(1)\n")
    (tmp_path / "rc").write_text(f"[run]\nparallel = true\ndata_file = {tmp_path}/data\ninclude = {tmp_path}/*\n")
    clean = {name: value for name, value in environment().items() if not name.startswith("COV")}
    measured = {**clean, "COVERAGE_PROCESS_START": str(tmp_path / "rc")}
    for words in ([], ["word"]):
        assert run([sys.executable, str(tmp_path / "covered.py"), *words], env=measured).returncode == 0
    command = [sys.executable, "-m", "coverage"]
    subprocess.run([*command, "combine", "--rcfile", tmp_path / "rc"], env=clean, check=True, capture_output=True)
    shown = subprocess.run(
        [*command, "report", "--rcfile", tmp_path / "rc"], env=clean, check=True, capture_output=True, text=True
    )
    assert "100%" in shown.stdout
