"""The world of the drawn scenes: what can be in an image, and what it means for a description to be true of it."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from itertools import permutations

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("white", "gray", "brown", "black")
ATTRIBUTES: dict[str, tuple[str, ...]] = {"color": COLORS, "shape": SHAPES, "size": SIZES, "texture": TEXTURES}
CELLS = tuple((row, column) for row in range(3) for column in range(3))
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene: its look, and the cell (row, column) of the 3 x 3 grid that it stands in."""

    color: str
    shape: str
    size: str
    texture: str
    cell: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """Objects on a background, all in different cells."""

    things: tuple[Thing, ...]
    background: str

    @property
    def distinct(self) -> bool:
        """Whether all objects look different, so that words can single out each."""
        looks = {(thing.color, thing.shape, thing.size, thing.texture) for thing in self.things}
        return len(looks) == len(self.things)

    @property
    def split(self) -> str:
        """The split this scene belongs to: a function of its content, so equal scenes never cross splits."""
        content = repr((sorted(self.things), self.background)).encode()
        bucket = hashlib.sha256(content).digest()[0]
        return "test" if bucket < 32 else "validation" if bucket < 48 else "train"


def sample_scene(rng: random.Random, split: str | None = None, counts: tuple[int, ...] = (2, 2, 2, 3, 3, 4)) -> Scene:
    """Draw a random scene, if ``split`` is given until one of that split comes.

    Args:
        rng: Source of randomness.
        split: ``"train"``, ``"validation"``, ``"test"`` or None for any.
        counts: Numbers of objects to choose from, uniformly.
    """
    while True:
        cells = rng.sample(CELLS, rng.choice(counts))
        things = tuple(
            Thing(rng.choice(COLORS), rng.choice(SHAPES), rng.choice(SIZES), rng.choice(TEXTURES), cell)
            for cell in cells
        )
        scene = Scene(things, rng.choice(BACKGROUNDS))
        if scene.distinct and split in (None, scene.split):
            return scene


def related(first: Thing, relation: str, second: Thing) -> bool:
    """Whether ``first`` stands in ``relation`` to ``second``, judged by their cells."""
    (row, column), (other_row, other_column) = first.cell, second.cell
    return {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]


@dataclass(frozen=True)
class Pattern:
    """A partial description of one object; None means that nothing is said about the attribute."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    texture: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether ``thing`` has every attribute that is named."""
        return all(getattr(self, name) in (None, getattr(thing, name)) for name in ATTRIBUTES)

    @property
    def named(self) -> list[str]:
        """The attributes that are named."""
        return [name for name in ATTRIBUTES if getattr(self, name) is not None]


@dataclass(frozen=True)
class Description:
    """What a caption claims: objects, relations ``(index, relation, index)`` between them, a background."""

    patterns: tuple[Pattern, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None

    def true_of(self, scene: Scene) -> bool:
        """Whether different objects of ``scene`` can play all the parts."""
        if self.background not in (None, scene.background):
            return False
        return any(
            all(pattern.fits(thing) for pattern, thing in zip(self.patterns, cast))
            and all(related(cast[i], relation, cast[j]) for i, relation, j in self.relations)
            for cast in permutations(scene.things, len(self.patterns))
        )


def pattern_of(thing: Thing, rng: random.Random, detail: float = 0.5) -> Pattern:
    """Describe ``thing`` in part: its shape or colour always, every other attribute with probability ``detail``."""
    named = {name: getattr(thing, name) for name in ATTRIBUTES if rng.random() < detail}
    anchor = "shape" if rng.random() < 0.8 else "color"
    named[anchor] = getattr(thing, anchor)
    return Pattern(**named)


def describe(scene: Scene, rng: random.Random, detail: float = 0.6) -> Description:
    """A short true description: two objects and, more often than not, how they stand to each other."""
    if len(scene.things) == 1:
        return Description((pattern_of(scene.things[0], rng, detail),))
    first, second = rng.sample(scene.things, 2)
    patterns = (pattern_of(first, rng, detail), pattern_of(second, rng, detail))
    relation = rng.choice([name for name in RELATIONS if related(first, name, second)])
    return Description(patterns, ((0, relation, 1),) if rng.random() < 0.6 else ())


def change_thing(scene: Scene, index: int, **attributes: str) -> Scene:
    """``scene`` with some attributes of one object replaced."""
    things = list(scene.things)
    things[index] = replace(things[index], **attributes)  # type: ignore[arg-type]
    return Scene(tuple(things), scene.background)
