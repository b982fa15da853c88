"""Training pairs with one hard negative about a synthetic scene, one function for all scene tasks."""

from __future__ import annotations

import random

from unime_st.data.items import Item
from unime_st.data.records import PairRecord
from unime_st.data.scenes.draw import crop_thing, draw_scene, to_png
from unime_st.data.scenes.foils import FOIL_CATEGORIES, sample_foil
from unime_st.data.scenes.language import (
    full_pattern,
    long_caption,
    noun_phrase,
    sample_edit,
    sample_question,
    sample_wrong_answer,
    short_caption,
    unique_pattern,
)
from unime_st.data.scenes.world import ATTRIBUTES, Scene, Thing, describe, sample_scene

SCENE_TASKS = ("short_t2i", "short_i2t", "long_t2i", "long_i2t", "vqa", "grounding", "composed", "classification")

INSTRUCTIONS = {
    "t2i": "find an image: {}",
    "i2t": "find a caption.",
    "vqa": "answer: {}",
    "grounding": "crop the {}.",
    "composed": "find this image, but {}.",
    "classification": "classify the object.",
}
"""Instruction of each kind of query, as in MMEB."""


def scene_image(scene: Scene, rng: random.Random) -> Item:
    """Draw a scene as an image item."""
    return Item(image=to_png(draw_scene(scene, rng)))


def crop(scene: Scene, thing: Thing, rng: random.Random) -> Item:
    """Draw a scene and crop one object of it, enlarged."""
    return Item(image=to_png(crop_thing(draw_scene(scene, rng), thing)))


def with_instruction(kind: str, text: str = "", image: Item | None = None) -> Item:
    """Build a query from the instruction of its kind, a text and the image it refers to."""
    return Item(text=INSTRUCTIONS[kind].format(text), image=None if image is None else image.image)


def class_label(scene: Scene) -> str:
    """Class label of a scene with a single object."""
    return f"{scene.things[0].color} {scene.things[0].shape}"


def sample_scene_for(kind: str, rng: random.Random, split: str) -> Scene:
    """Sample a scene with the number of objects that this kind of task uses."""
    return sample_scene(rng, split, counts=(1,) if kind == "classification" else (2, 2, 2, 3, 3, 4))


def sample_grounding_target(scene: Scene, rng: random.Random) -> tuple[Thing, str]:
    """Sample an object and a referring expression that is unique in its scene."""
    while True:
        thing = rng.choice(scene.things)
        pattern = unique_pattern(scene, thing, rng)
        if pattern is not None:
            return thing, noun_phrase(pattern, rng)


def short_captions(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A true short caption and a false one, which is a compositional foil or describes another scene."""
    if rng.random() < 0.6:
        pair = sample_foil(rng.choice(FOIL_CATEGORIES), scene, rng)
        if pair is not None:
            seed = rng.getrandbits(32)
            true, false = (short_caption(description, random.Random(seed)) for description in pair)
            return true, false
    detail = rng.choice((0.3, 0.6, 0.9))
    true_description = describe(scene, rng, detail)
    while True:
        other = sample_edit(scene, rng)[1] if rng.random() < 0.5 else sample_scene_for("short", rng, scene.split)
        false_description = describe(other, rng, detail)
        if not false_description.true_of(scene):
            return short_caption(true_description, rng), short_caption(false_description, rng)


def _false_image(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """A caption that is true of ``scene`` and a (often similar) scene of which it is false."""
    while True:
        description = describe(scene, rng, rng.choice((0.3, 0.6, 0.9)))
        for _ in range(4):
            other = sample_edit(scene, rng)[1] if rng.random() < 0.6 else sample_scene_for("short", rng, scene.split)
            if not description.true_of(other):
                return short_caption(description, rng), other


def wrong_crop(scene: Scene, thing: Thing, rng: random.Random) -> Item:
    """A crop of an object with a different appearance, mostly from the same image."""
    others = [other for other in scene.things if full_pattern(other) != full_pattern(thing)]
    if others and rng.random() < 0.7:
        return crop(scene, rng.choice(others), rng)
    other = sample_scene_for("grounding", rng, scene.split)
    wrong = [candidate for candidate in other.things if full_pattern(candidate) != full_pattern(thing)]
    return crop(other, rng.choice(wrong), rng) if wrong else wrong_crop(scene, thing, rng)


def _wrong_label(scene: Scene, rng: random.Random) -> str:
    name = rng.choice(("color", "shape"))
    thing = {key: getattr(scene.things[0], key) for key in ("color", "shape")}
    thing[name] = rng.choice([value for value in ATTRIBUTES[name] if value != thing[name]])
    return f"{thing['color']} {thing['shape']}"


def contrastive_record(kind: str, scene: Scene, rng: random.Random) -> PairRecord:
    """Sample a training pair of a task of :data:`SCENE_TASKS` about a scene, with one negative.

    The negative is false for the query by the content of the scene. ``rng`` draws words and the image.
    """
    seen = scene_image(scene, rng)

    def record(query: Item, positive: Item, negative: Item) -> PairRecord:
        return PairRecord(query, positive, kind, (negative,))

    if kind == "short_i2t":
        true, false = short_captions(scene, rng)
        return record(with_instruction("i2t", image=seen), Item(text=true), Item(text=false))
    if kind == "short_t2i":
        caption, other = _false_image(scene, rng)
        return record(with_instruction("t2i", caption), seen, scene_image(other, rng))
    if kind in ("long_i2t", "long_t2i"):
        other = sample_edit(scene, rng)[1]
        if kind == "long_t2i":
            return record(with_instruction("t2i", long_caption(scene, rng)), seen, scene_image(other, rng))
        captions = (long_caption(scene, rng), long_caption(other, rng))
        return record(with_instruction("i2t", image=seen), Item(text=captions[0]), Item(text=captions[1]))
    if kind == "vqa":
        question, answer = sample_question(scene, rng)
        return record(
            with_instruction("vqa", question, seen), Item(text=answer), Item(text=sample_wrong_answer(answer, rng))
        )
    if kind == "grounding":
        thing, words = sample_grounding_target(scene, rng)
        return record(
            with_instruction("grounding", words, seen), crop(scene, thing, rng), wrong_crop(scene, thing, rng)
        )
    if kind == "composed":
        words, changed = sample_edit(scene, rng)
        wrong = scene if rng.random() < 0.5 else sample_edit(changed, rng)[1]
        return record(with_instruction("composed", words, seen), scene_image(changed, rng), scene_image(wrong, rng))
    if kind == "classification":
        wrong_label = _wrong_label(scene, rng)
        return record(
            with_instruction("classification", image=seen), Item(text=class_label(scene)), Item(text=wrong_label)
        )
    raise ValueError(f"Unknown kind of record {kind!r}; expected one of {', '.join(SCENE_TASKS)}.")
