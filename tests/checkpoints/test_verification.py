"""`unime verify` is green on good folders and finds what is wrong with bad ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny_checkpoints import FAMILY_OF

from unime_st.checkpoints import verify
from unime_st.checkpoints.checks import sample_image
from unime_st.checkpoints.verification import line
from unime_st.paths import AliasError

Get = Callable[[str], Path]
NAMES = [
    "files",
    "template",
    "padding",
    "truncation",
    "positions",
    "pooling",
    "image tokens",
    "batch = single",
    "save = load",
]


def outcome(folder: Path) -> dict[str, bool | None]:
    return {check.name: check.passed for check in verify(str(folder))}


@pytest.fixture
def copy(converted: Get, tmp_path: Path) -> Path:
    shutil.copytree(converted("unime-v2-2b"), tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("name", [*FAMILY_OF, "qwen2.5-vl", "qwen3-vl", "internvl3", "smolvlm"])
def test_green(converted: Get, name: str) -> None:
    checks = {check.name: check for check in verify(str(converted(name)))}
    assert [name for name, check in checks.items() if check.passed is False] == [], "\n".join(
        map(line, checks.values())
    )
    assert list(checks)[:9] == NAMES
    assert all(checks[name].passed for name in NAMES)


def test_embedded_default_is_all_green() -> None:
    checks = verify("unime-tiny")
    assert all(check.passed for check in checks), "\n".join(map(line, checks))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_finds_mean_pooling(copy: Path) -> None:
    edit(copy / "1_Pooling" / "config.json", pooling_mode="mean")
    assert outcome(copy)["pooling"] is False


def test_finds_right_padding(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", padding_side="right")
    assert outcome(copy)["padding"] is False


def test_finds_another_template(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text(
        (copy / "chat_template.jinja").read_text().replace("<|image_pad|>'", "<|image_pad|>\\n'")
    )
    assert outcome(copy)["template"] is False


def test_finds_other_positions(copy: Path) -> None:
    edit(copy / "config.json", image_positions="3d")
    found = outcome(copy)
    assert found["positions"] is False
    assert found["batch = single"] is True


def test_finds_a_lost_prompt(checkpoint: Get, tmp_path: Path) -> None:
    """What plain Sentence Transformers makes of a vision-language model with a prompt after the text."""
    transformer = Transformer(str(checkpoint("llava-onevision")), unpad_inputs=False)
    transformer.processing_kwargs = {"chat_template": {"add_generation_prompt": True}}
    transformer.tokenizer.padding_side = transformer.tokenizer.init_kwargs["padding_side"] = "left"
    model = SentenceTransformer(modules=[transformer, Pooling(32, "lasttoken"), Normalize()], device="cpu")
    model.save_pretrained(str(tmp_path / "naive"))
    checks = {check.name: check for check in verify(str(tmp_path / "naive"))}
    assert checks["truncation"].passed is False
    assert "tokens were lost" in checks["truncation"].detail


def test_finds_foreign_modules_and_damage(copy: Path) -> None:
    modules = json.loads((copy / "modules.json").read_text())
    modules[0]["type"] = "somebody.else.Module"
    (copy / "modules.json").write_text(json.dumps(modules))
    checks = verify(str(copy))
    assert [(check.name, check.passed) for check in checks] == [("files", False)]
    assert "somebody.else" in checks[0].detail
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").write_bytes(content[:-4])
    assert "incomplete or damaged" in verify(str(copy))[0].detail


def test_demo_score(converted: Get, tmp_path: Path) -> None:
    sample_image(300, 200).save(tmp_path / "demo.png")
    without = {check.name: check for check in verify(str(converted("unime-v2-2b")))}["demo score"]
    assert without.passed is None
    assert "--demo-image" in without.detail
    with_image = {c.name: c for c in verify(str(converted("unime-v2-2b")), demo_image=tmp_path / "demo.png")}[
        "demo score"
    ]
    assert with_image.passed is False, "random weights do not reproduce it"
    assert "published 0.6211" in with_image.detail


def test_unknown_name() -> None:
    with pytest.raises(AliasError, match="Unknown model 'unime-nothing'"):
        verify("unime-nothing")
