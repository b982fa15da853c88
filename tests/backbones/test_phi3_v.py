"""Our Phi-3.5-Vision against an independent implementation of the published one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phi3_v_reference import crops_of, embed
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from unime_st.backbones.phi3_v import UniMEPhi3VConfig, UniMEPhi3VImageProcessor
from unime_st.checkpoints import convert
from unime_st.checkpoints.checks import sample_image

SIZES = [(56, 56), (200, 60), (60, 200), (113, 111), (300, 290), (500, 40), (33, 90)]


@pytest.fixture(scope="module")
def published(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("phi3.5-v")


@pytest.fixture(scope="module")
def folder(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(published, "unime-v1-phi3.5", output=tmp_path_factory.mktemp("phi") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def reference(published: Path, model: SentenceTransformer, item: dict[str, Any], images: list) -> np.ndarray:
    features = model.preprocess([item])
    ids = features["input_ids"][0].tolist()
    config = json.loads((published / "config.json").read_text())
    return embed(load_file(published / "model.safetensors"), config, ids, images, 4)


@pytest.mark.parametrize("size", SIZES)
def test_images_are_cut_as_published(size: tuple[int, int]) -> None:
    processor = UniMEPhi3VImageProcessor(num_crops=4, crop_size=56)
    made = processor.preprocess([sample_image(*size)])
    crops, rows, columns = crops_of(sample_image(*size), 4, 56)
    assert processor.grid(*size) == (rows, columns)
    assert made["image_sizes"].tolist() == [[rows * 56, columns * 56]]
    assert (made["pixel_values"][0, : len(crops)].double() - crops).abs().max() < 1e-5
    assert (made["pixel_values"][0, len(crops) :] == 0).all()


def test_published_size_and_token_count() -> None:
    processor = UniMEPhi3VImageProcessor(num_crops=16)
    made = processor.preprocess([sample_image(1000, 700)])
    height, width = made["image_sizes"][0].tolist()
    assert (height, width) == (3 * 336, 4 * 336)
    assert made["pixel_values"].shape == (1, 17, 3, 336, 336)
    assert (3 * 4 + 1) * 144 + 1 + (3 + 1) * 12 == 1921  # the published formula


@pytest.mark.parametrize("size", SIZES[:5])
def test_image_rows_equal_the_published_forward(published: Path, model: SentenceTransformer, size: tuple) -> None:
    item = {"image": sample_image(*size), "text": "What is this?"}
    expected = reference(published, model, item, [item["image"]])
    assert np.abs(model.encode(item) - expected).max() < 1e-5


@pytest.mark.parametrize("text", ["a cat", "  spaces and\n lines \n", "Café 東京 🙂"])
def test_text_rows_equal_the_published_forward(published: Path, model: SentenceTransformer, text: str) -> None:
    assert np.abs(model.encode({"text": text}) - reference(published, model, {"text": text}, [])).max() < 1e-5


def test_long_rows_use_the_long_factors(published: Path, model: SentenceTransformer) -> None:
    item = {"text": "a long text " * 60}
    assert model.preprocess([item])["input_ids"].shape[1] > 512
    assert np.abs(model.encode(item) - reference(published, model, item, [])).max() < 1e-5


def test_batches_equal_single_rows(model: SentenceTransformer) -> None:
    rows = [
        "a",
        {"image": sample_image(90, 50)},
        {"image": sample_image(50, 190), "text": "and a longer text"},
        "word " * 9,
    ]
    single = np.stack([model.encode(row) for row in rows])
    assert np.abs(model.encode(rows, batch_size=4) - single).max() < 1e-5


def test_pieces_of_text_are_tokenized_on_their_own(model: SentenceTransformer) -> None:
    ids = model.preprocess([{"image": sample_image(56, 56)}])["input_ids"][0].tolist()
    start = model.tokenizer.bos_token_id
    assert ids[0] == start
    last = max(index for index, token in enumerate(ids) if token < 0)
    assert ids[last + 1] == start


def test_a_image_without_its_place_is_an_error(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="Row 1 of the batch has 0 images and 1 image placeholders"):
        model.preprocess(["fine", {"text": "<|image_1|>"}], processing_kwargs={"chat_template": {"style": "mmeb"}})


def test_unpublished_variants_are_refused(published: Path, tmp_path: Path) -> None:
    content = json.loads((published / "config.json").read_text())
    content["embd_layer"]["projection_cls"] = "linear"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"projection_cls.*linear"):
        UniMEPhi3VConfig.from_published(tmp_path)


def test_default_tower_is_the_published_one() -> None:
    vision = UniMEPhi3VConfig().vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.hidden_act) == (
        1024, 24, 336, "quick_gelu",
    )  # fmt: skip


def test_image_rule_applies(folder: Path) -> None:
    small = SentenceTransformer(str(folder), device="cpu", processor_kwargs={"image_size": 56})
    squashed = Image.new("RGB", (56, 56))
    squashed.paste(sample_image(200, 90).resize((56, 56)))
    native = SentenceTransformer(str(folder), device="cpu")
    assert np.abs(small.encode(sample_image(200, 90)) - native.encode(squashed)).max() < 1e-6
