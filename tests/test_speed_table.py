"""Speed table of the README: every number is that of a record, and every row names the run that repeats it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPEED = README.split("## Speed\n")[1].split("\n## ")[0]
ROWS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([\d.e+]+) / ([\d.e+]+) \| ([\d.]+) \| `(\w+)` \|$", SPEED, re.MULTILINE)


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_table", ROOT / "benchmarks" / "speed_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_section_is_made_from_the_records(table: ModuleType) -> None:
    assert table.BEGIN + table.section() + table.END in README, "run: python benchmarks/all.py --readme"


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_numbers_of_a_row(table: ModuleType, row: tuple[str, ...]) -> None:
    task, _, baseline, ours, speed_up, run = row
    (entry,) = (entry for entry in table.ROWS if entry.task == task)
    record = json.loads((ROOT / "benchmarks" / "results" / f"{entry.record}.json").read_text(encoding="utf-8"))
    seconds = entry.seconds(record)
    assert [float(baseline), float(ours)] == pytest.approx(seconds, rel=0.005)
    assert float(speed_up) == pytest.approx(seconds[0] / seconds[1], abs=0.05) and entry.run == run
    not_faster = SPEED.split("**Not faster:**")[1]
    assert (" ".join(task.split()) in " ".join(not_faster.split())) == (seconds[1] * table.LIMIT > seconds[0])


@pytest.mark.slow
def test_every_row_can_be_repeated(table: ModuleType) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "all.py"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    runs = dict(re.findall(r"^(\w+) .* python benchmarks/(\w+)\.py", listed, re.MULTILINE))
    assert len(ROWS) == len(table.found()) >= 10
    assert {row.run for row in table.ROWS} <= runs.keys()
    assert all((ROOT / "benchmarks" / f"{script}.py").is_file() for script in runs.values())
