"""mteb's own tests of its commands and of evaluation, with the start-up hook on and off: equal outcomes."""

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
FILES = ("test_cli.py", "test_evaluate.py")
NEED_THE_HUB = ("test_run_task", "test_mock_run_cli")


def outcomes(source: Path, folder: Path, hook: str) -> dict[str, str]:
    """Outcome of each of mteb's tests, copied to a folder without the package, which would hide the installed one."""
    shutil.copytree(source / "tests", folder / "tests")
    if not (folder / "tests" / "mock_models.py").exists():
        shutil.copy(Path(__file__).with_name("random_embedder.py"), folder / "tests" / "mock_models.py")
    line = (PACKAGING / "unime_st.pth").read_text().strip()
    code = f"{line}\nimport pytest, sys\nsys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-rA", "--show-capture=no", "-p", "no:cacheprovider", "-o", "addopts="]
    deselected = " and ".join(f"not {name}" for name in NEED_THE_HUB)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (folder, PACKAGING, ROOT))),
        "UNIME_ST_AUTOLOAD": hook,
        "UNIME_HOME": str(folder / "home"),
        "MTEB_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *options, "-k", deselected, *FILES],
        env=environment, cwd=folder / "tests", capture_output=True, text=True,
    )  # fmt: skip
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL) (\S+\.py\S*)", done.stdout, re.MULTILINE)
    return {name: outcome for outcome, name in found}


def test_outcomes_are_equal(mteb_source: Path, tmp_path: Path):
    without, with_hook = (outcomes(mteb_source, tmp_path / hook, hook) for hook in "01")
    assert with_hook == without
    passed = [name for name, outcome in without.items() if outcome == "PASSED"]
    assert all(sum(name.startswith(file) for name in passed) > 5 for file in FILES)
