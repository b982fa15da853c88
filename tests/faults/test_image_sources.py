"""Image sources: animations, TIFF, paths, structs and pipes are read or refused by name, and never taken for texts."""

from __future__ import annotations

import base64
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from unime_st import Item, UniME
from unime_st.data import BadImageError, ImageRef
from unime_st.encoding import encode_items

PIXELS = np.random.default_rng(1).integers(0, 255, (56, 84, 3), dtype=np.uint8)
NAMES = ("a.gif", "a.webp", "a.png", "a.tif", "still.gif", "still.webp", "a.bmp", "a.avif", "a.ppm")


@pytest.fixture(scope="module")
def unime() -> UniME:
    return UniME("unime-tiny", device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    image = Image.fromarray(PIXELS).quantize(64).convert("RGB")  # no format loses any of it
    for name in NAMES:
        options: dict[str, Any] = {"quality": 100, "subsampling": "4:4:4"} if name.endswith("avif") else {}
        options |= {"lossless": True} if name.endswith("webp") else {}
        if name in ("a.gif", "a.webp", "a.png"):
            options |= {"save_all": True, "append_images": [Image.new("RGB", image.size, "blue")]}
        image.save(folder / name, **options)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_files_by_path_give_their_first_frame(unime: UniME, folder: Path, name: str):
    expected = unime.encode([Image.open(folder / "a.bmp")])[0]
    atol = 0.05 if name.endswith("avif") else 1e-5
    path = folder / name
    uri = f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    for given in ({"image": str(path)}, {"image": path}, path, {"image": {"bytes": path.read_bytes(), "path": None}}):
        np.testing.assert_allclose(unime.encode([given])[0], expected, atol=atol)
    np.testing.assert_allclose(unime.encode([{"image": uri}])[0], expected, atol=atol)
    np.testing.assert_allclose(unime.encode([Item(image=path)])[0], expected, atol=atol)


@pytest.mark.parametrize("recipe", ["unime-v2", "unime-v1-phi3.5", "llava-1.6"])
def test_files_by_path_in_other_families(converted: Callable[[str], Path], folder: Path, recipe: str):
    model = UniME(converted(recipe), device="cpu")
    for name in ("a.gif", "a.tif", "still.webp"):
        expected = model.encode([Image.open(folder / name)])  # as the image rule of the recipe treats its palette
        np.testing.assert_allclose(model.encode([{"image": str(folder / name)}]), expected, atol=1e-5)


def test_single_path(unime: UniME, folder: Path):
    assert unime.encode(folder / "a.bmp").shape == unime.encode("a").shape


@pytest.mark.parametrize("kind", ["garbage", "truncated", "missing", "directory", "pipe", "data uri"])
def test_unreadable_files_are_named(unime: UniME, folder: Path, tmp_path: Path, kind: str):
    path = tmp_path / f"{kind}.jpg"
    if kind == "garbage":
        path.write_bytes(b"not an image")
    elif kind == "truncated":
        Image.fromarray(PIXELS).resize((600, 400)).save(path)
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    source = "data:image/png;base64,xx" if kind == "data uri" else str(path)
    named = "data:image/png" if kind == "data uri" else path.name
    for model in (unime, SentenceTransformer("unime-tiny", device="cpu")):
        with pytest.raises(BadImageError, match=f"item 1: image .*{named}.*(cannot be|is not)"):
            encode_items(model, ["fine", {"image": source}, {"image": str(folder / "a.png")}])


def test_pipe_as_zip_archive(tmp_path: Path):
    os.mkfifo(tmp_path / "images.zip")
    with pytest.raises(BadImageError, match=r"images\.zip is not a regular file"):
        ImageRef(path=str(tmp_path / "images.zip"), member="a.png").open()


def test_replaced_zip_archive(tmp_path: Path):
    for color in ("red", "blue"):
        Image.new("RGB", (4, 4), color).save(tmp_path / "a.png")
        with zipfile.ZipFile(tmp_path / "new.zip", "w") as archive:
            archive.write(tmp_path / "a.png", "a.png")
        os.replace(tmp_path / "new.zip", tmp_path / "images.zip")
        found = ImageRef(path=str(tmp_path / "images.zip"), member="a.png").open()
        assert found.getpixel((0, 0)) == Image.new("RGB", (1, 1), color).getpixel((0, 0))


@pytest.mark.parametrize("text", ["missing.png", "a photo.JPG", "scan.tif"])
def test_texts_that_end_like_an_image_are_reported(
    unime: UniME, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PIXELS).save("scan.tif")  # exists, but Sentence Transformers does not know the ending
    with caplog.at_level(logging.WARNING):
        unime.encode(["fine", text, "other.png"])
    assert caplog.text.count("ends like an image file but is encoded as a text") == 1 and text in caplog.text
    caplog.clear()
    unime.encode(["fine", {"text": text}, "it ends with png", "two\nlines.png"])
    assert "ends like" not in caplog.text
