"""`unime-tiny`: size, format, vocabulary and quality of the shipped model, and the way it is made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, AutoProcessor

import unime_st
from train_scripts.tiny.build import SPECIAL_TOKENS
from train_scripts.tiny.make import STAGES, MakeArguments, make
from train_scripts.tiny.package import PRETRAINING, package
from train_scripts.tiny.pretrain import LOG, PretrainArguments, pretrain
from unime_st.data.scenes import FOIL_CATEGORIES, foils
from unime_st.judging import Group, LocalJudge
from unime_st.paths import PACKAGED


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    unime_st.register()
    return SentenceTransformer("unime-tiny", device="cpu")


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file()) <= 6_000_000
    with safe_open(PACKAGED / "model.safetensors", "pt") as weights:
        parameters = sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    assert 1_000_000 <= parameters <= 5_000_000


def test_it_is_a_native_folder() -> None:
    modules = json.loads((PACKAGED / "modules.json").read_text())
    assert [module["type"].rsplit(".", 1)[-1] for module in modules] == ["Transformer", "Pooling", "Normalize"]
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert json.loads((PACKAGED / "1_Pooling" / "config.json").read_text())["pooling_mode"] == "lasttoken"


def test_the_vocabulary_holds_what_judge_and_reranker_say(model: SentenceTransformer) -> None:
    tokenizer = model.tokenizer
    for word in ("Yes", "No", *"0123456789", *SPECIAL_TOKENS):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word
    for text in ("naïve café 漢字 🙂", "person gesturing NO: medium-dark skin tone"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("size", [(84, 84), (72, 72), (1000, 1000), (300, 60), (5, 500), (1, 1)])
def test_an_image_is_few_tokens(model: SentenceTransformer, size: tuple[int, int]) -> None:
    features = model.preprocess([{"image": Image.new("RGB", size, "red"), "text": "a"}])
    image_id = model.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert 4 <= int((features["input_ids"] == image_id).sum()) <= 49


def test_mixed_batches_equal_single_inputs(model: SentenceTransformer) -> None:
    image = foils("swap_att", size=1)[0].image.to_input()["image"]
    inputs = [
        {"text": "a red circle"},
        {"image": image},
        {"image": image, "text": "crop the large blue star."},
        {"text": "a much longer text about an image with a red circle, a blue star and more than that"},
    ]
    together = model.encode(inputs)
    alone = np.concatenate([model.encode([value]) for value in inputs])
    assert np.abs(together - alone).max() < 1e-5
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_the_shipped_weights_see_and_judge() -> None:
    """Far better than chance on the foils that the README says it can tell."""
    judge = LocalJudge("unime-tiny", template="tiny", batch_size=64)
    right: dict[str, float] = {}
    for category in FOIL_CATEGORIES:
        some = foils(category, size=60, seed=11)
        groups = [
            Group({"image": foil.image.to_input()["image"], "text": "find a caption."}, [foil.caption, foil.foil])
            for foil in some
        ]
        right[category] = float(np.mean([true > false for true, false in judge.score(groups)]))
    assert np.mean(list(right.values())) > 0.7, right


@pytest.mark.slow
def test_pretraining_and_packaging_from_scratch(tmp_path: Path) -> None:
    checkpoint = pretrain(PretrainArguments(output=str(tmp_path / "checkpoint"), steps=2, log_every=1))
    lines = [json.loads(line) for line in (checkpoint / "log.jsonl").read_text().splitlines()]
    assert lines[0]["arguments"]["steps"] == 2 and [line["step"] for line in lines[1:]] == [1, 2]
    folder = package(checkpoint, tmp_path / "model")
    assert "train_scripts.tiny" in (folder / "README.md").read_text()
    generator = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}], tokenize=False
    )
    inputs = processor(text=[prompt], return_tensors="pt")
    hidden = generator.model(**inputs).last_hidden_state[:, -1]
    expected = torch.nn.functional.normalize(hidden, dim=-1).detach().numpy()
    assert np.abs(SentenceTransformer(str(folder), device="cpu").encode(["a red circle"]) - expected).max() < 1e-6


@pytest.mark.slow
def test_one_command_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages in order, each from the one before; what is done stays, a stage that was killed is done again."""
    few = ("comparing", "settling", "near_twins")
    monkeypatch.setattr("train_scripts.tiny.make.STAGES", few)
    arguments = MakeArguments(runs=str(tmp_path / "runs"), output=str(tmp_path / "model"), stop_after=1)
    folder = make(arguments)
    entries = [json.loads(line) for line in (folder / PRETRAINING).read_text().splitlines()]
    made = [entry["arguments"] for entry in entries if "arguments" in entry]
    assert [run["curriculum"] for run in made] == ["comparing", "deciding", "near_twins"]
    assert [Path(run["start"]).name for run in made] == ["", *few[:-1]]
    weights = [tmp_path / "runs" / name / "model.safetensors" for name in few]

    def again(ending: str) -> list[bool]:
        """Cut the log of the second stage after its history, and say which stages another start runs."""
        log = weights[1].with_name(LOG)
        history = weights[0].with_name(LOG).read_text()
        log.write_text(history + log.read_text()[len(history) :] if ending == "whole" else history + ending)
        stamps = [path.stat().st_mtime_ns for path in weights]
        make(arguments)
        return [path.stat().st_mtime_ns > stamp for path, stamp in zip(weights, stamps)]

    assert again("whole") == [False, False, False]
    assert again("") == [False, True, True]  # killed before its first line: the history is that of the stage before
    assert again('{"argu') == [False, True, True]


def test_the_log_holds_the_configured_stages() -> None:
    """The shipped weights' log names the commands that the configurations stand for."""
    entries = [json.loads(line) for line in (PACKAGED / PRETRAINING).read_text().splitlines()]
    made = [entry["arguments"] for entry in entries if "arguments" in entry]
    configs = Path(__file__).resolve().parents[2] / "train_scripts" / "tiny" / "configs"
    asked = [PretrainArguments(**yaml.safe_load((configs / f"{name}.yaml").read_text())) for name in STAGES]
    assert made == [vars(one) for one in asked]
