"""Batches of prompts in which every distinct image is processed once, and run with little padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from sentence_transformers.base.modules import Transformer
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

PLACES = "image_places"
"""Feature of shape (placeholders, 2): the row of each image's placeholder, and which distinct image it shows."""

Chat = list[dict[str, Any]]
_PIXELS, _GRID = "pixel_values", "image_grid_thw"
_ROW_FEATURES = ("input_ids", "attention_mask", "mm_token_type_ids")
_FORWARD_TOKENS = 96
"""What one more forward pass costs, in padded tokens of a small model on a CPU; on larger machines it is less."""


class ChatEncoder:
    """Renders and tokenises conversations, and joins them with images that are processed once each.

    The token ids equal those of :meth:`sentence_transformers.base.modules.Transformer.preprocess`; images are not
    repeated but pointed to by :data:`PLACES`.

    Args:
        transformer: Input module with a chat template.

    Example:
        See :meth:`unime_st.UniMEReranker.preprocess`, which uses it.
    """

    def __init__(self, transformer: Transformer) -> None:
        self.transformer = transformer
        self.options = {**transformer.processing_kwargs.get("image", {})}
        self._with_types = False
        self.applies = set(self._process([Image.new("RGB", (56, 56))])[1]) == {_PIXELS, _GRID}
        """Whether images of this model family are independent of each other, as those of Qwen-VL are."""

    def _process(self, images: list[Image.Image]) -> tuple[list[list[int]], dict[str, Tensor]]:
        """Tokens that stand for each image, and the tensors of the image processor."""
        processor = self.transformer.processor
        out = processor(
            text=[processor.image_token] * len(images),
            images=images,
            images_kwargs=self.options,
            text_kwargs={"add_special_tokens": False, "padding": True},
            common_kwargs={"return_tensors": "pt"},
        )
        self._with_types = "mm_token_type_ids" in out
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(out["input_ids"], out["attention_mask"], strict=True)]
        return rows, {name: out[name] for name in processor.image_processor.model_input_names if name in out}

    def __call__(self, chats: Sequence[Chat], task: str | None = None) -> dict[str, Any]:
        """Turn conversations into features.

        Args:
            chats: Messages whose images are decoded; the same image object is processed once.
            task: Passed to the chat template.

        Returns:
            dict: Left-padded token ids, the distinct images, and :data:`PLACES`.

        Raises:
            ValueError: If a prompt has another number of placeholders than its conversation has images.
        """
        transformer, processor = self.transformer, self.transformer.processor
        tokenizer: Any = transformer.tokenizer
        distinct: dict[int, Image.Image] = {}
        shown: list[list[int]] = []  # per row the numbers of its images, in order
        number: dict[int, int] = {}
        for chat in chats:
            images = [part["image"] for message in chat for part in _parts(message) if part["type"] == "image"]
            for image in images:
                distinct[number.setdefault(id(image), len(number))] = image
            shown.append([number[id(image)] for image in images])
        options = {"task": task} if task is not None else {}
        plain = [[{**message, "content": _without_pixels(message)} for message in chat] for chat in chats]
        prompts = processor.apply_chat_template(plain, tokenize=False, **options)
        # As ProcessorMixin.apply_chat_template: a template that writes the first token itself must not get two.
        special = not (tokenizer.bos_token is not None and prompts[0].startswith(tokenizer.bos_token))
        rows = tokenizer(prompts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        tokens, tensors = self._process(list(distinct.values())) if distinct else ([], {})
        for row, images in zip(rows, shown, strict=True):
            _expand(row, processor.image_token_id, [tokens[image] for image in images])
        features = self._padded(rows) | tensors
        indices = [(row, image) for row, images in enumerate(shown) for image in images]
        features[PLACES] = torch.tensor(indices, dtype=torch.long).view(-1, 2)
        return features

    def _padded(self, rows: Sequence[list[int]]) -> dict[str, Any]:
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), cast(Any, self.transformer.tokenizer).pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, width - len(row) :] = torch.tensor(row)
            attention_mask[index, width - len(row) :] = 1
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._with_types:
            shows = input_ids == self.transformer.processor.image_token_id
            features["mm_token_type_ids"] = shows.long() * attention_mask
        return {**features, "modality": "message", "logits_to_keep": 1}


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if isinstance(message["content"], str) else message["content"]


def _without_pixels(message: dict[str, Any]) -> Any:
    if isinstance(message["content"], str):
        return message["content"]
    return [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]


