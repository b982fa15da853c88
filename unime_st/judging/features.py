"""From pairs of items to the tensors of a batch, each distinct image processed once."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from sentence_transformers.base.modules import Transformer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from unime_st.data import BadImageError, ImageRef, Item
from unime_st.judging.prompts import Message, conversation

Pair = tuple[Item, Item]
_PIXELS = "pixel_values"
_GRID = "image_grid_thw"
_SEEN = "visual_tokens"


@dataclass(frozen=True)
class ImageFeatures:
    """One processed image: the tokens that stand for it in a prompt, and its tensors."""

    token_ids: list[int]
    tensors: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Memory of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Encoded:
    """One prompt on its way into a batch.

    Args:
        length: Size by which prompts are sorted, in tokens.
        nbytes: Memory it holds on to, in bytes.
        token_ids: Its tokens with images expanded.
        images: Its processed images in order.
        messages: Instead of the two, the messages where the processor has to see the whole batch.
    """

    length: int
    nbytes: int
    token_ids: list[int] = field(default_factory=list)
    images: list[ImageFeatures] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)


class PairEncoder(Protocol):
    """Two steps from pairs to features: what can be done pair by pair, and what needs the batch."""

    options: dict[str, Any]

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded | ValueError]:
        """Prepare pairs; an error takes the place of a pair that cannot be judged."""
        ...

    def collate(self, batch: Sequence[Encoded]) -> dict[str, Any]:
        """Join prepared pairs into the features of one forward pass."""
        ...

    def clear(self) -> None:
        """Forget processed images."""
        ...


def pair_encoder(
    transformer: Transformer, template: str, image_size: dict[str, int] | None, cache_bytes: int
) -> PairEncoder:
    """Choose the fastest way that equals the processor's own.

    Args:
        transformer: Input module with a chat template processor.
        template: Jinja source of the chat template.
        image_size: Pixel limits handed to the image processor, or None for its own.
        cache_bytes: Upper bound of the memory for processed images.

    Returns:
        PairEncoder: :class:`JoiningEncoder` for the image processors of the Qwen-VL family, else
        :class:`ProcessorEncoder`.
    """
    options = {**transformer.processing_kwargs.get("image", {})}
    if image_size is not None:
        options["size"] = image_size
    joining = JoiningEncoder(transformer, template, options, cache_bytes)
    # What these processors make of an image depends on that image alone, and images are joined by concatenation.
    # Others pad images to each other or treat several images of a prompt differently.
    if set(joining.process([Image.new("RGB", (56, 56))])[0].tensors) == {_PIXELS, _GRID}:
        return joining
    return ProcessorEncoder(transformer, template, options)


class ProcessorEncoder:
    """Hands whole batches to the processor, which handles every image of every pair anew.

    Args:
        transformer: Input module with a chat template processor.
        template: Jinja source of the chat template.
        options: Passed to the image processor.
    """

    def __init__(self, transformer: Transformer, template: str, options: dict[str, Any]) -> None:
        self.transformer = transformer
        self.template = template
        self.options = options

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded | ValueError]:
        """Decode the images of pairs."""
        return [self._decode(query, candidate) for query, candidate in pairs]

    def _decode(self, query: Item, candidate: Item) -> Encoded | ValueError:
        try:
            messages = conversation(query, [candidate])
        except BadImageError as error:
            return error
        parts = [part for message in messages for part in message["content"]]
        pixels = sum(part["image"].width * part["image"].height for part in parts if part["type"] == "image")
        characters = sum(len(part["text"]) for part in parts if part["type"] == "text")
        # About 4 characters or a square of 28 pixels to a token; processed images are float32 with three channels.
        return Encoded(length=characters // 4 + pixels // 784, nbytes=12 * pixels, messages=messages)

    def collate(self, batch: Sequence[Encoded]) -> dict[str, Any]:
        """Run the processor on a batch."""
        features = self.transformer.preprocess(
            [row.messages for row in batch],
            processing_kwargs={
                "text": {"truncation": False},
                "image": self.options,
                "chat_template": {"chat_template": self.template},
            },
        )
        check_length(self.transformer, int(features["attention_mask"].sum(1).max()))
        return features

    def clear(self) -> None:
        """Nothing is kept."""


class JoiningEncoder:
    """Tokenises prompts with unexpanded images and joins them with images that were processed once.

    The tensors equal those of :meth:`sentence_transformers.base.modules.Transformer.preprocess` on the same messages.

    Args:
        transformer: Input module with a chat template processor.
        template: Jinja source of the chat template.
        options: Passed to the image processor.
        cache_bytes: Upper bound of the memory for processed images.
    """

    def __init__(self, transformer: Transformer, template: str, options: dict[str, Any], cache_bytes: int) -> None:
        self.transformer = transformer
        self.processor = transformer.processor
        self.tokenizer: Any = transformer.tokenizer
        self.template = template
        self.options = options
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[ImageRef, ImageFeatures] = OrderedDict()
        self._cached_bytes = 0
        self._has_token_types = False
        self._tokens_ahead = self._takes_visual_tokens()

    def clear(self) -> None:
        """Forget all processed images."""
        self._cache.clear()
        self._cached_bytes = 0

    def _takes_visual_tokens(self) -> bool:
        """Whether the vision tower can run ahead, because the model takes visual tokens in place of pixels.

        Not Qwen3-VL's, whose vision tower also feeds inner layers of the language model.
        """
        model: Any = self.transformer.model
        takes_tokens = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        inner_layers = hasattr(model.config.vision_config, "deepstack_visual_indexes")
        return takes_tokens and not inner_layers

    def process(self, images: list[Image.Image]) -> list[ImageFeatures]:
        """Run the processor on images, each with its placeholder as the whole prompt.

        Args:
            images: Decoded images.

        Returns:
            list[ImageFeatures]: The tokens that each placeholder becomes, and what the image processor returns.
        """
        out = self.processor(
            text=[self.processor.image_token] * len(images),
            images=images,
            images_kwargs=self.options,
            text_kwargs={"add_special_tokens": False, "padding": True},
            common_kwargs={"return_tensors": "pt"},
        )
        self._has_token_types = "mm_token_type_ids" in out
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(out["input_ids"], out["attention_mask"], strict=True)]
        tensors = {key: value for key, value in out.items() if key in self.processor.image_processor.model_input_names}
        if set(tensors) != {_PIXELS, _GRID}:
            return [ImageFeatures(row, tensors) for row in rows]
        pixels = tensors[_PIXELS].split(tensors[_GRID].prod(-1).tolist())
        grids = tensors[_GRID].split(1)
        return [
            ImageFeatures(row, {_PIXELS: patches, _GRID: grid})
            for row, patches, grid in zip(rows, pixels, grids, strict=True)
        ]

    def _process_images(self, pairs: Sequence[Pair]) -> dict[ImageRef, ImageFeatures | BadImageError]:
        """Process the distinct images of pairs, but for those that an earlier call has left in the cache."""
        found: dict[ImageRef, ImageFeatures | BadImageError] = {}
        decoded: dict[ImageRef, Image.Image] = {}
        for ref in dict.fromkeys(item.image for pair in pairs for item in pair if item.image is not None):
            if ref in self._cache:
                self._cache.move_to_end(ref)
                found[ref] = self._cache[ref]
                continue
            try:
                decoded[ref] = ref.open()
            except BadImageError as error:
                found[ref] = error
        if decoded:
            images = self.process(list(decoded.values()))
            for ref, image in zip(decoded, self._see(images) if self._tokens_ahead else images, strict=True):
                found[ref] = self._cache[ref] = image
                self._cached_bytes += image.nbytes
        while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return found

    @torch.inference_mode()
    def _see(self, images: Sequence[ImageFeatures]) -> list[ImageFeatures]:
        """Run the vision tower, so that an image costs it one pass however many prompts it is in."""
        pixels, grids = (torch.cat([image.tensors[key] for image in images]) for key in (_PIXELS, _GRID))
        model: Any = self.transformer.model
        device = model.device
        seen = model.get_image_features(pixels.to(device), grids.to(device), return_dict=True).pooler_output
        return [
            ImageFeatures(image.token_ids, {_GRID: image.tensors[_GRID], _SEEN: tokens})
            for image, tokens in zip(images, seen, strict=True)
        ]

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded | ValueError]:
        """Render and tokenise pairs and process their images."""
        messages = [conversation(query, [candidate], decode=False) for query, candidate in pairs]
        prompts = self.processor.apply_chat_template(messages, chat_template=self.template, tokenize=False)
        # As ProcessorMixin.apply_chat_template: a template that writes the first token itself must not get two.
        bos = self.tokenizer.bos_token
        special = not (bos is not None and prompts[0].startswith(bos))
        rows = self.tokenizer(prompts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        processed = self._process_images(pairs)
        return [
            self._expand(row, [processed[item.image] for item in pair if item.image is not None])
            for row, pair in zip(rows, pairs, strict=True)
        ]

    def _expand(self, token_ids: list[int], found: list[ImageFeatures | BadImageError]) -> Encoded | ValueError:
        """Put the tokens of each image in the place of its placeholder."""
        images = [image for image in found if isinstance(image, ImageFeatures)]
        for image in found:
            if isinstance(image, BadImageError):
                return image
        places = [place for place, token in enumerate(token_ids) if token == self.processor.image_token_id]
        if len(places) != len(images):
            return ValueError(f"the prompt has {len(places)} image placeholders for {len(images)} images")
        for place, image in zip(reversed(places), reversed(images), strict=True):
            token_ids[place : place + 1] = image.token_ids
        try:
            check_length(self.transformer, len(token_ids))
        except ValueError as error:
            return error
        return Encoded(len(token_ids), sum(image.nbytes for image in images), token_ids, images)

    def collate(self, batch: Sequence[Encoded]) -> dict[str, Any]:
        """Pad prompts on the left and concatenate their images."""
        width = max(row.length for row in batch)
        input_ids = torch.full((len(batch), width), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for place, row in enumerate(batch):
            input_ids[place, width - row.length :] = torch.tensor(row.token_ids)
            attention_mask[place, width - row.length :] = 1
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._has_token_types:
            features["mm_token_type_ids"] = (input_ids == self.processor.image_token_id).long() * attention_mask
        images = [image for row in batch for image in row.images]
        for key in images[0].tensors if images else ():
            if key == _SEEN:
                tokens = tuple(image.tensors[key] for image in images)
                features["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}  # type: ignore[arg-type]
            else:
                features[key] = torch.cat([image.tensors[key] for image in images])
        return {**features, "modality": "message", "logits_to_keep": 1}


def check_length(transformer: Transformer, tokens: int) -> None:
    """Refuse a prompt that would have to be cut: its end is where the answer is read.

    Args:
        transformer: Input module.
        tokens: Length of the longest prompt.

    Raises:
        ValueError: If the model takes fewer.
    """
    limit = transformer.max_seq_length
    if limit is not None and tokens > limit:
        raise ValueError(f"the prompt has {tokens} tokens, the model takes at most {limit}: shorten the text")
