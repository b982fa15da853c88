"""`unime convert` of adapters: merged exactly as peft merges them, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText

from unime_st.checkpoints import CheckpointError, convert

Get = Callable[[str], Path]
LAYER = "model.language_model.layers.{}.self_attn.{}"
ROWS = ["a red circle", "b"]


def make_adapter(base: Path, folder: Path, **options: Any) -> tuple[Path, Any]:
    """An adapter with random weights, saved by peft, and the model it is part of."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **options}
    adapted = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(parameter.data.mean().item() if "modules_to_save" in name else 0, 0.2)
    adapted.save_pretrained(folder)
    return folder, adapted


def embed(folder: Path) -> np.ndarray:
    return SentenceTransformer(str(folder), device="cpu").encode(ROWS)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_pattern": {LAYER.format(0, "q_proj"): 64}},
        {"alpha_pattern": {"q_proj": 64}, "target_modules": ["q_proj", "v_proj"]},
        {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}},
        {"rank_pattern": {LAYER.format(1, "q_proj"): 2}, "alpha_pattern": {"layers.1.*": 32}, "use_rslora": True},
        {"bias": "all"},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens"]},
        {"layers_to_transform": [1]},
        {"target_modules": r".*layers\.1.*q_proj"},
        {"target_modules": ["q_proj", "a_name_of_another_model"]},
    ],
    ids=str,
)
def test_merged_as_peft_merges(checkpoint: Get, tmp_path: Path, options: dict[str, Any]) -> None:
    base = checkpoint("qwen2-vl")
    adapter, model = make_adapter(base, tmp_path / "adapter", **options)
    shutil.copytree(base, tmp_path / "merged")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    right = convert(tmp_path / "merged", "unime-v2-2b", output=tmp_path / "right")
    ours = convert(adapter, "unime-v2-2b", base=base, output=tmp_path / "ours")
    assert np.abs(embed(ours) - embed(right)).max() < 1e-6
    plain = convert(base, "unime-v2-2b", output=tmp_path / "plain")
    assert np.abs(embed(ours) - embed(plain)).max() > 1e-2


def change_settings(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop_tensors(folder: Path, part: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if part not in name}, path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda folder: drop_tensors(folder, ".layers.1."),
            r"incomplete: .* 2 modules, and 1 of them .*layers.1.*q_proj",
        ),
        (lambda folder: drop_tensors(folder, "lora_B"), "does not fit .* 2 tensors"),
        (lambda folder: change_settings(folder, target_modules=["q_proj", "v_proj"]), "incomplete: .* first .*v_proj"),
        (
            lambda folder: change_settings(folder, alpha_pattern={"elsewhere": 3}),
            "'elsewhere' in rank_pattern or alpha",
        ),
        (lambda folder: change_settings(folder, r=8), "has tensors of rank 4, adapter_config.json says 8"),
        (lambda folder: change_settings(folder, peft_type="LOHA"), "adapter of type LOHA; only LoRA"),
        (lambda folder: change_settings(folder, trainable_token_indices=[1]), "uses trainable_token_indices"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused(
    checkpoint: Get, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    base = checkpoint("qwen2-vl")
    adapter, _ = make_adapter(base, tmp_path / "adapter")
    damage(adapter)
    with pytest.raises(CheckpointError, match=says):
        convert(adapter, "unime-v2-2b", base=base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_replaced_module_of_another_size_is_refused(checkpoint: Get, tmp_path: Path) -> None:
    base = checkpoint("qwen2-vl")
    adapter, _ = make_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if "embed_tokens" in name)
    save_file({**tensors, name: torch.cat([tensors[name], tensors[name][:3]])}, path)
    with pytest.raises(CheckpointError, match=r"replaces .*embed_tokens.weight by a tensor of shape"):
        convert(adapter, "unime-v2-2b", base=base, output=tmp_path / "out")
