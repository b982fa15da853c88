"""Text for scenes: short and long captions with paraphrases, questions with answers, edits.

``unime-tiny`` was trained on exactly these words, so their wording is part of its data.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter

from unime_st.data.scenes.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Description,
    Pattern,
    Scene,
    Thing,
    change_thing,
    related,
)

POSITIONS = {
    (0, 0): "top left",
    (0, 1): "top center",
    (0, 2): "top right",
    (1, 0): "middle left",
    (1, 1): "center",
    (1, 2): "middle right",
    (2, 0): "bottom left",
    (2, 1): "bottom center",
    (2, 2): "bottom right",
}
_NUMBERS = ("zero", "one", "two", "three", "four")
_SYNONYMS = {
    "large": ("large", "big"),
    "small": ("small", "little"),
    "striped": ("striped",),
    "plain": ("plain", "solid"),
}


def _word(word: str, rng: random.Random) -> str:
    return rng.choice(_SYNONYMS.get(word, (word,)))


def noun_phrase(pattern: Pattern, rng: random.Random) -> str:
    """Noun phrase such as "large red striped circle"; an object without a named shape is called "object"."""
    adjectives = [_word(value, rng) for name in ("size", "color", "texture") if (value := getattr(pattern, name))]
    return " ".join([*adjectives, pattern.shape or "object"])


def short_caption(description: Description, rng: random.Random) -> str:
    """Short caption about one or two objects, in one of several paraphrases."""
    joint, inverted = rng.choice((" and ", " with ")), rng.random() < 0.3
    nouns = [f"a {noun_phrase(pattern, rng)}" for pattern in description.patterns]
    if not description.relations:
        caption = joint.join(nouns)
    else:
        ((first, relation, second),) = description.relations
        if inverted:
            first, relation, second = second, OPPOSITE[relation], first
        caption = f"{nouns[first]} {relation} {nouns[second]}"
    return f"{caption} on {description.background}" if description.background else caption


def full_pattern(thing: Thing) -> Pattern:
    """Pattern with all visual attributes of an object."""
    return Pattern(thing.color, thing.shape, thing.size, thing.texture)


def long_caption(scene: Scene, rng: random.Random) -> str:
    """Long caption that describes the whole scene, always longer than the 77 tokens of CLIP's context."""
    things = rng.sample(scene.things, len(scene.things))
    count = _NUMBERS[len(things)]
    noun = "object" if len(things) == 1 else "objects"
    sentences = [f"this picture shows exactly {count} {noun} on a {scene.background} background."]
    for thing in things:
        phrase = noun_phrase(full_pattern(thing), rng)
        where = f"in the {POSITIONS[thing.cell]} part of the picture"
        sentences.append(f"{where} there is a {phrase}." if rng.random() < 0.5 else f"a {phrase} can be seen {where}.")
    for first, second in itertools.pairwise(things):
        relation = rng.choice([name for name in RELATIONS if related(first, name, second)])
        sentences.append(
            f"the {first.color} {first.shape} is {relation} the {second.color} {second.shape}, "
            f"so the {second.color} {second.shape} is {OPPOSITE[relation]} the {first.color} {first.shape}."
        )
    sentences.append(f"everything else in the picture is {scene.background} and empty, with nothing more to be seen.")
    if len(things) < 3:
        sentences.append("it is a simple drawing with flat colors, clear edges, no text, no people and no shadows.")
    if len(things) < 2:
        sentences.append("the rest of the drawing, to the left and right, above and below, has no other object in it.")
    return " ".join(sentences)


