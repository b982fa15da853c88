"""Pre-training tasks in which an image and its captions are told apart from those of near-twins, each pair by itself."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from train_scripts.tiny.summaries import TURN, prompt_text
from unime_st.data.scenes.contrast import scene_image, short_captions, with_instruction
from unime_st.data.scenes.language import long_caption, sample_edit, short_caption
from unime_st.data.scenes.twins import describe_twin, sample_family
from unime_st.data.scenes.world import Scene, sample_scene


@dataclass
class Example:
    """Images and turns of (prompt, answer).

    With a ``prefix``, every turn continues from the prefix alone and does not attend to the other turns.
    """

    images: list[Image.Image]
    turns: list[tuple[str, str]]
    prefix: str = ""


def _about(scene: Scene, rng: random.Random) -> Example:
    """An image that asks for a caption, without candidates yet."""
    images: list[Image.Image] = []
    query = with_instruction("i2t", image=scene_image(scene, rng))
    return Example(images, [], f"Query:{prompt_text(query, images)}")


def _add(example: Example, text: str, right: bool) -> None:
    example.turns.append((f"Candidate:{text}{TURN}", "Yes" if right else "No"))


def tell_captions(rng: random.Random) -> Example:
    """One image and many captions of it, its near-twins and its edits."""
    family = sample_family(rng, "train", duplicates=0.35)
    scene = rng.choice(family)
    example = _about(scene, rng)
    for _ in range(14):
        if rng.random() < 0.5:
            described = scene if rng.random() < 0.4 else rng.choice(family)
            description = describe_twin(described, rng, vague=rng.random() < 0.3)
            _add(example, short_caption(description, rng), description.true_of(scene))
        else:
            right = rng.random() < 0.5
            _add(example, short_captions(scene, rng)[0 if right else 1], right)
    return example


def tell_twins(rng: random.Random) -> Example:
    """One image and captions of its near-twins, almost half of them vague."""
    family = sample_family(rng, "train", duplicates=0.25)
    scene = rng.choice(family)
    example = _about(scene, rng)
    for _ in range(14):
        described = scene if rng.random() < 0.2 else rng.choice(family)
        description = describe_twin(described, rng, vague=rng.random() < 0.45)
        _add(example, short_caption(description, rng), description.true_of(scene))
    return example


def tell_long(rng: random.Random) -> Example:
    """One image and long captions of it and of scenes that differ from it in one or two attributes."""
    scene = sample_scene(rng, "train", (2, 2, 2, 3, 3, 4))
    example = _about(scene, rng)
    for _ in range(3):
        told, right = scene, rng.random() < 0.5
        while not right and told == scene:
            told = sample_edit(scene, rng)[1]
            if rng.random() < 0.4:
                told = sample_edit(told, rng)[1]
        _add(example, long_caption(told, rng), right)
    return example
