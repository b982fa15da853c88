"""Items: identity by content, modality, invalid arguments."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
from PIL import Image

from unime_st.data import BadImageError, ImageRef, Item


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def test_equal_content_is_one_item(png: Path, tmp_path: Path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(png.read_bytes())
    forms = [str(png), png, png.read_bytes(), ImageRef(path=str(copy)), bytearray(png.read_bytes())]
    assert len({Item("a", form) for form in forms}) == 1
    assert len(Item("a", png).id) == 32


def test_different_content_is_not(png: Path):
    items = [Item("a"), Item("a "), Item(image=png), Item("a", png), Item("A")]
    assert len({item.id for item in items}) == len(items)


def test_text_cannot_imitate_an_image(png: Path):
    import hashlib

    fake = "a" + (b"image" + hashlib.sha256(png.read_bytes()).digest()).decode("latin-1")
    assert Item(fake).id != Item("a", png).id


def test_pillow_images_are_kept_without_loss():
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    item = Item(image=image)
    assert item == Item(image=image.copy())
    assert item.to_input()["image"].tobytes() == image.tobytes()


def test_pillow_image_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2)).save(buffer, "JPEG", exif=exif)
    assert Item(image=Image.open(buffer)).to_input()["image"].size == (2, 4)


def test_modality_and_input_order(png: Path):
    assert [Item("a").modality, Item(image=png).modality, Item("a", png).modality] == ["text", "image", "image+text"]
    assert list(Item("a", png).to_input()) == ["image", "text"]
    assert Item("\nkeep \n").to_input() == {"text": "\nkeep \n"}
    assert Item("", png) == Item(image=png)


@pytest.mark.parametrize("text", [None, "", " \n\t"])
def test_nothing_is_not_an_item(text: str | None):
    with pytest.raises(ValueError, match="missing or empty"):
        Item(text)


def test_wrong_types_and_broken_unicode():
    with pytest.raises(TypeError, match="text"):
        Item(3)
    with pytest.raises(TypeError, match="image"):
        Item(image=3)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        Item("\ud800")


def test_items_are_frozen_and_travel_to_workers(png: Path):
    item = Item("a", png)
    with pytest.raises(AttributeError):
        item.text = "b"
    assert copy.copy(item) == item and copy.deepcopy(item).to_input()["text"] == "a"
    assert item != "a"


def test_missing_image_is_found_when_read(tmp_path: Path):
    item = Item(image=tmp_path / "absent.png")
    with pytest.raises(BadImageError, match=r"absent.png"):
        _ = item.id
