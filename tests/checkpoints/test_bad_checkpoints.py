"""Damaged, incomplete and wrong folders: a clear error with a way out, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_checkpoints import drop_tensor

from unime_st.checkpoints import CheckpointError, convert
from unime_st.checkpoints.source import read_header, read_source

Get = Callable[[str], Path]
WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(checkpoint: Get, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint("qwen2-vl"), tmp_path / "copy")
    return tmp_path / "copy"


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def scramble(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 5000)


def pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def dangling(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "gone")


def partial(folder: Path) -> None:
    (folder / f"{WEIGHTS}.incomplete").write_text("")


def shard_missing(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder / "pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"')


def tensor_missing(folder: Path) -> None:
    drop_tensor(folder, "layers.1.mlp")


def tensor_renamed(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if "mlp.gate" in name)
    tensors[name.replace("gate_proj", "gate_new")] = tensors[name].clone()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (
            cut,
            r"model.safetensors is incomplete or damaged .*not fully covered.*Delete it and download it again",
        ),
        (scramble, "model.safetensors is incomplete or damaged .*header too large.*download it again"),
        (pointer, "git-lfs pointer"),
        (dangling, "links to .*gone, which is gone. Download or convert again"),
        (partial, "half-downloaded .model.safetensors.incomplete is there.. Let the download finish"),
        (shard_missing, "1 of 2 weight files are missing .model-00002-of-00002.safetensors"),
        (pickled, "weights only as pytorch_model.bin.*Save them as safetensors first"),
        (no_config, "no config.json"),
        (broken_config, "config.json: cannot be read .*download it again"),
        (tensor_missing, r"1 are missing \(.*layers.1.mlp.*newer or older layout"),
        (tensor_renamed, "1 are unknown .*gate_new"),
        (other_shape, "have another shape"),
    ],
)
def test_damage_is_named(copy: Path, tmp_path: Path, harm: Callable[[Path], None], says: str) -> None:
    harm(copy)
    with pytest.raises(CheckpointError, match=says):
        convert(copy, "unime-v2-2b", output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_wrong_recipe_names_the_right_ones(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"'qwen2_vl', but recipe 'unime-v2' is for 'llava_onevision'.*: unime-v2-2b, "
    ):
        convert(copy, "unime-v2", output=tmp_path / "out")


def test_foreign_family(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match=r"'bert'.*Families that can be converted: internvl, llava_next"):
        convert(copy, "unime-v2-2b", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("internvl_chat", "publisher's own layout; transformers reads the repositories that end in -hf"),
        ("idefics3", "No recipe is made for this type; use --recipe bare"),
    ],
)
def test_other_layouts_and_families_have_a_way(copy: Path, tmp_path: Path, kind: str, says: str) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match=says):
        convert(copy, "unime-v2-2b", output=tmp_path / "out")


def test_no_folder_and_no_target(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No folder .*missing.*unime pull ALIAS"):
        convert(tmp_path / "missing", "unime-v2-2b", output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"--output.*--alias.*not both"):
        convert(copy, "unime-v2-2b", output=tmp_path / "out", alias="x")
    with pytest.raises(ValueError, match="No recipe 'nothing'"):
        convert(copy, "nothing", output=tmp_path / "out")


def test_tokenizer_and_image_processor_are_needed(copy: Path, tmp_path: Path) -> None:
    (copy / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no image processor. Give a download of Qwen/Qwen2-VL-2B-Instruct"):
        convert(copy, "unime-v2-2b", output=tmp_path / "out")


def test_bare_backbone_without_template(copy: Path, tmp_path: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"no chat template. Give one with --template"):
        convert(copy, "qwen2-vl", output=tmp_path / "out")


def test_adapters(copy: Path, checkpoint: Get, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "org/base",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {"base_model.model.model.other.0.q_proj.lora_A.weight": load_file(copy / WEIGHTS).popitem()[1]}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"is an adapter. Give the folder of org/base with --base"):
        convert(adapter, "unime-v2-2b", output=tmp_path / "out")
    with pytest.raises(CheckpointError, match="was not made for this base: 1 of its 1 tensors"):
        convert(adapter, "unime-v2-2b", output=tmp_path / "out", base=copy)
    with pytest.raises(CheckpointError, match="an adapter itself"):
        convert(adapter, "unime-v2-2b", output=tmp_path / "out", base=adapter)
    with pytest.raises(CheckpointError, match="whole model, so --base makes no sense"):
        convert(copy, "unime-v2-2b", output=tmp_path / "out", base=checkpoint("qwen2-vl"))
    assert not (tmp_path / "out").exists()


def test_image_size_where_there_is_no_rule(checkpoint: Get, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="qwen3_vl has no image rule here"):
        convert(checkpoint("qwen3-vl"), "qwen3-vl", output=tmp_path / "out", image_size=336)


def test_header_reader(checkpoint: Get) -> None:
    folder = checkpoint("qwen2-vl")
    shapes = read_header(folder / WEIGHTS)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in load_file(folder / WEIGHTS).items()}
    assert read_source(folder).tensors == shapes
