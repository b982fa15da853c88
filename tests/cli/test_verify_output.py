"""`unime verify` prints every check when it has finished, says what a long run takes, and has a quick form."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unime_st.checkpoints import verification, verify
from unime_st.checkpoints.verification import run_checks
from unime_st.cli import main

Get = Callable[[str], Path]


def test_checks_come_one_by_one(converted: Get) -> None:
    checks = run_checks(str(converted("unime-v2-2b")), device="cpu")
    assert next(checks).name == "files"
    assert [check.name for check in checks][:2] == ["template", "padding"], "those without a forward pass first"


def test_quick_takes_small_images_and_leaves_saving_out(converted: Get, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(converted("unime-v2-2b")), "--quick", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("not run")] == [
        "not run  save = load     left out by --quick",
        "not run  demo score      give the authors' image demo.png with --demo-image",
    ]
    assert any("image tokens    16 for 200 x 140" in line for line in lines), "112 pixels are 4 x 4 tokens"


def test_a_long_run_is_announced(
    converted: Get, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(verification, "_ANNOUNCED_SECONDS", 0.0)
    with caplog.at_level(logging.WARNING):
        verify(str(converted("unime-v2-2b")), device="cpu", quick=True)
    assert re.search(r"about [\d.]+ \w+ on cpu: ", caplog.text) and "--quick" in caplog.text


def test_sixteen_bit_weights_are_checked_in_float32_on_a_cpu(checkpoint: Get, tmp_path: Path) -> None:
    from unime_st.checkpoints import convert

    folder = convert(checkpoint("qwen2-vl"), "unime-v2-2b", output=tmp_path / "out", dtype="bfloat16", image_size=56)
    load = verification._Loader(folder, "cpu", False)
    assert next(load(folder).model.parameters()).dtype == torch.float32
    assert all(check.passed for check in verify(str(folder), device="cpu") if check.name != "demo score")
