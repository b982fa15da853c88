"""Lessons in summing up: an item in one vector, from which the language model has to say what the item was.

The vector is the last hidden state where an embedding is read. Nothing else of the item reaches the answer, so what a
short contrastive training needs is there when it begins.
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

TURN = "<|im_end|><|im_start|>"  # ends what is said and opens the answer; an embedding is read at its end
IGNORED = -100
# What is summed up, and how often.
_KINDS = {
    "picture": 0.26,
    "picture_for_caption": 0.1,
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
    """An item as the embedder sees it, and what has to be said from its vector alone.

    Args:
        images: Pictures of the item.
        said: Its text with the pictures' placeholders.
        asked: What is asked about it.
        answer: What has to be answered.
    """

    images: list[Image.Image]
    said: str
    asked: str
    answer: str


def written(item: Item, images: list[Image.Image]) -> str:
    """The text of an item with its picture's placeholder before it; the picture goes to ``images``."""
    text = item.text or ""
    if item.image is None:
        return text
    images.append(item.image.open())
    return "<|vision_start|><|image_pad|><|vision_end|>" + text


def listed(scene: Scene, rng: random.Random) -> str:
    """Background and every object of a scene in reading order."""
    things = sorted(scene.things, key=lambda thing: thing.cell)
    words = [f"{POSITIONS[thing.cell]} {noun_phrase(full_pattern(thing), rng)}" for thing in things]
    return f"{scene.background}, {', '.join(words)}"


def _picture(kind: str, rng: random.Random) -> Summary:
    """A picture, or a picture and a change of it: what is in it then."""
    images: list[Image.Image] = []
    scene = sample_scene_for("short", rng, "train")
    query = scene_image(scene, rng)
    if kind == "composed":
        words, scene = sample_edit(scene, rng)
        query = with_instruction("composed", words, query)
    elif kind == "picture_for_caption":
        query = with_instruction("i2t", image=query)
    said = written(query, images)
    if rng.random() < 0.6:
        return Summary(images, said, "list.", listed(scene, rng))
    return Summary(images, said, "describe.", short_caption(describe(scene, rng, 0.8), rng))


def _caption(kind: str, rng: random.Random) -> Summary:
    """A caption, half of the time as a query: the same in other words, or all that it says."""
    scene = sample_scene_for("short", rng, "train")
    description = describe(scene, rng, rng.choice((0.3, 0.6, 0.9)))
    words = long_caption(scene, rng) if kind == "long" else short_caption(description, rng)
    said = INSTRUCTIONS["t2i"].format(words) if rng.random() < 0.5 else words
    if kind == "long":
        return Summary([], said, "list.", listed(scene, rng))
    return Summary([], said, "repeat.", short_caption(description, rng))


def _answer(kind: str, rng: random.Random) -> Summary:
    """A question about a picture, or an answer by itself: the answer."""
    if kind == "answer":
        answer = rng.choice(all_answers())
        return Summary([], answer, "answer.", answer)
    images: list[Image.Image] = []
    scene = sample_scene_for("vqa", rng, "train")
    question, answer = sample_question(scene, rng)
    return Summary(
        images, written(with_instruction("vqa", question, scene_image(scene, rng)), images), "answer.", answer
    )


def _object(kind: str, rng: random.Random) -> Summary:
    """A picture with words that single an object out, or the object cut out: what the object is."""
    images: list[Image.Image] = []
    scene = sample_scene_for("grounding", rng, "train")
    thing, words = sample_grounding_target(scene, rng)
    item = crop(scene, thing, rng)
    if kind == "grounding":
        item = with_instruction("grounding", words, scene_image(scene, rng))
    return Summary(images, written(item, images), "object.", noun_phrase(full_pattern(thing), rng))


def _class(kind: str, rng: random.Random) -> Summary:
    images: list[Image.Image] = []
    scene = sample_scene_for("classification", rng, "train")
    said = class_label(scene)
    if rng.random() < 0.7:
        said = written(with_instruction("classification", image=scene_image(scene, rng)), images)
    return Summary(images, said, "classify.", class_label(scene))


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
    """One lesson about a random scene of the training split."""
    (kind,) = rng.choices(list(_KINDS), list(_KINDS.values()))
    return _MAKERS.get(kind, _picture)(kind, rng)


def collate_answers(examples: list[Summary], processor: Qwen2VLProcessor) -> dict[str, torch.Tensor]:
    """What comes after the vector: its place, the question, the answer.

    Returns:
        ``input_ids`` (the first is the vector's place), ``attention_mask`` and ``labels``, each of shape (batch,
        length), padded on the right.
    """
    tokenizer = processor.tokenizer
    rows, labels = [], []
    for example in examples:
        asked = [tokenizer.pad_token_id, *tokenizer.encode(f"{example.asked}{TURN}", add_special_tokens=False)]
        answer = tokenizer.encode(f"{example.answer}<|im_end|>", add_special_tokens=False)
        rows.append(torch.tensor(asked + answer))
        labels.append(torch.tensor([IGNORED] * len(asked) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
    }


def summary_loss(model: Qwen2VLForConditionalGeneration, batch: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Mean cross-entropy of the answers from the vectors, and the share of answer tokens that come out right.

    Args:
        model: The model; it sums up and answers.
        batch: ``items`` to sum up, the place of each one's ``last`` token, and :func:`collate_answers`'s ``answers``.
    """
    hidden = model.model(**batch["items"]).last_hidden_state
    vectors = hidden[torch.arange(len(hidden)), batch["last"]]
    answers = batch["answers"]
    table: Any = model.get_input_embeddings()
    # Only the direction counts, as in a cosine; the length is that of a word.
    length = table.weight.detach().pow(2).mean().sqrt()
    vectors = vectors / vectors.pow(2).mean(dim=-1, keepdim=True).sqrt() * length
    inputs = torch.cat([vectors[:, None], table(answers["input_ids"][:, 1:])], dim=1)
    said = model.model(inputs_embeds=inputs, attention_mask=answers["attention_mask"]).last_hidden_state[:, :-1]
    labels = answers["labels"][:, 1:]
    known = labels != IGNORED
    logits = model.lm_head(said[known]).float()
    return cross_entropy(logits, labels[known]), float((logits.argmax(-1) == labels[known]).float().mean())
