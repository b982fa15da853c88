"""Image identity: images are equal only if their bytes or pixels are, never because of their path."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.ImageFile import ImageFile

from unime_st import UniME
from unime_st.encoding.content_keys import content_key

FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")
COLORS = ("red", "blue", "green")


def drawing(color: str = "red", size: int = 56) -> Image.Image:
    return Image.new("RGB", (size, size), color)


def replaced(path: Path, kind: str) -> Iterator[ImageFile]:
    """One path whose file is replaced, as a screenshot loop does; each image holds its own file."""
    for color in COLORS:
        drawing(color).save(path.with_suffix(".new"), kind)
        os.replace(path.with_suffix(".new"), path)
        yield Image.open(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_replaced_file_under_one_path(tmp_path: Path, kind: str):
    keys = [content_key(image) for image in replaced(tmp_path / "frame", kind)]
    assert len(set(keys)) == len(COLORS)
    again = [content_key(image) for image in replaced(tmp_path / "frame", kind)]
    assert again == keys


def test_vectors_of_a_replaced_file(tmp_path: Path):
    model = UniME("unime-tiny", device="cpu")
    found = model.encode(list(replaced(tmp_path / "frame.png", "PNG")))
    np.testing.assert_allclose(found, model.encode([drawing(color) for color in COLORS]), atol=1e-5)
    paths = (str(Path(image.filename)) for image in replaced(tmp_path / "frame.png", "PNG"))
    assert len({content_key(path) for path in paths}) == len(COLORS)


def drafted(image: Image.Image) -> Image.Image:
    image.draft("L", (30, 30))
    return image


def frame(image: Image.Image, number: int) -> Image.Image:
    image.seek(number)
    return image


def changed(image: Image.Image) -> Image.Image:
    image.putpixel((0, 0), (1, 2, 3) if image.mode == "RGB" else 1)
    return image


def with_info(image: Image.Image) -> Image.Image:
    image.info["transparency"] = 0
    return image


def loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image


CHANGES: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "draft": ("JPEG", drafted),
    "frame": ("GIF", lambda image: frame(image, 1)),
    "pixel": ("PNG", changed),
    "pixel of an animation": ("GIF", changed),
    "pixel of the second frame": ("GIF", lambda image: changed(frame(image, 1))),
    "transparency": ("PNG", with_info),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_pixels_changes_the_key(tmp_path: Path, name: str):
    kind, change = CHANGES[name]
    options: dict[str, Any] = {"save_all": True, "append_images": [drawing("blue")]} if kind == "GIF" else {}
    drawing().save(tmp_path / "a", kind, **options)
    plain = content_key(Image.open(tmp_path / "a"))
    assert content_key(change(Image.open(tmp_path / "a"))) != plain
    assert content_key(Image.open(tmp_path / "a")) == plain == content_key(Image.open(tmp_path / "a"))


def test_equal_content_from_other_sources(tmp_path: Path):
    drawing().save(tmp_path / "a.png")
    drawing().save(tmp_path / "b.png")
    buffer = io.BytesIO((tmp_path / "a.png").read_bytes())
    assert len({content_key(Image.open(source)) for source in (tmp_path / "a.png", tmp_path / "b.png", buffer)}) == 1
    assert content_key(loaded(Image.open(tmp_path / "a.png"))) == content_key(loaded(Image.open(tmp_path / "b.png")))


def test_reading_the_key_leaves_the_image_as_it_is(tmp_path: Path):
    drawing("green").save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", io.BytesIO((tmp_path / "a.png").read_bytes())):
        image = Image.open(source)
        content_key(image)
        assert image.convert("RGB").getpixel((0, 0)) == (0, 128, 0)


class Unseekable(io.BytesIO):
    """A source that cannot be compared for certain: not a plain buffer."""

    def getvalue(self) -> bytes:
        raise OSError("not supported")


def test_uncertain_images_are_distinct(tmp_path: Path):
    drawing().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content_key(Image.open(Unseekable(content))) != content_key(Image.open(Unseekable(content)))
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    assert content_key(closed) != content_key(closed)
    assert content_key({"image": object()}) != content_key({"image": object()})


def test_texts_are_compared_as_texts(tmp_path: Path):
    drawing().save(tmp_path / "a.png")
    name = str(tmp_path / "a.png")
    assert content_key({"text": name}) != content_key({"image": name}) != content_key(name)
    before = content_key({"text": name}), content_key({"image": name})
    drawing("blue").save(tmp_path / "a.png")
    assert content_key({"text": name}) == before[0] and content_key({"image": name}) != before[1]
    assert content_key("a") == content_key("a") and content_key(True) != content_key(1)
