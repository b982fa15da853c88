"""Array images: numpy and torch images of every dtype, layout and range are right or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unime_st import UniME
from unime_st.data import BadImageError
from unime_st.data.image_arrays import image_from_array

RGB = np.asarray(Image.linear_gradient("L").resize((64, 48)).convert("RGB"))
GRAY = RGB[:, :, 0]
RIGHT: dict[str, Any] = {
    "uint8": RGB,
    "channels first": np.moveaxis(RGB, 2, 0),
    "not contiguous": np.asfortranarray(RGB),
    "read-only": np.frombuffer(RGB.tobytes(), dtype=np.uint8).reshape(RGB.shape),
    "uint16": RGB.astype(np.uint16) * 257,
    "int64": RGB.astype(np.int64),
    "float64 in [0, 1]": RGB / 255.0,
    "float32 in [0, 1]": (RGB / 255.0).astype(np.float32),
    "float16 in [0, 1]": (RGB / 255.0).astype(np.float16),
    "float32 in [0, 255]": RGB.astype(np.float32),
    "gray": GRAY,
    "one channel": GRAY[:, :, None],
    "one channel first": GRAY[None],
    "opaque RGBA": np.dstack([RGB, np.full(GRAY.shape, 255, dtype=np.uint8)]),
    "tensor": torch.tensor(RGB),
    "tensor, channels first": torch.tensor(RGB).permute(2, 0, 1),
    "float tensor": torch.tensor(RGB / 255.0).permute(2, 0, 1),
    "bfloat16 tensor": torch.tensor(RGB / 255.0).bfloat16(),
    "tensor with gradient": torch.tensor(RGB / 255.0, requires_grad=True),
    "Pillow I;16": Image.fromarray(GRAY.astype(np.uint16) * 257),
    "Pillow I": Image.fromarray(GRAY.astype(np.int32) * 257),
    "Pillow F": Image.fromarray((GRAY / 255.0).astype(np.float32)),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "normalized": (RGB / 127.5 - 1, "values lie in"),
    "standardized": ((RGB - RGB.mean()) / RGB.std(), "values lie in"),
    "fractions above 1": (RGB * 0.37, "values lie in"),
    "above 255": (RGB.astype(np.int32) * 4, "values lie in"),
    "negative integers": (RGB.astype(np.int16) - 128, "values lie in"),
    "8 bits in uint16": (RGB.astype(np.uint16), "no value exceeds 255"),
    "NaN": (np.full((8, 8, 3), np.nan), "not finite"),
    "infinite": (np.full((8, 8, 3), np.inf), "not finite"),
    "complex": (RGB.astype(np.complex64), "dtype is not one of pixels"),
    "five channels": (np.zeros((8, 8, 5), dtype=np.uint8), "is not an image"),
    "a batch": (np.zeros((2, 8, 8, 3), dtype=np.uint8), "is not an image"),
    "empty": (np.zeros((0, 8, 3), dtype=np.uint8), "is not an image"),
    "one dimension": (np.zeros(8, dtype=np.uint8), "is not an image"),
}


@pytest.fixture(scope="module")
def unime() -> UniME:
    return UniME("unime-tiny", device="cpu")


@pytest.fixture(scope="module")
def expected(unime: UniME) -> np.ndarray:
    return unime.encode([Image.fromarray(RGB)])[0]


@pytest.mark.parametrize("name", RIGHT)
def test_right(unime: UniME, expected: np.ndarray, name: str):
    tolerance = 1e-2 if "bfloat16" in name or "float16" in name else 1e-5
    found = unime.encode([{"image": RIGHT[name]}, {"image": RIGHT[name], "text": None}])
    assert np.abs(found - expected).max() < tolerance


@pytest.mark.parametrize("name", REFUSED)
def test_refused(unime: UniME, name: str):
    value, message = REFUSED[name]
    with pytest.raises(BadImageError, match=message):
        unime.encode([{"image": value}])


def test_bool_and_constant_images():
    assert image_from_array(np.eye(2, dtype=bool)).getpixel((0, 0)) == (255, 255, 255)
    for dtype in (np.uint8, np.uint16, np.int64, np.float32):
        assert image_from_array(np.zeros((2, 2, 3), dtype=dtype)).getpixel((0, 0)) == (0, 0, 0)
    assert image_from_array(np.full((2, 2), 65535, dtype=np.uint16)).getpixel((0, 0)) == (255, 255, 255)


def test_layout_of_a_shape_that_fits_both():
    pixels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert image_from_array(pixels).getpixel((1, 0)) == (3, 4, 5)
    assert image_from_array(pixels, channels_first=True).getpixel((1, 0)) == (1, 10, 19)


def test_transparent_pixels_are_white():
    assert image_from_array(np.zeros((2, 2, 4), dtype=np.uint8)).getpixel((0, 0)) == (255, 255, 255)
