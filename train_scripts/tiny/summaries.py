"""Reconstruction task of the pre-training: the language model describes an item from its embedding alone.

The embedding is the last hidden state at the position where an embedding is read. Nothing else of the item reaches the
answer, so the embedding holds what a short contrastive training needs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from unime_st.data.items import Item
from unime_st.data.scenes.contrast import (
    INSTRUCTIONS,
    class_label,
    crop,
    sample_grounding_target,
    sample_scene_for,
    scene_image,
    with_instruction,
)
from unime_st.data.scenes.language import (
    POSITIONS,
    all_answers,
    full_pattern,
    long_caption,
    noun_phrase,
    sample_edit,
    sample_question,
    short_caption,
)
from unime_st.data.scenes.world import Scene, describe

TURN = "<|im_end|><|im_start|>"
"""Ends the input and begins the answer; an embedding is read at its end."""
IGNORED = -100
# Kinds of items and their share.
_KINDS = {
    "image": 0.26,
    "image_for_caption": 0.1,
    "short": 0.2,
    "long": 0.12,
    "vqa": 0.12,
    "answer": 0.02,
    "grounding": 0.1,
    "crop": 0.08,
    "composed": 0.05,
    "classification": 0.03,
}


@dataclass
class Summary:
    """An item as the embedder sees it, with a question that is to be answered from its embedding alone.

    Args:
        images: Images of the item.
        text: Its text with the placeholders of the images.
        question: Question about it.
        answer: Expected answer.
    """

    images: list[Image.Image]
    text: str
    question: str
    answer: str


def prompt_text(item: Item, images: list[Image.Image]) -> str:
    """Text of an item, after the placeholder of its image, which is appended to ``images``."""
    text = item.text or ""
    if item.image is None:
        return text
    images.append(item.image.open())
    return "<|vision_start|><|image_pad|><|vision_end|>" + text


def object_list(scene: Scene, rng: random.Random) -> str:
    """Background and every object of a scene in reading order."""
    things = sorted(scene.things, key=lambda thing: thing.cell)
    words = [f"{POSITIONS[thing.cell]} {noun_phrase(full_pattern(thing), rng)}" for thing in things]
    return f"{scene.background}, {', '.join(words)}"


def _image(kind: str, rng: random.Random) -> Summary:
    """An image, or an image with an edit; the answer is its content (after the edit)."""
    images: list[Image.Image] = []
    scene = sample_scene_for("short", rng, "train")
    query = scene_image(scene, rng)
    if kind == "composed":
        words, scene = sample_edit(scene, rng)
        query = with_instruction("composed", words, query)
    elif kind == "image_for_caption":
        query = with_instruction("i2t", image=query)
    text = prompt_text(query, images)
    if rng.random() < 0.6:
        return Summary(images, text, "list.", object_list(scene, rng))
    return Summary(images, text, "describe.", short_caption(describe(scene, rng, 0.8), rng))


def _caption(kind: str, rng: random.Random) -> Summary:
    """A caption, half of the time as a query; the answer is a paraphrase or a list of what it says."""
    scene = sample_scene_for("short", rng, "train")
    description = describe(scene, rng, rng.choice((0.3, 0.6, 0.9)))
    words = long_caption(scene, rng) if kind == "long" else short_caption(description, rng)
    text = INSTRUCTIONS["t2i"].format(words) if rng.random() < 0.5 else words
    if kind == "long":
        return Summary([], text, "list.", object_list(scene, rng))
    return Summary([], text, "repeat.", short_caption(description, rng))


def _answer(kind: str, rng: random.Random) -> Summary:
    """A question about an image, or an answer by itself; the answer is the same."""
    if kind == "answer":
        answer = rng.choice(all_answers())
        return Summary([], answer, "answer.", answer)
    images: list[Image.Image] = []
    scene = sample_scene_for("vqa", rng, "train")
    question, answer = sample_question(scene, rng)
    return Summary(
        images, prompt_text(with_instruction("vqa", question, scene_image(scene, rng)), images), "answer.", answer
    )


def _object(kind: str, rng: random.Random) -> Summary:
    """An image with an expression that refers to one object, or a crop of it; the answer is the object."""
    images: list[Image.Image] = []
    scene = sample_scene_for("grounding", rng, "train")
    thing, words = sample_grounding_target(scene, rng)
    item = crop(scene, thing, rng)
    if kind == "grounding":
        item = with_instruction("grounding", words, scene_image(scene, rng))
    return Summary(images, prompt_text(item, images), "object.", noun_phrase(full_pattern(thing), rng))


def _class(kind: str, rng: random.Random) -> Summary:
    images: list[Image.Image] = []
    scene = sample_scene_for("classification", rng, "train")
    text = class_label(scene)
    if rng.random() < 0.7:
        text = prompt_text(with_instruction("classification", image=scene_image(scene, rng)), images)
    return Summary(images, text, "classify.", class_label(scene))


_MAKERS = {
    "short": _caption,
    "long": _caption,
    "vqa": _answer,
    "answer": _answer,
    "grounding": _object,
    "crop": _object,
    "classification": _class,
}


def draw_summary(rng: random.Random) -> Summary:
    """Draw one example about a random scene of the training split."""
    (kind,) = rng.choices(list(_KINDS), list(_KINDS.values()))
    return _MAKERS.get(kind, _image)(kind, rng)


def collate_answers(examples: list[Summary], processor: Qwen2VLProcessor) -> dict[str, torch.Tensor]:
    """Tokenize what follows the embedding: question and answer.

    Returns:
        ``input_ids`` (the first is the position of the embedding), ``attention_mask`` and ``labels``, each of shape (batch,
        length), padded on the right.
    """
    tokenizer = processor.tokenizer
    rows, labels = [], []
    for example in examples:
        question = [tokenizer.pad_token_id, *tokenizer.encode(f"{example.question}{TURN}", add_special_tokens=False)]
        answer = tokenizer.encode(f"{example.answer}<|im_end|>", add_special_tokens=False)
        rows.append(torch.tensor(question + answer))
        labels.append(torch.tensor([IGNORED] * len(question) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
    }


def summary_loss(model: Qwen2VLForConditionalGeneration, batch: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Mean cross-entropy of the answers given the embeddings, and the accuracy of their tokens.

    Args:
        model: The model, which both embeds and answers.
        batch: Model inputs of the ``items``, the position of each one's ``last`` token, and the ``answers`` of
            :func:`collate_answers`.
    """
    hidden = model.model(**batch["items"]).last_hidden_state
    vectors = hidden[torch.arange(len(hidden)), batch["last"]]
    answers = batch["answers"]
    table: Any = model.get_input_embeddings()
    # Only the direction counts, as in cosine similarity; the norm is that of a token embedding.
    length = table.weight.detach().pow(2).mean().sqrt()
    vectors = vectors / vectors.pow(2).mean(dim=-1, keepdim=True).sqrt() * length
    inputs = torch.cat([vectors[:, None], table(answers["input_ids"][:, 1:])], dim=1)
    hidden_answers = model.model(inputs_embeds=inputs, attention_mask=answers["attention_mask"]).last_hidden_state[
        :, :-1
    ]
    labels = answers["labels"][:, 1:]
    known = labels != IGNORED
    logits = model.lm_head(hidden_answers[known]).float()
    return cross_entropy(logits, labels[known]), float((logits.argmax(-1) == labels[known]).float().mean())
