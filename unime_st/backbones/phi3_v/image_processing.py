"""Image processor of Phi-3.5-Vision: square crops, and the whole image once more at the size of a crop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, make_flat_list_of_images

_FLIP = Image.Transpose.TRANSPOSE


class UniMEPhi3VImageProcessor(BaseImageProcessor):
    """Image processor of Phi-3.5-Vision.

    An image is scaled so that it covers up to ``num_crops`` squares of ``crop_size`` pixels, its height padded with
    white to whole squares; each square is a crop. The crop that stands for the whole image is interpolated from the
    normalized squares.

    Args:
        num_crops: Maximum number of crops of one image, besides the whole image.
        crop_size: Side of a crop in pixels.
        image_mean: Mean of each channel.
        image_std: Standard deviation of each channel.
        **kwargs: Further fields of a saved configuration; kept and saved again.

    Example:
        >>> UniMEPhi3VImageProcessor(num_crops=4).grid(640, 480)
        (2, 2)
    """

    model_input_names = ["pixel_values", "image_sizes"]

    def __init__(
        self,
        num_crops: int = 4,
        crop_size: int = 336,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{key: value for key, value in kwargs.items() if key != "auto_map"})
        self.num_crops = num_crops
        self.crop_size = crop_size
        self.image_mean = list(image_mean or OPENAI_CLIP_MEAN)
        self.image_std = list(image_std or OPENAI_CLIP_STD)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Number of crops of an image: (rows, columns).

        Args:
            width: Of the image, in pixels.
            height: Of the image, in pixels.

        Example:
            >>> UniMEPhi3VImageProcessor(num_crops=16).grid(1000, 200)
            (2, 8)
        """
        long, short = max(width, height), min(width, height)
        columns, scaled = self._scaled(long / short)
        rows = math.ceil(scaled / self.crop_size)
        return (rows, columns) if width >= height else (columns, rows)

    def _scaled(self, ratio: float) -> tuple[int, int]:
        """Crops along the long side, and the length of the short side in pixels before padding."""
        columns = 1
        while (columns + 1) * math.ceil((columns + 1) / ratio) <= self.num_crops:
            columns += 1
        return columns, int(columns * self.crop_size / ratio)

    def _fit(self, pil_image: Image.Image) -> Image.Image:
        """Scale an image and pad it with white to whole crops; upright images are worked on lying on their side."""
        upright = pil_image.width < pil_image.height
        if upright:
            pil_image = pil_image.transpose(_FLIP)
        columns, height = self._scaled(pil_image.width / pil_image.height)
        pil_image = pil_image.resize((columns * self.crop_size, max(height, 1)), Image.Resampling.BILINEAR)
        padded = math.ceil(pil_image.height / self.crop_size) * self.crop_size
        sheet = Image.new("RGB", (pil_image.width, padded), (255, 255, 255))
        sheet.paste(pil_image, (0, (padded - pil_image.height) // 2))
        return sheet.transpose(_FLIP) if upright else sheet

    def _crops(self, pil_image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return crops of shape ``(num_crops + 1, 3, size, size)``, the whole image first, and the fitted size."""
        values = torch.from_numpy(np.asarray(self._fit(pil_image)).copy()).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        values = (values - mean[:, None, None]) / std[:, None, None]
        size = self.crop_size
        whole = torch.nn.functional.interpolate(values[None], size=(size, size), mode="bicubic")
        parts = values.unflatten(2, (-1, size)).unflatten(1, (-1, size)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        crops = values.new_zeros(self.num_crops + 1, 3, size, size)
        crops[: 1 + len(parts)] = torch.cat([whole, parts])
        return crops, (values.shape[1], values.shape[2])

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: object) -> BatchFeature:
        """Process images.

        Args:
            images: RGB images, possibly in nested lists.
            return_tensors: As in transformers.
            **kwargs: Accepted and not used.

        Returns:
            ``pixel_values`` of shape ``(n, num_crops + 1, 3, crop_size, crop_size)`` and ``image_sizes`` of shape
            ``(n, 2)``: height and width after fitting.

        Example:
            >>> image = Image.new("RGB", (40, 30))
            >>> UniMEPhi3VImageProcessor(num_crops=1).preprocess([image])["image_sizes"].tolist()
            [[336, 336]]
        """
        pil_images: Any = make_flat_list_of_images(self.fetch_images(images))
        made = [self._crops(pil_image.convert("RGB")) for pil_image in pil_images]
        data = {
            "pixel_values": torch.stack([crops for crops, _ in made]),
            "image_sizes": torch.tensor([size for _, size in made]),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)