def _expand(token_ids: list[int], placeholder: int, images: Sequence[list[int]]) -> None:
    """Put the tokens of each image in the place of its placeholder."""
    indices = [index for index, token in enumerate(token_ids) if token == placeholder]
    if len(indices) != len(images):
        raise ValueError(f"the prompt has {len(indices)} image placeholders for {len(images)} images")
    for index, tokens in zip(reversed(indices), reversed(images), strict=True):
        token_ids[index : index + 1] = tokens


def is_plain(chats: Sequence[Any]) -> bool:
    """Whether inputs are conversations that hold nothing but texts and decoded images.

    Args:
        chats: Lists of messages in the form of sentence-transformers, or other inputs.
    """
    messages = [message for chat in chats for message in (chat if isinstance(chat, list) else [None])]
    if not all(isinstance(message, dict) and isinstance(message.get("content"), (str, list)) for message in messages):
        return False
    return all(
        part["type"] == "text" or (part["type"] == "image" and isinstance(part.get("image"), Image.Image))
        for message in cast(Chat, messages)
        for part in _parts(message)
    )


def like_lengths(lengths: Sequence[int], overhead: int = _FORWARD_TOKENS) -> list[list[int]]:
    """Split a batch so that padding and the cost of further forward passes are least together.

    Args:
        lengths: Length of each row in tokens.
        overhead: Cost of one forward pass, in tokens.

    Returns:
        list[list[int]]: Rows of each part, shortest first.

    Example:
        >>> from unime_st.reranking.chat_features import like_lengths
        >>> like_lengths([100, 1000, 110], overhead=64)
        [[0, 2], [1]]
    """
    order = np.argsort(lengths, kind="stable")
    ordered = np.asarray(lengths)[order]
    least = np.zeros(len(order) + 1)
    cut = np.zeros(len(order) + 1, dtype=int)
    for end in range(1, len(order) + 1):
        costs = least[:end] + (end - np.arange(end)) * ordered[end - 1] + overhead
        cut[end] = costs.argmin()
        least[end] = costs[cut[end]]
    parts: list[list[int]] = []
    end = len(order)
    while end:
        parts.append(order[cut[end] : end].tolist())
        end = cut[end]
    return parts[::-1]


def run_in_parts(
    features: dict[str, Any],
    run: Callable[[dict[str, Any]], dict[str, Any]],
    transformer: Transformer,
    parts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Run a model on parts of a batch; its vision tower sees each distinct image of the batch once.

    Args:
        features: Result of :class:`ChatEncoder`, on the device of the model.
        run: Forward pass that adds ``causal_logits`` and ``scores``.
        transformer: Input module of the model.
        parts: Rows of each part, see :func:`like_lengths`.

    Returns:
        dict: The features with ``causal_logits`` of shape (rows, 1, vocabulary) and ``scores`` in their own order.
    """
    lengths = features["attention_mask"].sum(1)
    shown: list[list[int]] = [[] for _ in lengths]
    for row, image in features[PLACES].tolist():
        shown[row].append(image)
    look = _images(features, transformer)
    outputs = []
    for rows in parts:
        width = int(lengths[list(rows)].max())
        part = {name: features[name][list(rows), -width:] for name in _ROW_FEATURES if name in features}
        part |= look([image for row in rows for image in shown[row]])
        outputs.append(run({**part, "modality": "message", "logits_to_keep": 1}))
    back = torch.tensor([row for rows in parts for row in rows]).argsort()
    joined: dict[str, Any] = {
        name: torch.cat([output[name] for output in outputs])[back.to(outputs[0][name].device)]
        for name in ("causal_logits", "scores")
        if name in outputs[0]
    }
    return {**features, **joined}


def _images(features: dict[str, Any], transformer: Transformer) -> Callable[[list[int]], dict[str, Any]]:
    """Return what gives a part of a batch its images: as visual tokens where the model takes them, else as pixels."""
    if _PIXELS not in features:
        return lambda images: {}
    model: Any = transformer.model
    pixels, grids = features[_PIXELS], features[_GRID]
    takes_tokens = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    # Qwen3-VL's vision tower also feeds inner layers of the language model.
    if takes_tokens and not hasattr(model.config.vision_config, "deepstack_visual_indexes"):
        seen = model.get_image_features(pixels, grids, return_dict=True).pooler_output

        def gathered(images: list[int]) -> dict[str, Any]:
            output = BaseModelOutputWithPooling(pooler_output=cast(Tensor, tuple(seen[number] for number in images)))
            return {_GRID: grids[images], "mm_encoder_outputs": {"image": output}} if images else {}
    else:
        patches = pixels.split(grids.prod(-1).tolist())

        def gathered(images: list[int]) -> dict[str, Any]:
            shown = torch.cat([pixels[:0], *(patches[number] for number in images)])
            return {_GRID: grids[images], _PIXELS: shown} if images else {}

    return gathered
