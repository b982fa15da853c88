"""Shortcuts of the engine: positions, prompts of images and the last layer are those of the model itself."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers.normalizers import Lowercase

from unime_st import Item, UniME
from unime_st.backbones.last_token import only_last_tokens, prepare_last_layer
from unime_st.data.images import BadImageError
from unime_st.encoding import encode_items
from unime_st.encoding.batch_runner import BatchRunner, Job
from unime_st.encoding.engine import Engine
from unime_st.encoding.fast_paths import remembered
from unime_st.encoding.image_fast_path import ImageFastPath, order_and_text
from unime_st.encoding.list_inputs import encode_list
from unime_st.encoding.model_inputs import load_input
from unime_st.encoding.rope_positions import RopePositions

Get = Callable[[str], UniME]
FAST = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "unime-v2-2b"]


def photo(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def stock(model: SentenceTransformer) -> SentenceTransformer:
    """The same modules without our class."""
    return SentenceTransformer(modules=list(model.children()), device="cpu")


MIXED: list[Any] = [
    {"image": photo(0), "text": "a red circle"},
    {"text": "before", "image": photo(1, 40, 150)},
    {"image": [photo(2), photo(3, 150, 60)], "text": "two"},
    "a text " * 12,
    photo(4),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAST)
def test_positions_are_those_of_the_backbone(embedder: Get, name: str, side: str) -> None:
    model = embedder(name)
    before, model.tokenizer.padding_side = model.tokenizer.padding_side, side
    try:
        features = model.preprocess(MIXED)
    finally:
        model.tokenizer.padding_side = before
    names = ("input_ids", "mm_token_type_ids", "attention_mask", "image_grid_thw")
    backbone: Any = model[0].model
    expected = backbone.get_rope_index(**{part: features[part] for part in names})[0]
    positions = RopePositions(model[0])
    for _ in range(2):  # the second time from memory
        assert torch.equal(positions.add(features)["position_ids"], expected)


def test_a_replaced_tokenizer_is_used() -> None:
    """Fast paths are kept for a model, but not beyond its tokenizer."""
    model = UniME("unime-tiny", device="cpu")
    texts = [f"A Red Circle {number}" for number in range(80)]
    before = model.encode(texts)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    model[0].processor.tokenizer = tokenizer  # type: ignore[union-attr]
    found = model.encode(texts)
    np.testing.assert_allclose(found, stock(model).encode(texts), atol=1e-6)
    assert np.abs(found - before).max() > 1e-3


def test_batches_without_images_get_no_positions(embedder: Get) -> None:
    model = embedder("qwen2-vl")
    assert "position_ids" not in RopePositions(model[0]).add(model.preprocess(["a", "b c"]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["qwen2-vl", "llava-onevision", "unime-v1-phi3.5"])
def test_the_last_layer_computes_the_last_tokens_alone(embedder: Get, name: str, packed: bool) -> None:
    model = embedder(name)
    whole: Any = model[0].model
    assert prepare_last_layer(whole) and prepare_last_layer(whole), "twice is once"
    rows: list[int] = []
    hook = (
        whole.get_decoder()
        .layers[-1]
        .mlp.register_forward_hook(lambda module, args, output: rows.append(args[0].numel() // args[0].shape[-1]))
    )
    try:
        found = encode_list(model, MIXED, packed=packed).numpy()
        assert sum(rows) == len(MIXED)
        expected = stock(model).encode(MIXED, batch_size=2)
        assert sum(rows) > 10 * len(MIXED), "outside of the engine all tokens are computed"
    finally:
        hook.remove()
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_no_token_is_left_out_without_a_context() -> None:
    model = UniME("unime-tiny", device="cpu")
    assert prepare_last_layer(model[0].model)
    features = model.preprocess(["a red circle", "b"])
    everything = model(dict(features))["token_embeddings"]
    with only_last_tokens(features["attention_mask"]):
        last = model(dict(features))["token_embeddings"]
    torch.testing.assert_close(last[:, -1], everything[:, -1])
    assert not torch.allclose(last[0, 0], everything[0, 0])
    assert torch.equal(model(dict(features))["token_embeddings"], everything)


@pytest.mark.parametrize("name", [*FAST, "unime-v2", "unime-v1-phi3.5"])
def test_images_skip_the_chat_template(embedder: Get, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processor and template allow it; the vectors are those of the model everywhere."""
    model = embedder(name)
    items: list[Any] = [
        {"image": photo(seed, 60 + 9 * (seed % 5)), "text": "word " * (seed % 7)} for seed in range(30)
    ]
    items += [{"text": f"about {seed}", "image": photo(seed)} for seed in range(5)]
    items += [Item("an item", image=photo(40)), Item(image=photo(41)), photo(42), {"image": photo(43), "text": ""}]
    items += [{"image": photo(44), "text": "special <|im_end|> token"}, {"image": [photo(45)], "text": "a list"}]
    assert remembered(ImageFastPath, model, {"prompt": "find: "}).usable == (name in FAST)
    prompts: list[int] = []
    original = ImageFastPath.features
    monkeypatch.setattr(
        ImageFastPath,
        "features",
        lambda self, rows, images, **how: prompts.append(len(rows)) or original(self, rows, images, **how),
    )
    found = encode_items(model, items, prompt="find: ")
    assert sum(prompts) == (39 if name in FAST else 0)
    plain = [item.to_input() if isinstance(item, Item) else item for item in items]
    slow = np.concatenate([stock(model).encode(plain[b : b + 8], prompt="find: ") for b in range(0, len(plain), 8)])
    np.testing.assert_allclose(found, slow, atol=2e-5)