def unique_pattern(scene: Scene, thing: Thing, rng: random.Random, without: str | None = None) -> Pattern | None:
    """Pattern that matches only ``thing``; None if that requires the attribute ``without``."""
    names = [name for name in ATTRIBUTES if name != without]
    rng.shuffle(names)
    chosen: dict[str, str] = {}
    for name in sorted(names[: rng.randint(1, 3)], key=lambda name: name != "shape"):
        chosen[name] = getattr(thing, name)
    for name in names:
        pattern = Pattern(**chosen)
        if sum(pattern.fits(other) for other in scene.things) == 1:
            return pattern
        chosen[name] = getattr(thing, name)
    pattern = Pattern(**chosen)
    return pattern if sum(pattern.fits(other) for other in scene.things) == 1 else None


def _attribute_question(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    name, thing = rng.choice(list(ATTRIBUTES)), rng.choice(scene.things)
    pattern = unique_pattern(scene, thing, rng, without=name)
    if pattern is None:
        return None
    return f"what {name} is the {noun_phrase(pattern, rng)}?", getattr(thing, name)


def _position_question(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    thing = rng.choice(scene.things)
    pattern = unique_pattern(scene, thing, rng)
    return None if pattern is None else (f"where is the {noun_phrase(pattern, rng)}?", POSITIONS[thing.cell])


def _cell_question(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    thing = rng.choice(scene.things)
    return f"what is in the {POSITIONS[thing.cell]}?", f"{thing.color} {thing.shape}"


def _count_question(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if rng.random() < 0.5:
        return "how many objects are there?", str(len(scene.things))
    color, count = rng.choice(list(Counter(thing.color for thing in scene.things).items()))
    return f"how many {color} objects are there?", str(count)


def _background_question(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    return "what color is the background?", scene.background


def _relation_question(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    thing, relation = rng.choice(scene.things), rng.choice(RELATIONS)
    others = [other for other in scene.things if related(other, relation, thing)]
    pattern = unique_pattern(scene, thing, rng)
    if len(others) != 1 or pattern is None:
        return None
    return f"what is {relation} the {noun_phrase(pattern, rng)}?", f"{others[0].color} {others[0].shape}"


_QUESTIONS = (
    (_attribute_question, 5),
    (_position_question, 2),
    (_cell_question, 2),
    (_count_question, 1),
    (_background_question, 1),
    (_relation_question, 3),
)


def sample_question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Sample a question about a scene with exactly one right answer, and the answer."""
    makers, weights = zip(*_QUESTIONS)
    while True:
        found = rng.choices(makers, weights)[0](scene, rng)
        if found is not None:
            return found


def sample_wrong_answer(answer: str, rng: random.Random) -> str:
    """Sample a plausible wrong answer, mostly of the same kind as the right one."""
    things = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    groups = (COLORS, SHAPES, SIZES, TEXTURES, BACKGROUNDS, tuple(POSITIONS.values()), tuple("1234"), tuple(things))
    (group,) = [group for group in groups if answer in group]
    if rng.random() < 0.15:
        group = rng.choice([other for other in groups if other is not group])
    elif answer in things and rng.random() < 0.6:  # one word of two is wrong
        color, shape = answer.split()
        group = tuple(thing for thing in things if color in thing.split() or shape in thing.split())
    return rng.choice([other for other in group if other != answer])


def all_answers() -> list[str]:
    """Every answer that :func:`sample_question` can give."""
    things = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    return [*COLORS, *SHAPES, *SIZES, *TEXTURES, *BACKGROUNDS, *POSITIONS.values(), "1", "2", "3", "4", *things]


def sample_edit(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """Sample an edit of one attribute of one object: its wording and the edited scene."""
    while True:
        index, name = rng.randrange(len(scene.things)), rng.choice(list(ATTRIBUTES))
        thing = scene.things[index]
        pattern = unique_pattern(scene, thing, rng)
        value = rng.choice([value for value in ATTRIBUTES[name] if value != getattr(thing, name)])
        changed = change_thing(scene, index, **{name: value})
        if pattern is not None and changed.distinct:
            outcome = f"a {value}" if name == "shape" else value
            return f"the {noun_phrase(pattern, rng)} is {outcome}", changed
