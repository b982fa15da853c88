"""Techniques page: its effects and its table of vector formats are those of the record."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "techniques.md").read_text(encoding="utf-8")
RECORD = json.loads((ROOT / "benchmarks" / "results" / "techniques.json").read_text(encoding="utf-8"))
ARMS: dict[str, dict[str, Any]] = {row["arm"]: row for row in RECORD["arms"]}
EFFECTS = re.findall(r"([+-]\d+\.\d) ± (\d+\.\d) \(`(\w+)`\)", PAGE)
FORMATS = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("gain", "error", "arm"), EFFECTS, ids=[arm for *_, arm in EFFECTS])
def test_effects(gain: str, error: str, arm: str) -> None:
    assert f"{100 * ARMS[arm]['gain']:+.1f}" == gain and f"{100 * ARMS[arm]['error']:.1f}" == error


@pytest.mark.parametrize("row", FORMATS, ids=[row[0] for row in FORMATS])
def test_vector_formats(row: tuple[str, str, str, str]) -> None:
    name, *hits = row
    arms = ("in_batch", "short_vectors", "quantized")
    assert hits == [f"{100 * ARMS[f'{arm}, {name}']['hit@1']:.1f}" for arm in arms]


@pytest.mark.parametrize(("arm", "words"), [("v2", "and {} from it"), ("fusion_fitted", "fitted fusion) is {} from")])
def test_differences_from_equal_compute(arm: str, words: str) -> None:
    means = [{name: statistics.fmean(found[name].values()) for name in found} for found in RECORD["by_seed"]]
    gains = [100 * (found[arm] - found["in_batch_compute"]) for found in means]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    assert words.format(f"{statistics.fmean(gains):+.1f} ± {error:.1f}") in " ".join(PAGE.split())


def test_every_arm_is_on_the_page() -> None:
    arms = {arm for arm in ARMS if "," not in arm} - {"in_batch"}
    assert {arm for *_, arm in EFFECTS} == arms and len(FORMATS) == 6
