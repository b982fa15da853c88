"""Options from YAML and command line."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from unime_st.training.arguments import (
    HardNegativeArguments,
    InBatchArguments,
    RerankerArguments,
    SoftLabelArguments,
    parse,
)
from unime_st.training.offline import ceiling

ROOT = Path(__file__).resolve().parents[2]


def _yaml(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = _yaml(tmp_path, "max_steps: 7\nlearning_rate: 3e-4\nuse_dora: true\n")
    arguments = parse(InBatchArguments, None, [path, "--max_steps", "9"])
    assert (arguments.max_steps, arguments.learning_rate, arguments.use_dora) == (9, 3e-4, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1\n", "did you mean 'learning_rate'"),
        ("- 1\n", "expected `option: value`"),
        ("a: [1\n", "expected"),
        ("precision: fp8\n", "fp32, bf16 or fp16"),
    ],
)
def test_a_bad_file_is_refused_with_a_hint(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        parse(InBatchArguments, None, [_yaml(tmp_path, text)])
    assert message in capsys.readouterr().err


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(InBatchArguments, None, ["absent.yaml"])
    assert "absent.yaml: no such configuration file" in capsys.readouterr().err


def test_frozen_under_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="frozen goes with lora_rank 0"):
        InBatchArguments(frozen="visual")


def test_where_the_result_lies_is_not_part_of_the_plan() -> None:
    first, second = HardNegativeArguments(output="a", workers=2), HardNegativeArguments(output="b")
    assert first.plan() == second.plan() and first.plan() != HardNegativeArguments(num_negatives=4).plan()


def test_options_may_be_none(tmp_path: Path) -> None:
    path = _yaml(tmp_path, "label_temperature:\nmini_batch_size: 4\n")
    arguments = parse(SoftLabelArguments, None, [path])
    assert arguments.label_temperature is None and arguments.mini_batch_size == 4


@pytest.mark.parametrize(("text", "value"), [("positive", "positive"), ("None", None), ("0.5", 0.5)])
def test_ceiling(text: str, value: object) -> None:
    assert ceiling(text) == value


def test_a_strange_ceiling_is_refused() -> None:
    with pytest.raises(ValueError, match="positive, none or a number"):
        ceiling("high")


@pytest.mark.parametrize("option", [{"token_budget": "200"}, {"sub_batch_size": 4}, {"dataset_temperature": 2.0}])
def test_what_the_reranker_would_ignore_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} .* leave it out"):
        RerankerArguments(**option)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "train_scripts").glob("*.py")))
def test_every_script_explains_itself(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train_scripts" / script), run_name="__main__")
    assert end.value.code in (0, None) and "--output" in capsys.readouterr().out


CONFIGS = ROOT / "unime_st" / "configs"


@pytest.mark.parametrize("config", sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")))
def test_every_config_is_read_by_its_script(config: str) -> None:
    """``configs/<script>/<anything>.yaml``, or ``configs/<script>.yaml`` where there is one only."""
    script = ROOT / "train_scripts" / f"{config.removesuffix('.yaml').split('/')[0]}.py"
    source = script.read_text()
    kind = re.search(r"parse\((\w+)", source)[1]
    module = re.search(rf"^from (\S+) import .*\b{kind}\b", source, re.MULTILINE)[1]
    assert parse(getattr(importlib.import_module(module), kind), None, [str(CONFIGS / config)])


@pytest.mark.parametrize("config", sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.yaml")))
def test_every_line_of_a_papers_row_says_where_it_is_from(config: str) -> None:
    lines = (CONFIGS / config).read_text().splitlines()
    if any("[paper]" in line for line in lines if not line.startswith("#")):
        bare = [line for line in lines if line and not line.startswith("#") and "# [" not in line]
        assert [line for line in bare if not line.startswith(("model: unime-tiny", "layout:", "pairs:", " "))] == []