@pytest.mark.parametrize("name", FAST)
def test_images_of_every_mode_and_shape_have_the_features_of_the_model(embedder: Get, name: str) -> None:
    """The image rule of the recipe applies, too."""
    model, noise = embedder(name), np.random.default_rng(0)
    path = remembered(ImageFastPath, model, {"prompt": None})
    assert path.usable
    shapes = [("RGB", 1, 1), ("RGB", 900, 5), ("RGB", 5, 900), ("RGB", 1900, 1300), ("RGB", 5000, 30), ("L", 70, 90)]
    shapes += [("RGBA", 70, 90), ("LA", 70, 90), ("CMYK", 70, 90)]
    for mode, width, height in shapes:
        image = Image.frombytes(mode, (width, height), noise.bytes(width * height * len(mode)))
        for value in (image, image.convert("P") if mode == "RGB" else image):
            loaded: Any = load_input(value)
            found = path.features(path.tokens([(("image",), ""), (("image", "text"), "a b")]), [loaded, loaded])
            expected = model.preprocess([value, {"image": value, "text": "a b"}])
            assert found.keys() == expected.keys()
            for part, tensor in expected.items():
                assert torch.equal(found[part], tensor) if torch.is_tensor(tensor) else found[part] == tensor, mode


def test_own_options_for_images_go_the_long_way() -> None:
    model = UniME("unime-tiny", device="cpu", processor_kwargs={})
    assert remembered(ImageFastPath, model, {"prompt": None}).usable
    first: Any = model[0]
    first.processing_kwargs = {**(first.processing_kwargs or {}), "image": {"do_rescale": False}}
    assert not remembered(ImageFastPath, model, {"prompt": None}).usable


def test_prompts_are_probed_once_per_model_and_prompt() -> None:
    model = UniME("unime-tiny", device="cpu")
    first = remembered(ImageFastPath, model, {"prompt": None})
    assert remembered(ImageFastPath, model, {"prompt": None}) is first
    assert remembered(ImageFastPath, model, {"prompt": "find: "}) is not first
    model.max_seq_length = 40
    limited = remembered(ImageFastPath, model, {"prompt": None})
    assert limited is not first and not limited.fits(40) and limited.fits(39)


def test_what_is_one_image() -> None:
    image = photo(0)
    assert order_and_text({"image": image, "text": "a"}) == (("image", "text"), "a")
    assert order_and_text({"text": "a", "image": image}) == (("text", "image"), "a")
    assert order_and_text(Item("a", image=image)) == (("image", "text"), "a")
    assert order_and_text(image) == (("image",), "")
    for other in (
        "a text",
        Item("a"),
        {"text": "a"},
        {"image": [image, image]},
        {"image": None, "text": "a"},
        [image],
    ):
        assert order_and_text(other) is None


