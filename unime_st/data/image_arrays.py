"""Image arrays: numpy arrays of any common dtype and layout to 8-bit RGB images, or a clear refusal."""

from __future__ import annotations

import numpy as np
from PIL import Image

from unime_st.data.images import BadImageError, to_rgb


def image_from_array(array: np.ndarray, *, channels_first: bool = False) -> Image.Image:
    """Convert an array of pixels to an RGB image.

    ==========  =========================================================================
    dtype       values
    ==========  =========================================================================
    bool        False is black, True is white
    uint8       [0, 255]
    uint16      [0, 65535]; refused if all are below 256, where the content may be 8-bit
    other ints  [0, 255]
    floats      [0, 1], or whole numbers in [0, 255]
    ==========  =========================================================================

    Args:
        array: Pixels of shape (height, width), (height, width, channels) or (channels, height, width) with 1 (gray), 3
            (RGB) or 4 (RGBA) channels.
        channels_first: Layout to assume if the shape fits both. Defaults to False.

    Returns:
        PIL.Image.Image: Image in mode RGB; transparent pixels are composited on white.

    Raises:
        BadImageError: If the shape, dtype or range of values is not that of an image, or is ambiguous.

    Example:
        >>> import numpy as np
        >>> from unime_st.data.image_arrays import image_from_array
        >>> image_from_array(np.full((2, 3), 0.5)).getpixel((0, 0))
        (128, 128, 128)
    """
    pixels = _as_8_bit(_channels_last(array, channels_first), f"array of shape {array.shape}, dtype {array.dtype}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))


def _channels_last(array: np.ndarray, channels_first: bool) -> np.ndarray:
    if array.ndim == 2 and array.size:
        return array
    first, last = (array.ndim == 3 and array.size > 0 and array.shape[axis] in (1, 3, 4) for axis in (0, 2))
    if first and (channels_first or not last):
        return np.moveaxis(array, 0, 2)
    if last:
        return array
    raise BadImageError(
        f"an array of shape {array.shape} is not an image: expected (height, width), (height, width, channels) or "
        "(channels, height, width) with 1, 3 or 4 channels"
    )


def _as_8_bit(array: np.ndarray, label: str) -> np.ndarray:
    kind = array.dtype.kind
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind not in "uif":
        raise BadImageError(f"image {label}: the dtype is not one of pixels; expected bool, integers or floats")
    if array.dtype == np.uint8:
        return array
    # In float64, where comparisons with every other dtype are exact enough.
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadImageError(f"image {label}: contains values that are not finite")
    if array.dtype == np.uint16:
        if 0 < high <= 255:
            raise BadImageError(
                f"image {label}: no value exceeds 255, so it may be 8-bit or a dark 16-bit image; convert it to uint8"
            )
        return (array.astype(np.float64) / 257.0 + 0.5).astype(np.uint8)
    if kind == "f" and low >= 0.0 and high <= 1.0:
        return (array.astype(np.float64) * 255.0 + 0.5).astype(np.uint8)
    if low >= 0.0 and high <= 255.0 and (kind != "f" or bool((np.mod(array, 1) == 0).all())):
        return array.astype(np.uint8)
    raise BadImageError(
        f"image {label}: values lie in [{low:g}, {high:g}]; expected floats in [0, 1], or integers in [0, 255] "
        "(undo the normalization, or convert it to uint8)"
    )
