"""Stage manifests: plan, resume, conflict, overwrite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unime_st.data.manifest import (
    StageConflictError,
    begin_stage,
    fingerprint_inputs,
    finish_stage,
    is_complete,
    read_manifest,
    write_manifest,
)


def test_write_and_read(tmp_path: Path):
    write_manifest(tmp_path / "new", {"rows": 3})
    assert is_complete(tmp_path / "new")
    assert read_manifest(tmp_path / "new") == {"schema_version": 1, "rows": 3}
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["manifest.json"]


def test_nan_is_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_manifest(tmp_path, {"mean": float("nan")})
    assert not is_complete(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema_version": 99}'])
def test_damaged_or_newer_manifest(tmp_path: Path, content: str):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json"):
        read_manifest(tmp_path)


def test_missing_manifest_says_why(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="not a stage folder"):
        read_manifest(tmp_path)
    begin_stage(tmp_path, "mine", inputs=[], options={})
    with pytest.raises(FileNotFoundError, match="not finished"):
        read_manifest(tmp_path)


def test_same_plan_continues_then_skips(tmp_path: Path):
    source = tmp_path / "in.txt"
    source.write_text("a")
    plan = {"inputs": [source], "options": {"k": (1, 2), "name": None}}
    out = tmp_path / "out"
    assert begin_stage(out, "mine", **plan)
    (out / "shard").write_text("kept")
    assert begin_stage(out, "mine", **plan)
    assert (out / "shard").read_text() == "kept"
    (out / "half.tmp").write_text("")
    finish_stage(out, {"rows": 1})
    assert not begin_stage(out, "mine", **plan)
    assert read_manifest(out)["options"] == {"k": [1, 2], "name": None}
    assert not (out / "half.tmp").exists() and not (out / "stage.json").exists()


def test_other_plan_is_refused_with_the_difference(tmp_path: Path):
    source, out = tmp_path / "in.txt", tmp_path / "out"
    source.write_text("a")
    begin_stage(out, "mine", inputs=[source], options={"k": 1})
    for finished in (False, True):
        if finished:
            finish_stage(out, {})
        with pytest.raises(StageConflictError, match=r"k: 1 there, 2 now.*--overwrite"):
            begin_stage(out, "mine", inputs=[source], options={"k": 2})
        with pytest.raises(StageConflictError, match="stage: 'mine' there, 'judge' now"):
            begin_stage(out, "judge", inputs=[source], options={"k": 1})
        source.write_text("b")
        with pytest.raises(StageConflictError, match="input data"):
            begin_stage(out, "mine", inputs=[source], options={"k": 1})
        source.write_text("a")


def test_overwrite_starts_afresh(tmp_path: Path):
    begin_stage(tmp_path, "mine", inputs=[], options={"k": 1})
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "x").write_text("")
    finish_stage(tmp_path, {})
    assert begin_stage(tmp_path, "judge", inputs=[], options={}, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["stage.json"]


def test_strangers_folders_are_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"not a stage folder|not empty"):
            begin_stage(tmp_path, "mine", inputs=[], options={}, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").exists()


def test_fingerprint_follows_content(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    before = fingerprint_inputs(tmp_path / "a")
    assert before == fingerprint_inputs(str(tmp_path / "a"))
    (tmp_path / "a" / "x").write_text("2")
    assert fingerprint_inputs(tmp_path / "a") != before
    with pytest.raises(FileNotFoundError):
        fingerprint_inputs(tmp_path / "absent")


def test_damaged_plan_says_what_to_do(tmp_path: Path):
    (tmp_path / "stage.json").write_text("{")
    with pytest.raises(ValueError, match="remove the folder"):
        begin_stage(tmp_path, "mine", inputs=[], options={})


def test_plan_is_readable(tmp_path: Path):
    begin_stage(tmp_path, "mine", inputs=[], options={"k": 1})
    assert json.loads((tmp_path / "stage.json").read_text())["stage"] == "mine"
