"""`unime export`: exported folders in a process that cannot import this package, refusals, and the cost of drift."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

from unime_st.backbones.image_rules import prepare_image
from unime_st.checkpoints import CheckpointError, convert
from unime_st.checkpoints.card import client_code
from unime_st.checkpoints.checks import sample_image
from unime_st.checkpoints.plain_export import PARITY, export_plain
from unime_st.cli import main
from unime_st.recipes import ImageRule

pytestmark = pytest.mark.slow

Get = Callable[[str], Path]
RULED = ("unime-v2", "unime-v1-llava-ov", "unime-v1-llava1.6", "unime-v2-reranker")
BARE = ("unime-tiny", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-1.6", "llava-onevision", "internvl3", "smolvlm")
SAVED, STYLED = "saved", "styled"
"""A model with an image rule after `save_pretrained`, as training leaves it; one with a variable for its template."""
CLIENTS = (*RULED, SAVED, STYLED)
"""Exports whose client has to prepare images."""

CLIENT = """
import base64, io, json, re, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("unime_st", "mteb_tasks"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import numpy as np, torch
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModel, AutoProcessor

def cosine(a, b):
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

def bare_transformers(folder, item, image):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    variables = settings["processing_kwargs"].get("chat_template", {})
    parts = [{"type": "image", "image": image}] * item["image"]
    parts += [{"type": "text", "text": item["text"]}] if item["text"] else []
    features = processor.apply_chat_template(
        [[{"role": "user", "content": parts}]], tokenize=True, return_dict=True, return_tensors="pt",
        **variables,
    )
    with torch.no_grad():
        return model(**features).last_hidden_state[0, -1].numpy()

found = {}
for folder in map(Path, sys.argv[1:]):
    parity = json.loads((folder / "parity.json").read_text())
    original = Image.open(io.BytesIO(base64.b64decode(parity["image"].split(",")[1])))
    scope = {"prepare": lambda image: image}
    for code in re.findall("```python\\n(.*?)```", (folder / "README.md").read_text(), re.S):
        if "def prepare" in code:
            exec(code, scope)
    image = scope["prepare"](original)
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    reranker = settings["model_type"] == "CrossEncoder"
    kind = CrossEncoder if reranker else SentenceTransformer
    model = kind(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    close = {}
    for index, item in enumerate(parity["items"]):
        value = {"image": image} if item["image"] else {}
        value |= {"text": item["text"]} if item["text"] else {}
        if reranker:
            score = model.predict([(item["query"], value)])[0]
            close[f"{index} {item['kind']}"] = 1 - abs(float(score) - item["expected"][0])
            continue
        vector = model.encode([value], prompt_name=item["prompt_name"])[0]
        close[f"{index} {item['kind']}"] = cosine(vector, item["expected"])
        if item["prompt_name"] is None:
            close[f"{index} {item['kind']}, transformers"] = cosine(
                bare_transformers(folder, item, image), item["expected"]
            )
    stock = [type(part).__module__.split(".")[0] for part in (model[0].auto_model, model.processor, *model)]
    found[folder.name] = {"close": close, "stock": stock}
assert not [name for name in sys.modules if name.split(".")[0] == "unime_st"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(checkpoint: Get, converted: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one export for each name of `BARE` and `CLIENTS`."""
    root = tmp_path_factory.mktemp("exported")
    SentenceTransformer(str(converted("unime-v2")), device="cpu").save_pretrained(str(root / "trained"))
    mmeb = root / "mmeb"
    convert(checkpoint("unime-v1-llava1.6"), "unime-v1-llava1.6", output=mmeb, image_size=84, style="mmeb")
    sources: dict[str, str | Path] = {name: converted(name) for name in (*RULED, *BARE[1:])}
    for name, source in {"unime-tiny": "unime-tiny", SAVED: root / "trained", STYLED: mmeb, **sources}.items():
        export_plain(source, root / name, device="cpu")
    return root


@pytest.fixture(scope="module")
def client(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without this package makes of the exported folders."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    folders = [str(exported / name) for name in (*BARE, *CLIENTS)]
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *folders],
        env={**environment, "UNIME_ST_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", [*BARE, *CLIENTS])
def test_stock_classes_give_the_vectors_of_the_original(client: dict[str, Any], name: str) -> None:
    close = client[name]["close"]
    assert min(close.values()) >= 0.99999, close
    kinds = " ".join(close)
    expected = ("pair",) if name == "unime-v2-reranker" else ("text", "image", "image and text", "transformers")
    assert all(kind in kinds for kind in expected)
    assert set(client[name]["stock"]) <= {"transformers", "sentence_transformers"}


@pytest.mark.parametrize("name", [*BARE, *CLIENTS])
def test_files(exported: Path, name: str) -> None:
    folder = exported / name
    config = json.loads((folder / "config.json").read_text())
    assert not config["model_type"].startswith("unime_") and "image_positions" not in config
    assert not any("UniME" in path.read_text() for path in folder.glob("*.json"))
    assert "requirements" not in json.loads((folder / "config_sentence_transformers.json").read_text())
    parity = json.loads((folder / PARITY).read_text())
    assert parity["image_side"] == (84 if name in CLIENTS else None)
    assert ("def prepare" in (folder / "README.md").read_text()) == (name in CLIENTS)
    assert ("`style='mmeb'`" in (folder / "README.md").read_text()) == (name == STYLED)
    prompts = {item["prompt_name"] for item in parity["items"]} - {None}
    assert bool(prompts) == (name in ("unime-v2", SAVED))


@pytest.mark.parametrize("side", [None, 40])
@pytest.mark.parametrize("alpha", ["drop", "white"])
@pytest.mark.parametrize("exif", [False, True])
def test_the_function_of_the_readme_is_the_image_rule(side: int | None, alpha: Any, exif: bool) -> None:
    rule, scope = ImageRule(exif=exif, alpha=alpha), dict[str, Any]()
    exec(client_code(rule, side), scope)
    turned = sample_image(60, 30)
    turned.getexif()[0x0112] = 6
    turned.info["exif"] = turned.getexif().tobytes()
    transparent = sample_image(30, 50)
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    for image in (turned, transparent, sample_image(50, 20).quantize(16), sample_image(20, 20).convert("L")):
        made, expected = scope["prepare"](image), prepare_image(image, rule, side)
        np.testing.assert_array_equal(np.asarray(made), np.asarray(expected))
        assert made.mode == "RGB" and not made.info


def test_image_positions_are_refused_or_measured(
    converted: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(converted("unime-v2-2b")), "--to", "plain", "--output", str(tmp_path / "out")]
    assert main([*words, "--device", "cpu"]) == 1
    assert "one-dimensional image positions" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--device", "cpu", "--allow-drift"]) == 0
    out = capsys.readouterr().out
    measured = json.loads((tmp_path / "out" / PARITY).read_text())["measured"]
    assert measured["text"] > 0.99999 > measured["image"]
    assert f"cosine {measured['image']:.6f}  image\n" in out
    assert f'Load it: SentenceTransformer("{tmp_path / "out"}")' in out


def test_other_vectors_are_refused_whatever_their_cause(converted: Get, tmp_path: Path) -> None:
    shutil.copytree(converted("unime-v2-2b"), tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    assert config.pop("image_positions") == "1d", "the default of the class, too"
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"other vectors in stock classes: cosine 0\.9\d+, expected at least 0\.99999"
    ):
        export_plain(tmp_path / "in", tmp_path / "out", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_refusals_leave_nothing_behind(converted: Get, checkpoint: Get, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match=r"there exists\. Choose another --output"):
        export_plain("unime-tiny", tmp_path / "there")
    with pytest.raises(CheckpointError, match="transformers has no class for phi3_v"):
        export_plain(converted("unime-v1-phi3.5"), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has no modules\.json"):
        export_plain(checkpoint("qwen2-vl"), tmp_path / "out")
    adapter = tmp_path / "there"
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"there is an adapter\. Merge it first: `unime convert"):
        export_plain(adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