def test_an_unreadable_image_among_many_is_named() -> None:
    items = [Item(f"text {seed}", image=photo(seed)) for seed in range(20)]
    items[7] = Item("broken", image=b"\x89PNG\r\n\x1a\n" + bytes(40))
    model = UniME("unime-tiny", device="cpu")
    with pytest.raises(BadImageError, match="item 7"):
        encode_items(model, items)
    vectors, good = encode_items(model, items, on_error="skip")
    assert (
        np.flatnonzero(~good).tolist() == [7]
        and np.isnan(vectors[7]).all()
        and not np.isnan(np.delete(vectors, 7, 0)).any()
    )


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_inputs_need_no_threads(count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = UniME("unime-tiny", device="cpu")
    inputs: list[Any] = ["a red circle", photo(0), {"image": photo(1), "text": "b"}, "a red circle"][:count]
    expected = stock(model).encode(inputs)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", None)
        np.testing.assert_allclose(model.encode(inputs), expected, atol=2e-6)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(BadImageError, match="item 0"):
        model.encode([{"image": str(tmp_path / "bad.png")}, "a"])


SHORT = [f"a {shade} circle number {number}" for number in range(16) for shade in ("red", "blue")]


@pytest.mark.parametrize(
    ("texts", "batch_size", "at_once"),
    [
        (SHORT, 32, True),
        (SHORT, 16, False),  # more than a batch
        (SHORT[:2], 1, False),
        ([*SHORT[:31], SHORT[0]], 32, False),  # one of them need not be encoded twice
        ([*SHORT[:31], 20 * SHORT[0]], 32, False),  # a batch of padding
        ([*SHORT[:31], "no such circle.png"], 32, False),  # the engine warns of it
        ([*SHORT[:31], Item("a green one")], 32, False),
    ],
    ids=["at once", "batch size", "one by one", "repeated", "uneven", "like a path", "other inputs"],
)
def test_short_texts_are_one_batch(
    texts: list[Any], batch_size: int, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runs = UniME("unime-tiny", device="cpu"), []
    expected = [model.encode([text])[0] for text in texts]
    run = Engine.run
    monkeypatch.setattr(Engine, "run", lambda self, *given, **options: runs.append(run(self, *given, **options)))
    np.testing.assert_allclose(model.encode(texts, batch_size=batch_size), expected, atol=2e-6)
    assert (not runs) == at_once


def test_a_short_text_that_fails_is_named() -> None:
    with pytest.raises(ValueError, match="item 5"):
        UniME("unime-tiny", device="cpu").encode([*SHORT[:5], "a \ud800 circle", *SHORT[6:]])


@pytest.mark.parametrize(("count", "in_threads"), [(20, False), (200, True)])
def test_few_small_images_pass_in_the_calling_thread(
    count: int, in_threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On all cores: threads of one core each would cost more than they save."""
    model, seen, before = UniME("unime-tiny", device="cpu"), set(), torch.get_num_threads()
    images = [{"image": photo(seed).resize((56, 56)), "text": f"number {seed}"} for seed in range(count)]
    expected = [model.encode([image])[0] for image in images[:20]]
    encode = BatchRunner.encode

    def noted(self: BatchRunner, jobs: list[Job]) -> list[torch.Tensor | None]:
        seen.add(threading.current_thread() is threading.main_thread())
        return encode(self, jobs)

    monkeypatch.setattr(BatchRunner, "encode", noted)
    torch.set_num_threads(2)
    try:
        np.testing.assert_allclose(model.encode(images)[:20], expected, atol=2e-6)
        assert seen == {not in_threads} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_encode_runs_every_module_in_evaluation_mode() -> None:
    model = UniME("unime-tiny", device="cpu").eval()
    expected = model.encode(["a red circle"])
    inner: Any = model[0]
    inner.model.get_decoder().layers[0].train()
    np.testing.assert_array_equal(model.encode(["a red circle"]), expected)
    assert not any(module.training for module in model.modules())
