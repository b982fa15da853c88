"""Images as bytes until the vision tower: the same values as the processor's, the same vectors, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from unime_st import UniME
from unime_st.backbones import visual_outputs
from unime_st.backbones.visual_outputs import PIXELS
from unime_st.encoding import encode_items, engine, image_fast_path
from unime_st.encoding.byte_images import pixel_table, process_as_bytes, takes_bytes, values_of
from unime_st.encoding.fast_paths import remembered
from unime_st.encoding.image_fast_path import ImageFastPath
from unime_st.encoding.model_inputs import same_features

Get = Callable[[str], UniME]
FAMILIES = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "unime-v2-2b"]


def photo(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PHOTOS = [photo(0), photo(1, 300, 200), photo(2, 31, 250), photo(3, 90, 90), photo(4, 700, 500), photo(5)]


@pytest.mark.parametrize("name", [*FAMILIES, "pil"])
def test_values_of_bytes_are_those_of_the_processor(embedder: Get, name: str) -> None:
    processor = Qwen2VLImageProcessorPil() if name == "pil" else embedder(name).processor.image_processor
    table = pixel_table(processor)
    assert table is not None
    stored = process_as_bytes(processor, PHOTOS)
    expected = processor(PHOTOS, return_tensors="pt")
    assert stored[PIXELS].dtype == torch.uint8
    assert torch.equal(values_of(stored[PIXELS], table), expected[PIXELS])
    assert torch.equal(stored["image_grid_thw"], expected["image_grid_thw"])


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_are_those_of_the_values(embedder: Get, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower takes one image at a time here, the middle layers of Qwen3-VL included."""
    model = embedder(name)
    items: list[Any] = [{"image": image, "text": "word " * seed} for seed, image in enumerate(PHOTOS * 4)]
    monkeypatch.setattr(engine, "takes_bytes", lambda _: False)
    expected = encode_items(model, items)
    monkeypatch.undo()
    monkeypatch.setattr(visual_outputs, "_CPU_PATCHES", 1)
    backbone, images = model.transformers_model.base_model, list[int]()
    original = backbone.get_image_features

    def count(pixels: torch.Tensor, grid: torch.Tensor, **options: Any) -> Any:
        images.append(len(grid))
        return original(pixels, grid, **options)

    monkeypatch.setattr(backbone, "get_image_features", count)
    np.testing.assert_allclose(encode_items(model, items), expected, atol=2e-6)
    assert images == [1] * len(items)


def test_parts_have_as_many_whole_images_as_fit() -> None:
    grid = torch.tensor([[1, 30, 30], [1, 2, 2], [1, 4, 4], [1, 31, 33], [1, 2, 2]])
    patches = torch.arange(int(grid.prod(1).sum())).to(torch.uint8)[:, None]
    parts = list(visual_outputs.image_parts(patches, grid))
    assert [len(part) for part, _ in parts] == [920, 1023, 4]
    assert torch.equal(torch.cat([part for part, _ in parts]), patches)
    assert torch.equal(torch.cat([grids for _, grids in parts]), grid)


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3.5-vl"])
def test_images_of_one_grid_share_the_positions_of_the_tower(
    embedder: Get, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = embedder(name)
    base = visual_outputs.backbone_of(model)
    features = model.preprocess([*PHOTOS, *PHOTOS, photo(7, 150, 40)])
    with torch.no_grad():
        expected = base.get_image_features(features[PIXELS], features["image_grid_thw"], return_dict=True)
        monkeypatch.setattr(visual_outputs, "_CPU_PATCHES", 200)
        made: list[int] = []
        original = visual_outputs.get_vision_position_ids
        monkeypatch.setattr(
            visual_outputs, "get_vision_position_ids", lambda *given: made.append(1) or original(*given)
        )
        found = visual_outputs.run_tower(base, features)
    assert 0 < len(made) < 2 * len(PHOTOS) + 1
    for layer, wanted in zip(found, visual_outputs.tower_layers(expected), strict=True):
        for tokens, own in zip(layer, wanted, strict=True):
            torch.testing.assert_close(tokens, own, atol=2e-6, rtol=0)


def test_options_that_change_the_values_of_pixels_are_followed() -> None:
    model = UniME("unime-tiny", device="cpu")
    before = model.encode(PHOTOS * 8)
    model.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    found = model.encode(PHOTOS * 8)
    stock = SentenceTransformer(modules=list(model.children()), device="cpu")
    np.testing.assert_allclose(found, stock.encode(PHOTOS * 8), atol=2e-6)
    assert np.abs(found - before).max() > 1e-3


def test_a_processor_that_changes_values_all_the_same_has_no_table(embedder: Get) -> None:
    processor = embedder("qwen2-vl").processor.image_processor

    class Normalizes:
        patch_size, merge_size = processor.patch_size, processor.merge_size

        def __call__(self, images: object, do_rescale: bool = True, do_normalize: bool = True, **options: Any) -> Any:
            return processor(images, **options)

    assert pixel_table(Normalizes()) is None


def test_a_processor_without_the_options_keeps_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise TypeError("unexpected keyword argument 'do_resize'")

    monkeypatch.setattr(image_fast_path, "pixel_table", refuse)
    model = UniME("unime-tiny", device="cpu")
    path = ImageFastPath(model)
    tokens: Any = path.tokens([(("image",), "")])
    assert path.usable
    assert same_features(path.features(tokens, PHOTOS[:1], as_bytes=True), model.preprocess(PHOTOS[:1]))


def test_pixels_that_are_no_bytes_are_normalized(embedder: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose pixels are not whole values, as after a resize in floats, has the features of the model."""
    model = embedder("qwen2-vl")
    path = remembered(ImageFastPath, model, {"prompt": None})
    tokens = path.tokens([(("image",), "")])
    monkeypatch.setattr(
        image_fast_path, "process_as_bytes", lambda processor, images: {PIXELS: torch.full((24, 1176), 0.5)}
    )
    found = path.features(tokens, PHOTOS[:1], as_bytes=True)  # type: ignore[arg-type]
    assert same_features(found, model.preprocess(PHOTOS[:1]))


def test_models_without_a_tower_take_no_bytes(embedder: Get) -> None:
    assert takes_bytes(embedder("qwen2-vl"))
    static = SentenceTransformer(modules=[StaticEmbedding(embedder("qwen2-vl").tokenizer, embedding_dim=4)])
    assert not takes_bytes(static)
