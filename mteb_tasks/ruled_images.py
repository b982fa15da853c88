"""Images as a benchmark prescribes them, on any SentenceTransformer; see `mteb_tasks.pixel_rule`."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mteb_tasks.pixel_rule import PixelRule
from unime_st.backbones.video_frames import resize_frames
from unime_st.data.images import MAX_ASPECT, MAX_PIXELS, BadImageError, ImageRef
from unime_st.data.items import Item
from unime_st.encoding.replicas import with_processor

logger = logging.getLogger(__name__)

_TEXT_TOKENS = 128
"""Tokens that are kept for the text beside an image."""
_SMALL_CONTEXT = 1280 * 28 * 28
"""Pixels below which the context of a model is said to limit images."""


def open_image(image: ImageRef, rule: PixelRule) -> Image.Image:
    """Decode an image for the image processor.

    Args:
        image: The encoded image.
        rule: The pixel rule.

    Returns:
        RGB image; its size is the stored one, except where it is too small or more than 200 times as long as wide.

    Raises:
        BadImageError: If it cannot be decoded, or has too many pixels.

    Example:
        >>> buffer = io.BytesIO()
        >>> Image.new("RGB", (100, 20)).save(buffer, "PNG")
        >>> open_image(ImageRef(data=buffer.getvalue()), PixelRule(3136, 1003520, 28)).size
        (56, 56)
    """
    content = image.read()
    try:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} is more than {MAX_PIXELS} pixels")
            stored: Image.Image = opened
            if min(opened.size) < rule.small_side:
                stored = opened.resize((2 * rule.small_side, 2 * rule.small_side), Image.Resampling.BICUBIC)
            rgb = stored.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly any type on hostile bytes; the cause is kept
        raise BadImageError(f"image {image.label}: cannot be decoded ({error})") from error
    if max(rgb.size) > MAX_ASPECT * min(rgb.size):  # image processors refuse it; the official code makes it square
        height, width = smart_resize(max(rgb.size), max(rgb.size), 28, rule.min_pixels, rule.max_pixels)
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    rgb.info = {}  # no orientation that a later step could apply
    return rgb


class RuledItem(Item):
    """An item whose image is opened by a pixel rule."""

    __slots__ = ("rule",)
    rule: PixelRule

    @classmethod
    def of(cls, item: Item, rule: PixelRule) -> RuledItem:
        """Make an item open its image by a rule.

        Args:
            item: The item.
            rule: The rule.
        """
        made = cls(item.text, item.image, item.video)
        made.rule = rule
        return made

    def to_input(self) -> dict[str, Any]:
        """Return what ``SentenceTransformer.encode`` takes, see `Item.to_input`."""
        if self.image is None:
            return super().to_input()
        rest: dict[str, object] = {} if self.video is None else {"video": self.video.open()}
        rest |= {} if self.text is None else {"text": self.text}
        return {"image": open_image(self.image, self.rule), **rest}


def prescribed_model(model: SentenceTransformer, rule: PixelRule | None, style: str | None) -> SentenceTransformer:
    """Return a model with the same weights that prepares inputs as a benchmark prescribes.

    Args:
        model: The model; it stays as it is.
        rule: Images keep their shape within these limits, and the square of a recipe is switched off. Limits have an
            effect on image processors that have such limits (the Qwen-VL family); others resize as they always do. A
            rule with sizes of frames switches truncation off.
        style: Style of chat template, which the template must have; None keeps that of the model.
    """
    twin = with_processor(model, lambda processor: processor if rule is None else _limited(processor, rule))
    first: Any = twin[0]
    if rule is not None and rule.frame_max_pixels and first is not model[0]:
        before = getattr(first, "processing_kwargs", None) or {}
        # The official code does not truncate inputs with media; the tokens of frames are more than some models' limit.
        first.processing_kwargs = {**before, "text": {**before.get("text", {}), "truncation": False}}
    if style is not None and first is not model[0]:
        before = getattr(first, "processing_kwargs", None) or {}
        first.processing_kwargs = {**before, "chat_template": {**before.get("chat_template", {}), "style": style}}
    return twin


def _limited(processor: Any, rule: PixelRule) -> Any:
    if hasattr(processor, "set_image_rule"):
        official = {**processor.image_rule, "exif": False, "alpha": "drop"}
        processor.set_image_rule(official, "native", processor.image_backend)
    resize_frames(processor, rule.frames)
    images: Any = copy.copy(getattr(processor, "image_processor", None))
    size = dict(getattr(images, "size", None) or {})
    if {"shortest_edge", "longest_edge"} <= size.keys() and hasattr(images, "merge_size"):
        most = min(rule.max_pixels, _most_pixels(processor, images.patch_size * images.merge_size))
        images.size = type(images.size)(shortest_edge=rule.min_pixels, longest_edge=most)
        processor.image_processor = images
    return processor


def _most_pixels(processor: Any, token_side: int) -> int:
    """Pixels of the largest image that fits into the context of a model beside a text."""
    context = int(processor.tokenizer.model_max_length)
    most = (context - _TEXT_TOKENS) * token_side**2
    if most < _SMALL_CONTEXT:
        logger.warning("images have at most %d pixels: this model takes %d tokens", most, context)
    return most
