"""Fast path for one image with or without a text: tokenization and image processor, without the chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import is_image_url_or_path

from unime_st.backbones.visual_outputs import PIXELS
from unime_st.data.items import Item
from unime_st.encoding.byte_images import PIXEL_TABLE, pixel_table, process_as_bytes, values_of
from unime_st.encoding.fast_paths import (
    max_length,
    pad_rows,
    reserved_tokens,
    template_renderer,
    tokenize,
    uses_chat_template,
)
from unime_st.encoding.model_inputs import Features, same_features
from unime_st.recipes.template_frame import SAMPLES, TemplateFrame

Order = tuple[str, ...]
ORDERS: tuple[Order, ...] = (("image",), ("image", "text"), ("text", "image"))

_KNOWN = {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
_COUNTS = {"num_images_per_sample", "batch_num_images"}
_PROBES = (("RGB", 60, 60), ("RGBA", 90, 150), ("L", 200, 40), ("RGB", 1200, 900))
"""Modes, widths and heights in pixels of the images on which features have to agree with those of the model."""


class ImageFastPath:
    """Computes the features of ``model.preprocess`` for inputs of one image, with or without a text.

    The template renders sample texts once; afterwards the image token of the rendered prompt is repeated as often as
    the image needs. Probes show whether the features equal those of the model; if not, :attr:`usable` is False.

    Example:
        >>> from PIL import Image
        >>> from unime_st import UniME
        >>> from unime_st.encoding.image_fast_path import ImageFastPath
        >>> path = ImageFastPath(UniME("unime-tiny"))
        >>> path.usable, len(path.tokens([(("image", "text"), "a red circle")])[0])
        (True, 8)
    """

    def __init__(self, model: SentenceTransformer, prompt: str | None = None, **options: Any) -> None:
        self._processor: Any = getattr(model, "processor", None)
        self._tokenizer = model.tokenizer
        self._table: torch.Tensor | None = None
        own: Any = getattr(model[0], "processing_kwargs", None) or {}
        self._frames: dict[Order, TemplateFrame] = {}
        token = getattr(self._processor, "image_token", None)
        self.usable = (
            isinstance(token, str)
            and not own.keys() & {"image", "common"}
            and hasattr(self._processor, "image_processor")
            and uses_chat_template(model, options)
            and self._find_frames(model, prompt, token)
            and self._same_as(model, prompt, options)
        )

    def _find_frames(self, model: SentenceTransformer, prompt: str | None, token: str) -> bool:
        """Find the frames that the template puts around the parts in each order."""
        render = template_renderer(model, prompt)
        for order in ORDERS:
            frame = _find_frame(render, order)
            if frame is None or "".join(frame.pieces).count(token) != 1:
                return False
            self._frames[order] = frame
        self._token = self._tokenizer.convert_tokens_to_ids(token)
        return True

    def _same_as(self, model: SentenceTransformer, prompt: str | None, options: Mapping[str, object]) -> bool:
        """Take from a batch of the model which features it has; whether those made here equal them."""
        self._limit, self._reserved = max_length(model), reserved_tokens(model)
        noise = np.random.default_rng(0)
        images = [
            Image.frombytes(mode, (width, height), noise.bytes(width * height * len(mode)))
            for mode, width, height in _PROBES
        ]
        *small, large = images
        probes = [
            (order, text if "text" in order else "", small[(shift + number) % len(small)])
            for shift, order in enumerate(ORDERS)
            for number, text in enumerate(SAMPLES)
        ]
        probes.append((("image",), "", large))
        inputs: list[Any] = [
            {name: image if name == "image" else text for name in order} if len(order) > 1 else image
            for order, text, image in probes
        ]
        expected = model.preprocess(inputs, prompt=prompt, **options)
        if not expected.keys() >= _KNOWN or not set(expected) - _KNOWN - _COUNTS <= {"modality"}:
            return False
        self._names, self._modality = list(expected), expected.get("modality")
        self._count_dtypes = {name: expected[name].dtype for name in expected.keys() & _COUNTS}
        self._type_dtype = expected["mm_token_type_ids"].dtype
        for special in (False, True):
            self._special = special
            rows = self.tokens([(order, text) for order, text, _ in probes])
            kept = [row for row in rows if row is not None]
            if len(kept) < len(rows):
                continue
            try:
                made = self.features(kept, [image for _, _, image in probes])
            except (ValueError, KeyError, AttributeError):  # another kind of processor
                return False
            if same_features(made, expected):
                self._find_table(kept, [image for _, _, image in probes], expected[PIXELS])
                return True
        return False

    def _find_table(self, rows: list[np.ndarray], images: list[Image.Image], expected: torch.Tensor) -> None:
        """Take images as bytes from now on if these have the expected values."""
        try:
            table = self._table = pixel_table(self._processor.image_processor)
            stored = self.features(rows, images, as_bytes=True)[PIXELS]
        except (ValueError, KeyError, AttributeError, TypeError):  # a processor without the options of Qwen's
            table = None
        same = table is not None and stored.dtype == torch.uint8 and torch.equal(values_of(stored, table), expected)
        self._table = table if same else None

    def tokens(self, inputs: Sequence[tuple[Order, str]]) -> list[np.ndarray | None]:
        """Token ids of prompts with one image token each; None if the text contains a special token."""
        prompts = [None if self._reserved.search(text) else self._frames[order].join([text]) for order, text in inputs]
        return tokenize(prompts, self._tokenizer, special=self._special)

    def fits(self, num_tokens: int) -> bool:
        """Whether an input of this length is not truncated."""
        return num_tokens < self._limit

    def features(
        self, rows: Sequence[np.ndarray], images: Sequence[Image.Image], *, as_bytes: bool = False
    ) -> Features:
        """Features of prompts from :meth:`tokens` with their images.

        Args:
            rows: Tokens.
            images: One image each.
            as_bytes: Leave ``pixel_values`` as bytes where the processor can, with a ``pixel_table`` of the values
                that they stand for, see :mod:`unime_st.encoding.byte_images`. Defaults to False.

        Raises:
            ValueError: If the image processor refuses an image.
        """
        processor = self._processor.image_processor
        ready = self._processor.prepare_inputs_layout(images=[[image] for image in images])[0]  # image rule of recipes
        processed = process_as_bytes(processor, ready) if as_bytes and self._table is not None else {}
        as_bytes = PIXELS in processed and processed[PIXELS].dtype == torch.uint8
        if not as_bytes:
            processed = processor(ready, return_tensors="pt")
        counts = (processed["image_grid_thw"].prod(dim=1) // processor.merge_size**2).tolist()
        repeated = [
            np.repeat(row, np.where(row == self._token, count, 1)) for row, count in zip(rows, counts, strict=True)
        ]
        ids, mask = pad_rows(repeated, self._tokenizer)
        found: Features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask), **processed}
        found["mm_token_type_ids"] = (found["input_ids"] == self._token).to(self._type_dtype)
        found |= {name: torch.ones(len(rows), dtype=dtype) for name, dtype in self._count_dtypes.items()}
        if "modality" in self._names:
            found["modality"] = self._modality
        return {name: found[name] for name in self._names} | ({PIXEL_TABLE: self._table} if as_bytes else {})


def _find_frame(render: Callable[[Mapping[str, object]], str], order: Order) -> TemplateFrame | None:
    blank = Image.new("RGB", (60, 60))
    if "text" not in order:  # the whole prompt is one piece
        return TemplateFrame((render({"image": blank}), ""), (0,), str)
    return TemplateFrame.find(lambda texts: render({name: blank if name == "image" else texts[0] for name in order}))


def order_and_text(value: object) -> tuple[Order, str] | None:
    """Order of the parts and the text of a normalized input of one image, else None."""
    if isinstance(value, Item):
        if value.image is None or value.video is not None:
            return None
        return (("image", "text"), value.text) if value.text is not None else (("image",), "")
    if isinstance(value, Mapping):
        order = tuple(value)
        image, text = value.get("image"), value.get("text", "")
        one = image is not None and not isinstance(image, (list, tuple)) and isinstance(text, str)
        return (order, text) if one and order in ORDERS else None
    if isinstance(value, Image.Image) or (isinstance(value, str) and is_image_url_or_path(value)):
        return ("image",), ""
    return None
