"""Chat features: batches of conversations in which every distinct image is processed once, run with little padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from PIL import Image
from sentence_transformers.base.modules import Transformer
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from unime_st.backbones.visual_outputs import GRID, PIXELS
from unime_st.encoding.model_inputs import Features
from unime_st.scoring.chat_tokenizer import ChatTokenizer
from unime_st.scoring.prompts import Message

IMAGE_INDEX = "image_index"
"""Feature of shape (placeholders, 2): the row of each image placeholder, and the index of its distinct image."""

Chat = list[Message]
_ROW_FEATURES = ("input_ids", "attention_mask", "mm_token_type_ids")
_FORWARD_TOKENS = 96
"""Cost of one more forward pass, in padded tokens of a small model on a CPU; on larger machines it is lower."""


class ChatEncoder:
    """Renders and tokenizes conversations, and processes each distinct image of a batch once.

    The token ids equal those of :meth:`sentence_transformers.base.modules.Transformer.preprocess`; images are not
    repeated but referred to by :data:`IMAGE_INDEX`. ``applies`` says whether images of this model family are
    independent of each other, as those of Qwen-VL.
    """

    def __init__(self, transformer: Transformer) -> None:
        self.processor = transformer.processor
        self.tokenizer = ChatTokenizer(transformer)
        self.applies = self.tokenizer.independent_images

    def __call__(self, chats: Sequence[Chat], task: str | None = None) -> Features:
        """Turn conversations into features: left-padded token ids, the distinct images, and :data:`IMAGE_INDEX`.

        The same image object is processed once; ``task`` is passed to the chat template.

        Raises:
            ValueError: If a prompt has another number of placeholders than its conversation has images.
        """
        distinct: dict[int, Image.Image] = {}
        number: dict[int, int] = {}
        shown: list[list[int]] = []  # per row the distinct images it shows, in order
        for chat in chats:
            images = [part["image"] for message in chat for part in _parts(message) if part["type"] == "image"]
            for image in images:
                distinct[number.setdefault(id(image), len(number))] = image
            shown.append([number[id(image)] for image in images])
        options = {"task": task} if task is not None else {}
        plain = [[{**message, "content": _without_pixels(message)} for message in chat] for chat in chats]
        prompts = cast(list[str], self.processor.apply_chat_template(plain, tokenize=False, **options))
        tokens, tensors = self.tokenizer.process_images(list(distinct.values())) if distinct else ([], {})
        rows = [
            self.tokenizer.expand(row, [tokens[image] for image in images])[0]
            for row, images in zip(self.tokenizer.tokenize(prompts), shown, strict=True)
        ]
        index = [(row, image) for row, images in enumerate(shown) for image in images]
        return {
            **self.tokenizer.pad(rows),
            **tensors,
            IMAGE_INDEX: torch.tensor(index, dtype=torch.long).view(-1, 2),
            "modality": "message",
            "logits_to_keep": 1,
        }


def _parts(message: Message) -> list[Message]:
    return [] if isinstance(message["content"], str) else message["content"]


def _without_pixels(message: Message) -> str | list[Message]:
    if isinstance(message["content"], str):
        return message["content"]
    return [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]


def is_plain(chats: Sequence[object]) -> TypeGuard[Sequence[Chat]]:
    """Whether inputs are conversations, lists of messages, that hold nothing but texts and decoded images."""
    messages = [message for chat in chats for message in (chat if isinstance(chat, list) else [None])]
    if not all(isinstance(message, dict) and isinstance(message.get("content"), (str, list)) for message in messages):
        return False
    return all(
        part["type"] == "text" or (part["type"] == "image" and isinstance(part.get("image"), Image.Image))
        for message in cast(Chat, messages)
        for part in _parts(message)
    )


def group_by_length(lengths: Sequence[int], overhead: int = _FORWARD_TOKENS) -> list[list[int]]:
    """Split a batch into parts, shortest rows first, with the least sum of padding and ``overhead`` of each pass.

    Lengths and overhead are in tokens.

    Example:
        >>> from unime_st.reranking.chat_features import group_by_length
        >>> group_by_length([100, 1000, 110], overhead=64)
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
    features: Features,
    run: Callable[[Features], Features],
    transformer: Transformer,
    parts: Sequence[Sequence[int]],
) -> Features:
    """Run a model on parts of a batch; each distinct image of the batch passes the vision tower once.

    ``features`` are those of :class:`ChatEncoder`, on the device of the model; ``run`` adds ``causal_logits`` of shape
    (rows, 1, vocabulary) and ``scores``, which come back in the order of the features.
    """
    lengths = features["attention_mask"].sum(1)
    shown: list[list[int]] = [[] for _ in lengths]
    for row, image in features[IMAGE_INDEX].tolist():
        shown[row].append(image)
    image_features = _image_features(features, transformer)
    outputs = []
    for rows in parts:
        width = int(lengths[list(rows)].max())
        part = {name: features[name][list(rows), -width:] for name in _ROW_FEATURES if name in features}
        part |= image_features([image for row in rows for image in shown[row]])
        outputs.append(run({**part, "modality": "message", "logits_to_keep": 1}))
    back = torch.tensor([row for rows in parts for row in rows]).argsort()
    joined: Features = {
        name: torch.cat([output[name] for output in outputs])[back.to(outputs[0][name].device)]
        for name in ("causal_logits", "scores")
        if name in outputs[0]
    }
    return {**features, **joined}


def _image_features(features: Features, transformer: Transformer) -> Callable[[list[int]], Features]:
    """Return a function from the images of a part to its features: visual tokens where the model takes them, or pixels."""
    if PIXELS not in features:
        return lambda images: {}
    model: Any = transformer.model
    pixels, grids = features[PIXELS], features[GRID]
    takes_tokens = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    # Qwen3-VL's vision tower also feeds inner layers of the language model.
    if takes_tokens and not hasattr(model.config.vision_config, "deepstack_visual_indexes"):
        encoded = model.get_image_features(pixels, grids, return_dict=True).pooler_output

        def gather(images: list[int]) -> Features:
            output = BaseModelOutputWithPooling(
                pooler_output=cast(Tensor, tuple(encoded[number] for number in images))
            )
            return {GRID: grids[images], "mm_encoder_outputs": {"image": output}} if images else {}
    else:
        patches = pixels.split(grids.prod(-1).tolist())

        def gather(images: list[int]) -> Features:
            shown = torch.cat([pixels[:0], *(patches[number] for number in images)])
            return {GRID: grids[images], PIXELS: shown} if images else {}

    return gather
