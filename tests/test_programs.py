"""Programs of tests: forks that end, write and see variables as processes of their own do."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.programs import LIBRARIES, Program, run

pytestmark = pytest.mark.slow


def test_libraries_are_there_before_the_program_runs() -> None:
    found = run(["-c", f"import sys; print(sorted(set({LIBRARIES}) - set(sys.modules)), 'torch' in sys.modules)"])
    assert found.stdout == "[] True\n"


def test_words_folder_variables_and_both_outputs(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv, os.getcwd(), os.environ['SEEN']); sys.exit('told')"
    done = run(["-c", code, "a b"], env={**os.environ, "SEEN": "here"}, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, f"['-c', 'a b'] {tmp_path} here\n", "told\n")
    (tmp_path / "script.py").write_text("import sys, beside\nprint(__name__, sys.argv[1:])\nsys.exit(beside.status)\n")
    (tmp_path / "beside.py").write_text("status = 3\n")
    done = run([str(tmp_path / "script.py"), "x"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "__main__ ['x']\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it_as_the_interpreter(tmp_path: Path, number: signal.Signals) -> None:
    started = tmp_path / "started"
    with Program(["-c", f"import time; open({str(started)!r}, 'w').close(); time.sleep(600)"]) as program:
        while not started.exists():
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.01)
        program.send_signal(number)
    assert program.returncode == -number


def test_a_variable_that_the_libraries_have_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^HF_HOME: start this program with subprocess"):
        Program(["-c", ""], env={**os.environ, "HF_HOME": "elsewhere"})
