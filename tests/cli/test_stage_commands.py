"""Stages on the command line: configurations by name, early refusals, help without torch, a run from file to model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from unime_st.cli import main
from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records
from unime_st.options import OptionError
from unime_st.stages import STAGES
from unime_st.stages.configs import FOLDER, configs, find_config

LIGHT = """
import sys
from unime_st.cli import main
for words in {words!r}:
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    assert status == {status}, (words, status)
assert not {{"torch", "transformers", "sentence_transformers", "mteb"}} & set(sys.modules)
"""


def _light(words: list[list[str]], status: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Commands in a fresh interpreter, which must not import what takes seconds."""
    code = LIGHT.format(words=words, status=status)
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy_and_lists_every_stage(tmp_path: Path) -> None:
    done = _light(
        [["--help"], ["configs"], ["import", "--help"], *([stage, "--help"] for stage in STAGES)], 0, tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "usage: unime import [CONFIG]" in done.stdout and "example: unime import own --source" in done.stdout
    for stage in STAGES:
        assert f"usage: unime {stage} [CONFIG]" in done.stdout and f"example: unime {stage} " in done.stdout
        shown = "import " if stage == "import_data" else stage
        assert f"\n    {shown}" in done.stdout.partition("Stages take")[0]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_what_is_missing_is_refused_before_anything_heavy_is_imported(stage: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    option = {"import_data": "source", "merge": "models"}.get(stage, "data")
    path = "--models a b --output c --eval_data".split() if stage == "merge" else [f"--{option}"]
    commands = [[stage], [stage, *path, "nowhere"], [stage, "--nonsense", "1"], [stage, "absent.yaml"]]
    done = _light(commands, 2, tmp_path)
    assert done.returncode == 0, done.stderr
    missing, nowhere, unknown, absent = done.stderr.strip().splitlines()
    assert missing.startswith(f"unime {stage}: {option} is missing: give the ") and f"(--{option} " in missing
    assert f"{path[-1].removeprefix('--')}: nowhere does not exist." in nowhere
    assert "unknown option 'nonsense'" in unknown and "absent.yaml: no such configuration file" in absent
    if stage != "import_data":
        done = _light([[stage, *path, "empty"]], 2, tmp_path)
        assert "empty has no manifest.json, so no stage wrote it. Make it with `unime " in done.stderr


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "soft_labels/tiny", str(FOLDER / "soft_labels" / "tiny.yaml")])
def test_configurations_are_found_by_name_and_by_path(name: str) -> None:
    assert find_config(name, "soft_labels") == FOLDER / "soft_labels" / "tiny.yaml"


def test_a_path_of_the_former_place_works_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    found = find_config("train_scripts/configs/soft_labels/qwen2-vl-2b.yaml", "soft_labels")
    assert found == FOLDER / "soft_labels" / "qwen2-vl-2b.yaml"
    (record,) = caplog.records
    assert record.getMessage().endswith("write qwen2-vl-2b.")


def test_configurations_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(configs()) and all(len(line.split()) > 3 for line in lines)
    assert len(lines) == len(list(FOLDER.glob("*/*.yaml")))
    assert main(["configs", "show", "soft_labels/qwen2-vl-2b"]) == 0
    assert capsys.readouterr().out == (FOLDER / "soft_labels" / "qwen2-vl-2b.yaml").read_text()
    assert main(["configs", "show", "tiny"]) == 2
    assert "which one of distill/tiny, hard_negatives/tiny" in capsys.readouterr().err


def test_a_name_of_another_stage_is_refused() -> None:
    with pytest.raises(OptionError, match=r"no such configuration file. Packaged: .*tiny"):
        find_config("own", "soft_labels")


@pytest.mark.slow
def test_from_a_file_to_a_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        {"query": f"a thing called {word}", "positive": word} for word in ("red", "blue", "green", "ring", "star")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in [*pairs, {"query": "x"}]))
    records, model = str(tmp_path / "records"), str(tmp_path / "model")
    with caplog.at_level("INFO", logger="unime_st"):
        assert main(["import_data", "own", "--source", str(tmp_path / "pairs.jsonl"), "--output", records]) == 0
        assert f"5 pairs in {records}, 1 rejected" in caplog.text
        words = ["in_batch", "tiny", "--data", records, "--output", model, "--max_steps", "1"]
        words += ["--per_device_train_batch_size", "4", "--mini_batch_size", "none", "--weight-decay=0.1"]
        assert main(words) == 0
        assert f'the trained model is in {model}. Load it: SentenceTransformer("{model}")' in caplog.text
        assert SentenceTransformer(model, device="cpu").encode(["a red ring"]).shape == (1, 128)
        assert main(words) == 0 and "is there already" in caplog.text
    assert json.loads((tmp_path / "model" / "manifest.json").read_text())["options"]["weight_decay"] == 0.1
    capsys.readouterr()
    assert main([*words, "--learning_rate", "1e-5"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("unime in_batch: ") and "learning_rate: 0.004 there, 1e-05 now" in error
    assert len(error.strip().splitlines()) == 1


def test_wrong_values_end_with_status_2_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = str(RecordSet.write(tmp_path / "records", training_records(4), {}).folder)
    capsys.readouterr()
    for words, message in (
        (["--learning_rate", "nan"], "learning_rate: expected a number above 0, found nan"),
        (["--report_to", "nonsense"], "report_to: expected one of all, none"),
        (["--max_steps", "0"], "max_steps: expected -1 or an integer of at least 1, found 0"),
    ):
        assert main(["in_batch", "--data", records, "--output", str(tmp_path / "out"), *words]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
