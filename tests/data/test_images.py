"""Image references: decoding, orientation, transparency, size limits, corrupt files."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unime_st.data import BadImageError, ImageRef
from unime_st.data.images import png_bytes, resolve_inside, to_rgb


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(image: Image.Image, kind: str = "PNG", **options: object) -> Image.Image:
    result = ImageRef(data=encode(image, kind, **options)).open()
    assert result.mode == "RGB"
    return result


def test_transparency_is_composited_on_white():
    half = opened(Image.new("RGBA", (3, 2), (255, 0, 0, 128))).getpixel((0, 0))
    assert half[0] == 255 and abs(half[1] - 127) <= 1 and half[1] == half[2]
    assert opened(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_and_without_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert np.asarray(opened(palette)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert np.asarray(opened(palette, transparency=0)).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_transparent_color_of_rgb_and_grayscale():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert np.asarray(opened(image, transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [9, 9, 9]]]
    assert opened(Image.new("L", (1, 1), 7), transparency=7).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257 * 128, 128), (65535, 255)])
def test_sixteen_bit_grayscale_is_scaled(value: int, expected: int):
    deep = Image.fromarray(np.full((2, 2), value, dtype=np.uint16))
    assert opened(deep).getpixel((0, 0)) == (expected,) * 3
    assert opened(deep, "TIFF").getpixel((0, 0)) == (expected,) * 3


def test_float_grayscale_is_scaled():
    assert opened(Image.new("F", (1, 1), 0.5), "TIFF").getpixel((0, 0)) == (128, 128, 128)


def test_cmyk_jpeg():
    red, green, blue = opened(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG").getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    upright = opened(image, exif=exif)
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (0, 0, 0)


def test_garbled_exif_does_not_spoil_the_image():
    assert opened(Image.new("RGB", (8, 8), "blue"), "JPEG", exif=b"Exif\0\0garbage").size == (8, 8)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        red, green, blue = opened(frames[0], kind, save_all=True, append_images=frames[1:]).getpixel((0, 0))
        assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (1, 5000)])
def test_odd_sizes(size: tuple[int, int]):
    assert opened(Image.new("RGB", size)).size == size


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60000, 60000), (12000, 12000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused_before_decoding(size: tuple[int, int]):
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadImageError, match="pixels"):
        ImageRef(data=bomb(*size)).open()
    assert limit == Image.MAX_IMAGE_PIXELS


def test_pixel_limit_is_per_call():
    image = ImageRef(data=encode(Image.new("RGB", (20, 20))))
    with pytest.raises(BadImageError, match="20 x 20 is more than 399 pixels"):
        image.open(max_pixels=399)
    assert image.open(max_pixels=400).size == (20, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_file_is_bad(kind: str, tmp_path: Path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path = tmp_path / "cut.bin"
    path.write_bytes(encode(noise, kind)[:-2000])
    assert ImageRef(path=str(path)).size() == (64, 64)
    with pytest.raises(BadImageError, match=r"cut.bin.*truncated"):
        ImageRef(path=str(path)).open()


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0" + b"\0" * 20, b"GIF89a"])
def test_garbage_is_bad(data: bytes):
    for read in (ImageRef(data=data).open, ImageRef(data=data).size):
        with pytest.raises(BadImageError, match=r"cannot be opened|cannot be decoded"):
            read()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_random_damage_never_escapes_as_another_error():
    rng = np.random.default_rng(1)
    whole = {
        kind: encode(Image.effect_noise((24, 24), 50).convert("RGB"), kind)
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP")
    }
    for data in whole.values():
        for _ in range(60):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 4):
                damaged[position] = rng.integers(0, 256)
            with contextlib.suppress(BadImageError):
                assert ImageRef(data=bytes(damaged)).open().mode == "RGB"


def test_missing_file_directory_pipe_and_url(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent.png", tmp_path, tmp_path / "pipe", "https://example.org/a.png", "a\0b"):
        with pytest.raises(BadImageError):
            ImageRef(path=str(path)).open()


def test_member_of_a_zip_archive(tmp_path: Path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as images:
        images.writestr("a/red.png", encode(Image.new("RGB", (3, 5), "red")))
    assert ImageRef(path=str(archive), member="a/red.png").open().size == (3, 5)
    with pytest.raises(BadImageError, match=r"blue.png"):
        ImageRef(path=str(archive), member="blue.png").read()


def test_exactly_one_source():
    for options in ({}, {"path": "a", "data": b""}, {"data": b"", "member": "a"}):
        with pytest.raises(ValueError, match=r"exactly one of path and data|path is missing"):
            ImageRef(**options)


def test_png_bytes_keep_the_pixels():
    noise = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    assert (np.asarray(ImageRef(data=png_bytes(Image.fromarray(noise))).open()) == noise).all()
    assert png_bytes(Image.new("CMYK", (2, 2))) == png_bytes(Image.new("CMYK", (2, 2)))


def test_to_rgb_leaves_its_argument_alone():
    image = Image.new("RGB", (2, 2))
    to_rgb(image).putpixel((0, 0), (1, 1, 1))
    assert image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM"])
def test_opened_images_are_plain_and_their_own(kind: str, orientation: int):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = ImageRef(data=encode(noise, kind, exif=exif))
    with Image.open(io.BytesIO(image.read())) as stored:
        expected = to_rgb(stored)
    first, second = image.open(), image.open()
    assert type(first) is Image.Image and first == expected and first.getexif() == expected.getexif()
    first.putpixel((0, 0), (1, 2, 3))
    assert second == expected and image.open() == pickle.loads(pickle.dumps(second)) == expected


def test_paths_stay_inside_the_root(tmp_path: Path):
    root, outside = tmp_path / "root", tmp_path / "outside.png"
    (root / "a").mkdir(parents=True)
    outside.write_bytes(b"")
    (root / "link.png").symlink_to(outside)
    assert resolve_inside(root, "a/../b.png") == (root / "b.png").resolve()
    assert resolve_inside(root, str(root / "a.png")) == (root / "a.png").resolve()
    for name in ("../outside.png", "a/../../outside.png", str(outside), "link.png", "a\0b"):
        with pytest.raises(BadImageError):
            resolve_inside(root, name)
