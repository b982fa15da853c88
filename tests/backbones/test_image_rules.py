"""Order of image operations, and every way to name an image."""

from __future__ import annotations

import base64
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unime_st.backbones.image_rules import open_image, prepare_image
from unime_st.checkpoints.checks import sample_image
from unime_st.data.images import BadImageError
from unime_st.recipes import ImageRule

PLAIN = ImageRule(exif=False)


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.mode == right.mode == "RGB" and np.array_equal(np.asarray(left), np.asarray(right))


@pytest.fixture
def rotated(tmp_path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    sample_image(80, 40).save(tmp_path / "rotated.png", exif=exif)
    return tmp_path / "rotated.png"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    sample_image(64, 48).save(tmp_path / "a.png")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "CMYK"])
def test_squash_happens_in_the_mode_of_the_file(mode: str) -> None:
    image = sample_image(150, 90).convert(mode)
    assert same(prepare_image(image, PLAIN, 64), image.resize((64, 64)).convert("RGB"))


def test_squashing_a_palette_after_conversion_would_differ() -> None:
    image = sample_image(150, 90).convert("P")
    assert not same(prepare_image(image, PLAIN, 64), image.convert("RGB").resize((64, 64)))


def test_transparency_is_dropped_or_painted_on_white() -> None:
    image = sample_image(40, 40).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((40, 40)))
    assert same(prepare_image(image, PLAIN, None), image.convert("RGB"))
    white = Image.new("RGBA", image.size, "white")
    blended = Image.alpha_composite(white, image).convert("RGB")
    difference = np.asarray(prepare_image(image, ImageRule(alpha="white"), None)).astype(int) - np.asarray(blended)
    assert abs(difference).max() <= 1


def test_exif_is_applied_after_the_squash_or_not_at_all(rotated: Path) -> None:
    with Image.open(rotated) as image:
        square = image.resize((32, 32))
    assert same(prepare_image(str(rotated), ImageRule(), 32), square.transpose(Image.Transpose.ROTATE_270))
    assert same(prepare_image(str(rotated), PLAIN, 32), square)
    assert prepare_image(str(rotated), ImageRule(), None).size == (40, 80)
    kept = prepare_image(str(rotated), PLAIN, None)
    assert kept.size == (80, 40)
    assert not kept.getexif()  # or the next library would turn it


def test_ways_to_name_a_image(server: str, tmp_path: Path) -> None:
    image = sample_image(64, 48)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    code = base64.b64encode(buffer.getvalue()).decode()
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy())
    ways = [image, str(tmp_path / "a.png"), f"{server}/a.png", f"data:image/png;base64,{code}", code, array, tensor]
    for way in [*ways, tensor.permute(2, 0, 1)]:
        assert same(prepare_image(way, PLAIN, None), image)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such/file.png", "image no/such/file.png: cannot be opened .no such file"),
        (np.zeros((4, 4, 3), np.float32), r"image array of shape \(4, 4, 3\) and type float32"),
        (np.zeros((5, 5, 2), np.uint8), "1, 3 or 4 channels"),
    ],
)
def test_bad_images_are_named(source: object, says: str) -> None:
    with pytest.raises(BadImageError, match=says):
        prepare_image(source, PLAIN, None)


def test_damaged_files_and_pages_are_named(server: str, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("not an image")
    for name in ("cut.png", "text.png"):
        with pytest.raises(BadImageError, match=name):
            open_image(str(tmp_path / name))
    with pytest.raises(BadImageError, match=r"missing.png: cannot be opened .the server answered 404"):
        open_image(f"{server}/missing.png")
    with pytest.raises(BadImageError, match=r"cut.png: cannot be decoded"):
        prepare_image(Image.open(tmp_path / "cut.png"), PLAIN, 32)


def test_the_users_image_is_left_alone(rotated: Path) -> None:
    with Image.open(rotated) as image:
        image.load()
        before = image.getexif()[0x0112]
        prepare_image(image, ImageRule(), 32)
        assert (image.size, image.getexif()[0x0112]) == ((80, 40), before)
    rgb = sample_image(10, 10)
    rgb.info["note"] = "kept"
    prepare_image(rgb, PLAIN, None)
    assert rgb.info["note"] == "kept"


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="got bytes"):
        open_image(b"...")
