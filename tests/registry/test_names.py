"""What a model name stands for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModel

import unime_st
from unime_st import Item, UniME
from unime_st.checkpoints import convert
from unime_st.encoding import encode_items
from unime_st.files import folder_lock
from unime_st.paths import AliasError, check_alias, home, local_folder
from unime_st.registry import is_alias, known_aliases, resolve

Get = Callable[[str], Path]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNIME_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def native(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "modules.json").write_text("[]")
    return folder


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNIME_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("UNIME_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert home() == tmp_path / "cache" / "unime"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert home().parts[-3:] == ("Library", "Caches", "unime")


def test_order_of_resolution(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inside_package = resolve("unime-tiny")
    assert inside_package.parts[-2:] == ("models", "unime-tiny")
    in_home = native(models / "unime-tiny")
    assert resolve("unime-tiny") == in_home
    native(tmp_path / "unime-tiny")
    assert resolve("unime-tiny") == Path("unime-tiny")
    own = native(models / "my-model")
    assert resolve("my-model") == own
    assert "my-model" in known_aliases()
    assert resolve(str(own)) == own


def test_what_is_ours(models: Path) -> None:
    native(models / "mine")
    assert [is_alias(name) for name in ("unime-v2", "unime-typo", "mine")] == [True, True, True]
    assert [is_alias(name) for name in ("all-MiniLM-L6-v2", "org/unime-v2", "./unime-v2", "")] == [False] * 4


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", "", "a b", "-x"])
def test_an_alias_stays_in_its_folder(name: str) -> None:
    with pytest.raises(AliasError, match="cannot be an alias"):
        check_alias(name)
    with pytest.raises(AliasError):
        local_folder(name)


def test_errors_name_the_way_out(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        AliasError, match=r"Unknown model 'unime-v3'. Known aliases: .*unime-v2-2b.*`unime convert FOLDER"
    ):
        SentenceTransformer("unime-v3")
    with pytest.raises(
        AliasError, match=r"not on this machine.*`unime pull unime-v2`.*unime convert FOLDER --recipe unime-v2"
    ):
        SentenceTransformer("unime-v2", local_files_only=True)
    with pytest.raises(AliasError, match="No folder 'no/such/thing', and it is not an alias"):
        resolve("no/such/thing")
    (models / "unime-v2-7b").mkdir(parents=True)
    with pytest.raises(AliasError, match=r"no modules.json.. Make it again: `unime pull unime-v2-7b`"):
        resolve("unime-v2-7b")
    folder = native(models / "unime-v2-2b")
    (folder / "model.safetensors").symlink_to(folder / "gone")
    with pytest.raises(AliasError, match=r"weights link to files that are gone .model.safetensors.*--overwrite"):
        CrossEncoder("unime-v2-2b")


def test_aliases_load_in_the_plain_classes(models: Path, checkpoint: Get) -> None:
    for recipe in ("unime-v2-2b", "unime-v2-reranker"):
        convert(checkpoint(recipe), recipe, alias=recipe, image_size=56)
    assert SentenceTransformer("unime-v2-2b", device="cpu").encode(["a"]).shape == (1, 32)
    assert len(CrossEncoder("unime-v2-reranker", device="cpu").rank("a", ["b", "c"])) == 2
    assert type(AutoModel.from_pretrained(local_folder("unime-v2-2b"))).__name__ == "UniMEQwen2VLModel"


def test_other_names_still_go_to_the_hub() -> None:
    with pytest.raises(OSError, match=r"sentence-transformers/no-such-model-of-ours|huggingface"):
        SentenceTransformer("no-such-model-of-ours", local_files_only=True)


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        env={**os.environ, "UNIME_ST_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light_and_idempotent() -> None:
    heavy = "[m for m in ('torch', 'transformers', 'sentence_transformers', 'mteb', 'mteb_tasks', 'PIL') if m in sys.modules]"
    assert python(f"import sys, unime_st; unime_st.register(); print({heavy}, len(sys.meta_path))") == python(
        f"import sys, unime_st; print({heavy}, len(sys.meta_path))"
    )
    assert python(f"import sys, unime_st; print({heavy})") == "[]"


@pytest.mark.slow
def test_auto_classes_are_taught_before_their_first_use(models: Path, checkpoint: Get, tmp_path: Path) -> None:
    folder = convert(checkpoint("qwen2-vl"), "unime-v2-2b", output=tmp_path / "out", image_size=56)
    code = (
        "import unime_st\nfrom transformers import AutoProcessor\n"
        f"print(type(AutoProcessor.from_pretrained({str(folder)!r})).__name__)"
    )
    assert python(code) == "UniMEQwen2VLProcessor"


@pytest.mark.slow
def test_loud_without_the_package_and_fine_after_its_import(models: Path, checkpoint: Get) -> None:
    folder = convert(checkpoint("qwen2-vl"), "unime-v2-2b", alias="unime-v2-2b", image_size=56)
    code = (
        "from sentence_transformers import SentenceTransformer\n"
        f"try: SentenceTransformer({str(folder)!r})\n"
        "except ValueError as error: print(str(error)[:110])\n"
        "import unime_st\n"
        "print(SentenceTransformer('unime-v2-2b', device='cpu').encode('a').shape)"
    )
    failure, shape = python(code, UNIME_HOME=str(models.parent)).split("\n")
    assert "model type `unime_qwen2_vl` but Transformers does not recognize" in failure
    assert shape == "(32,)"


def test_lazy_names() -> None:
    assert unime_st.UniME.__name__ == "UniME"
    assert unime_st.Item.__name__ == "Item"
    assert unime_st.UniMEReranker.__name__ == "UniMEReranker"
    with pytest.raises(AttributeError, match="'nothing'"):
        unime_st.nothing  # noqa: B018


def test_cards_of_trained_models_name_their_origin(models: Path, checkpoint: Get, tmp_path: Path) -> None:
    convert(checkpoint("qwen2-vl"), "unime-v2-2b", alias="unime-v2-2b", image_size=56)
    model = SentenceTransformer("unime-v2-2b", device="cpu")
    model.model_card_data.add_tags("generated_from_trainer")  # as the trainer does
    model.save_pretrained(str(tmp_path / "trained"))
    card = (tmp_path / "trained" / "README.md").read_text()
    assert "base_model: TianchengGu/UniME-V2-Qwen2VL-2B" in card and "license: apache-2.0" in card
    assert "pip install unime-st" in card and "import unime_st\n" in card and "- unime-st\n" in card
    again = SentenceTransformer(str(tmp_path / "trained"), device="cpu")
    assert again.model_card_data.base_model == "TianchengGu/UniME-V2-Qwen2VL-2B"
    assert again.model_card_data.license == "apache-2.0"
    tiny = SentenceTransformer("unime-tiny", device="cpu").model_card_data
    assert (tiny.base_model, tiny.license) == ("unime-tiny", "apache-2.0")


def test_adapters_name_the_alias_as_their_base(models: Path, checkpoint: Get, tmp_path: Path) -> None:
    convert(checkpoint("qwen2-vl"), "unime-v2-2b", alias="unime-v2-2b", image_size=56)
    for alias in ("unime-tiny", "unime-v2-2b"):
        model = SentenceTransformer(alias, device="cpu")
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(str(tmp_path / alias))
        settings = json.loads((tmp_path / alias / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == alias
        again = SentenceTransformer(str(tmp_path / alias), device="cpu")
        assert abs(again.encode("a cat") - model.encode("a cat")).max() < 1e-6
        plain = SentenceTransformer(alias, device="cpu")
        assert abs(again.encode("a cat") - plain.encode("a cat")).max() > 1e-3


def test_two_conversions_at_once_never_replace_each_other(models: Path, checkpoint: Get, tmp_path: Path) -> None:
    source = checkpoint("qwen2-vl")
    held = pytest.raises(OSError, match=rf"unime-v2-2b is in use by process {os.getpid()} on")
    with folder_lock(models / "unime-v2-2b"), held:
        convert(source, "unime-v2-2b", alias="unime-v2-2b")
    convert(source, "unime-v2-2b", alias="unime-v2-2b", image_size=56)
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(source, "unime-v2-2b", alias="unime-v2-2b")
    assert known_aliases().count("unime-v2-2b") == 1 and sorted(os.listdir(models)) == ["unime-v2-2b"]


def test_an_alias_error_has_no_traceback_of_other_libraries(models: Path) -> None:
    with pytest.raises(AliasError) as raised:
        SentenceTransformer("unime-v2-7b", local_files_only=True)
    assert raised.value.__cause__ is None and raised.value.__suppress_context__


@pytest.mark.parametrize("class_", [SentenceTransformer, UniME])
def test_a_length_cuts_rows_of_a_bare_backbone_and_keeps_the_end_of_the_prompt(
    tmp_path: Path, class_: type[SentenceTransformer]
) -> None:
    model = class_("unime-tiny", device="cpu")
    words, image = "word " * 500, Image.new("RGB", (56, 56), "red")
    rows: list[Any] = [words, {"image": image, "text": words}, "a red circle"]
    whole = model.preprocess(rows)["input_ids"]
    tail = model.preprocess(["a"])["input_ids"][0, -2:].tolist()
    assert model.max_seq_length is None and whole.shape[1] > 1000
    before = model.encode(rows)
    model.max_seq_length = 64
    for _ in range(2):
        cut = model.preprocess(rows)
        assert model.max_seq_length == 64 and cut["input_ids"].shape[1] == 64
        assert [row[-2:].tolist() for row in cut["input_ids"][:2]] == [tail, tail]
        after = model.encode(rows)
        assert np.allclose(after[2], before[2], atol=1e-5) and not np.allclose(after[0], before[0], atol=1e-2)
        assert np.allclose(encode_items(model, [Item(words), Item("a red circle")]), after[[0, 2]], atol=1e-5)
        model.save_pretrained(str(tmp_path / "saved"))
        model = class_(str(tmp_path / "saved"), device="cpu")
    model.max_seq_length = None
    assert model.preprocess(rows)["input_ids"].shape == whole.shape


def test_image_tokens_beyond_the_length_are_refused() -> None:
    model = SentenceTransformer("unime-tiny", device="cpu")
    model.max_seq_length = 4
    with pytest.raises(ValueError, match="image"):
        model.encode([{"image": Image.new("RGB", (224, 224), "red"), "text": "a"}])


def test_pairs_are_never_truncated(caplog: pytest.LogCaptureFixture, converted: Get) -> None:
    model = CrossEncoder(str(converted("unime-v2-reranker")), device="cpu")
    limit = model.max_seq_length
    model.max_seq_length = 16
    assert limit is not None and "a pair is never truncated" in caplog.text


def test_a_length_that_has_an_effect_does_not_warn(
    caplog: pytest.LogCaptureFixture, models: Path, checkpoint: Get
) -> None:
    convert(checkpoint("qwen2-vl"), "unime-v2-2b", alias="unime-v2-2b", image_size=56)
    model = SentenceTransformer("unime-v2-2b", device="cpu")
    model.max_seq_length = 16
    assert "no effect" not in caplog.text
    assert model.preprocess(["word " * 100])["input_ids"].shape[1] == 16
