"""What `unime convert` writes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from tiny_checkpoints import FAMILIES
from transformers import AutoModelForImageTextToText

from unime_st.checkpoints import CheckpointError, convert
from unime_st.checkpoints.checks import sample_image
from unime_st.checkpoints.native_folder import link_file

Get = Callable[[str], Path]
ROWS: list[Any] = [
    "a cat",
    {"image": sample_image(), "text": "What?"},
    {"image": sample_image(60, 90)},
    {"text": "word " * 9},
]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_bare_backbones_pool_the_last_token(checkpoint: Get, converted: Get, tmp_path: Path, name: str) -> None:
    model = SentenceTransformer(str(converted(name)), device="cpu")
    assert model[1].pooling_mode == "lasttoken"
    assert model.processor.tokenizer.padding_side == "left"
    together = model.encode(ROWS, batch_size=len(ROWS))
    alone = np.stack([model.encode(row) for row in ROWS])
    linear = name == "qwen3.5-vl"  # its linear attention sums in chunks, which padding moves
    assert np.abs(together - alone).max() < (3e-5 if linear else 1e-5)
    assert np.abs(np.linalg.norm(together, axis=1) - 1).max() < 1e-5
    assert np.abs(together @ together.T - np.eye(len(ROWS))).max() > 1e-3
    rendered = model.tokenizer.decode(model.preprocess(["a cat"])["input_ids"][0])
    assert rendered.rstrip("\n").endswith("assistant") or "<|assistant|>" in rendered[-16:], "generation prompt"


def test_any_image_text_to_text_model(checkpoint: Get, converted: Get, tmp_path: Path) -> None:
    folder = convert(checkpoint("qwen2.5-vl"), "bare", output=tmp_path / "out")
    vectors = [SentenceTransformer(str(path), device="cpu").encode(ROWS) for path in (folder, converted("qwen2.5-vl"))]
    np.testing.assert_allclose(*vectors, atol=1e-6)


@pytest.mark.parametrize("name", ["unime-v2", "unime-v2-2b", "unime-v1-phi3.5", "unime-v2-reranker", "qwen2.5-vl"])
def test_folder(checkpoint: Get, converted: Get, name: str) -> None:
    folder = converted(name)
    modules = json.loads((folder / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    family = {"unime-v2": "llava-onevision", "unime-v2-2b": "qwen2-vl", "unime-v1-phi3.5": "phi3.5-v"}
    source = checkpoint(family.get(name, "qwen2.5-vl"))
    assert (folder / "model.safetensors").samefile(source / "model.safetensors"), "weights are linked"
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    assert model_type.startswith("unime_") == name.startswith("unime-")
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert ("unime-st" in settings.get("requirements", {})) == name.startswith("unime-")
    card = (folder / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert ("arXiv" in card) == name.startswith("unime-")
    assert "auto_map" not in (folder / "config.json").read_text()
    assert json.loads((folder / "unime.json").read_text())["recipe"] == name


def test_image_size_at_convert_time_and_at_load(checkpoint: Get, tmp_path: Path) -> None:
    def tokens(folder: Path, **load: Any) -> int:
        model = SentenceTransformer(str(folder), device="cpu", processor_kwargs=load or None)
        ids = model.preprocess([{"image": sample_image(200, 120), "text": "x"}])["input_ids"]
        return int((ids == model.processor.image_token_id).sum())

    small = convert(checkpoint("qwen2-vl"), "unime-v2-2b", output=tmp_path / "small", image_size=84)
    kept = convert(checkpoint("qwen2-vl"), "unime-v2-2b", output=tmp_path / "kept", image_size="native")
    official = convert(checkpoint("qwen2-vl"), "unime-v2-2b", output=tmp_path / "official")
    assert tokens(small) == 9
    assert tokens(kept) == tokens(small, image_size="native") != 9
    assert tokens(official, image_size=84) == 9
    # This checkpoint's image processor allows 140 x 140 pixels, which both official sizes exceed.
    assert tokens(official) == tokens(official, image_size="training") == 25
    with pytest.raises(ValueError, match="Image size 'big'"):
        tokens(small, image_size="big")


def test_dtype(checkpoint: Get, tmp_path: Path) -> None:
    for dtype, expected in ((None, torch.float32), ("official", torch.bfloat16), ("float16", torch.float16)):
        folder = convert(checkpoint("qwen2-vl"), "unime-v2-2b", output=tmp_path / str(dtype), dtype=dtype)
        assert SentenceTransformer(str(folder), device="cpu").dtype == expected
    with pytest.raises(ValueError, match="dtype 'int8': use 'official'"):
        convert(checkpoint("qwen2-vl"), "unime-v2-2b", output=tmp_path / "bad", dtype="int8")
    assert not (tmp_path / "bad").exists()


def test_style_is_stored(checkpoint: Get, tmp_path: Path) -> None:
    folder = convert(checkpoint("llava-1.6"), "unime-v1-llava1.6", output=tmp_path / "mmeb", style="mmeb")
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.tokenizer.decode(model.preprocess(["raw text\n"])["input_ids"][0]) == "<s>raw text\n"
    with pytest.raises(ValueError, match="'unime-v2-2b' has no style 'mmeb'"):
        convert(checkpoint("qwen2-vl"), "unime-v2-2b", output=tmp_path / "none", style="mmeb")


def test_own_template(checkpoint: Get, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}!"
    )
    folder = convert(checkpoint("qwen2.5-vl"), "qwen2.5-vl", output=tmp_path / "out", template=tmp_path / "mine.jinja")
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.tokenizer.decode(model.preprocess(["hello"])["input_ids"][0]) == "hello!"


def test_released_layout_without_processor(checkpoint: Get, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint("phi3.5-v") / name, weights)
    with pytest.raises(
        CheckpointError, match=r"no tokenizer. Give a download of microsoft/Phi-3.5.* with --processor"
    ):
        convert(weights, "unime-v1-phi3.5", output=tmp_path / "out")
    folder = convert(weights, "unime-v1-phi3.5", output=tmp_path / "out", processor=checkpoint("phi3.5-v"))
    assert SentenceTransformer(str(folder), device="cpu").encode("a").shape == (32,)


ADAPTED = [("qwen2-vl", "unime-v2-2b"), ("llava-onevision", "unime-v2"), ("llava-1.6", "unime-v1-llava1.6")]


def _adapter(base: Path, where: Path, *, dora: bool) -> Path:
    """An adapter with random weights, and beside it the same model merged by peft."""
    torch.manual_seed(1)
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    settings = LoraConfig(r=4, lora_alpha=16, use_dora=dora, init_lora_weights=False, target_modules=targets)
    adapted = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), settings)
    if dora:
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(1.5)
    adapted.save_pretrained(where / "adapter")
    shutil.copytree(base, where / "merged")
    adapted.merge_and_unload().save_pretrained(where / "merged")
    return where


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("family", "recipe"), ADAPTED)
def test_adapter_and_base(checkpoint: Get, tmp_path: Path, family: str, recipe: str, dora: bool) -> None:
    made = _adapter(checkpoint(family), tmp_path, dora=dora)
    sources = [("adapter", checkpoint(family)), ("merged", None)]
    vectors = []
    for name, base in sources:
        folder = convert(made / name, recipe, output=tmp_path / f"{name}-out", base=base, image_size=84)
        vectors.append(SentenceTransformer(str(folder), device="cpu").encode(ROWS))
    plain = SentenceTransformer(
        str(convert(checkpoint(family), recipe, output=tmp_path / "plain", image_size=84)), device="cpu"
    )
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-5
    assert np.abs(vectors[0] - plain.encode(ROWS)).max() > 1e-2


def test_adapter_trained_in_sentence_transformers(converted: Get, checkpoint: Get, tmp_path: Path) -> None:
    model = SentenceTransformer(str(converted("unime-v2")), device="cpu")
    targets = r".*language_model.*\.(q_proj|k_proj)"
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
    expected = model.encode(ROWS)
    model.save_pretrained(str(tmp_path / "trained"))
    out = convert(
        tmp_path / "trained", "unime-v2", output=tmp_path / "out", base=checkpoint("llava-onevision"), image_size=84
    )
    assert np.abs(SentenceTransformer(str(out), device="cpu").encode(ROWS) - expected).max() < 1e-5


def test_links_or_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_text("weights")
    assert link_file(source, tmp_path / "hard") == "hard link"

    def refuse(*args: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert link_file(source, tmp_path / "soft") == "symbolic link"
    monkeypatch.setattr(os, "symlink", refuse)
    assert link_file(source, tmp_path / "copy") == "copy"
    assert {(tmp_path / name).read_text() for name in ("hard", "soft", "copy")} == {"weights"}


def test_an_existing_folder_is_kept_or_replaced_whole(checkpoint: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(checkpoint("qwen2-vl"), "unime-v2-2b", output=out)
    (out / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(checkpoint("qwen2-vl"), "unime-v2-2b", output=out)
    with pytest.raises(CheckpointError):
        convert(checkpoint("qwen2-vl"), "unime-v2", output=out, overwrite=True)
    assert (out / "mine.txt").exists()
    convert(checkpoint("qwen2-vl"), "unime-v2-2b", output=out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing half-written is left"


def test_a_converted_folder_can_be_converted_again(converted: Get, tmp_path: Path) -> None:
    first = SentenceTransformer(str(converted("unime-v2-2b")), device="cpu")
    first.save_pretrained(str(tmp_path / "saved"))
    again = convert(tmp_path / "saved", "unime-v2-2b", output=tmp_path / "again", image_size=84)
    assert np.abs(SentenceTransformer(str(again), device="cpu").encode(ROWS) - first.encode(ROWS)).max() < 1e-6


def test_a_tokenizer_without_a_limit_gets_that_of_the_model(checkpoint: Get, tmp_path: Path) -> None:
    name = "unime-v1-llava1.6"
    source = tmp_path / "source"
    shutil.copytree(checkpoint(name), source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["model_max_length"] = int(1e30)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    model = SentenceTransformer(str(convert(source, name, output=tmp_path / "converted")), device="cpu")
    assert model.max_seq_length == model[0].config.get_text_config().max_position_embeddings
