"""mteb's own tests of its commands, task lists and evaluation, with the start-up hook on and off: equal outcomes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"
FILES = ("test_cli.py", "test_get_tasks.py", "test_filter_tasks.py", "test_evaluate.py", "test_mock_run.py")


def outcomes(tests: Path, home: Path, hook: str) -> dict[str, str]:
    """Outcome of each of mteb's tests; many need the hub and fail alike without it."""
    line = (PACKAGING / "unime_st.pth").read_text().strip()
    code = f"{line}\nimport pytest, sys\nsys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-rA", "-p", "no:cacheprovider", "-o", "addopts=", "--continue-on-collection-errors"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGING), str(ROOT)]),
        "UNIME_ST_AUTOLOAD": hook,
        "UNIME_HOME": str(home / "home"),
        "MTEB_CACHE": str(home / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *options, *FILES], env=environment, cwd=tests, capture_output=True, text=True
    )
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL) (\S+\.py\S*)", done.stdout, re.MULTILINE)
    return {name: outcome for outcome, name in found}


def test_outcomes_are_equal(pytestconfig: pytest.Config, tmp_path: Path):
    source = pytestconfig.getoption("--mteb-source")
    if not source.is_dir():
        pytest.skip(f"no source distribution of mteb: {source} does not exist")
    found = []
    for hook in ("0", "1"):
        tests = tmp_path / hook / "tests"  # without the package beside them, which would hide the installed one
        shutil.copytree(source / "tests", tests)
        found.append(outcomes(tests, tmp_path / hook, hook))
    assert found[0] == found[1]
    assert sum(outcome == "PASSED" for outcome in found[0].values()) > 20
