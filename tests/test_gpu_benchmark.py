"""GPU benchmark: a rehearsal with tiny shapes on the CPU measures every part; a part that fails does not stop the rest."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_rehearsal_measures_every_part(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse"]
    done = subprocess.run(command, env={**os.environ, "BENCH_RESULTS": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu_rehearsal.json").read_text())["parts"]
    names = "matmul search encode attention judge training memory memory_reranker training_torch_flash"
    assert list(parts) == names.split()
    assert not any("error" in part for part in parts.values())
    figures = {name: part["figures"] for name, part in parts.items()}
    assert figures["encode"]["sdpa: least cosine"] > 0.9999
    assert figures["attention"]["packed, torch_flash, float32: equal"]
    assert figures["attention"]["packed, sdpa, float32: as near as stock"]
    losses = [value for part in parts.values() for key, value in part["figures"].items() if key.endswith(": loss")]
    assert len(losses) == 3 and max(losses) - min(losses) < 1e-3
    assert (
        figures["training"]["no cache: MFU, with vision tower"] > figures["training"]["no cache: MFU, language model"]
    )
    assert figures["search"]["same neighbors"] == 1
    assert all(value > 0 for key, value in figures["judge"].items() if "hours" in key or "MFU" in key)
    assert "| judge | text query, short texts: pairs/s |" in (tmp_path / "gpu_rehearsal.md").read_text()


@pytest.mark.slow
def test_a_part_that_fails_does_not_stop_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("BENCH_RESULTS", str(tmp_path))
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu.harness, "RESULTS", tmp_path)

    def broken(device: object) -> dict[str, object]:
        raise RuntimeError("CUDA out of memory | and more")

    def works(device: object) -> dict[str, object]:
        return {"s": 1.5}

    device = gpu.Gpu(tmp_path, gpu.REHEARSAL, "cpu")
    parts = gpu.measure(device, "run", 100, (broken, works))["parts"]
    assert parts["broken"]["error"] == "RuntimeError: CUDA out of memory | and more" and parts["works"]["figures"]
    table = (tmp_path / "run.md").read_text()
    assert (
        "| broken | error | RuntimeError: CUDA out of memory / and more |" in table and "| works | s | 1.5 |" in table
    )
    late = gpu.measure(device, "run", -1, (works,))["parts"]["works"]
    assert late["error"] == "left out: -1 s were over" and not late["figures"]
