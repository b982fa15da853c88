"""Table of reported faults: every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "benchmarks" / "results" / "faults.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/\S+\.py)(?:::(\w+))?`", TABLE)))


def test_rows_are_complete():
    rows = [line for line in TABLE.partition("## Ctrl-C")[0].splitlines() if line.startswith("| ")]
    assert len(rows) > 60 and all(line.count(" |") == 4 and line.endswith(" |") for line in rows)


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda part: str(part).rpartition("/")[2])
def test_named_test_exists(file: str, name: str):
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") if name else (ROOT / file).is_file()
