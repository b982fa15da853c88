"""Scene model: objects with attributes on a grid, descriptions, and when a description is true of a scene."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import permutations

from unime_st.files import digest

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
    """One object of a scene: its visual attributes and its cell (row, column) in the 3 x 3 grid."""

    color: str
    shape: str
    size: str
    texture: str
    cell: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """Objects in different cells on a background."""

    things: tuple[Thing, ...]
    background: str

    @property
    def distinct(self) -> bool:
        """Whether all objects differ in appearance, so that each can be described uniquely."""
        appearances = {(thing.color, thing.shape, thing.size, thing.texture) for thing in self.things}
        return len(appearances) == len(self.things)

    @property
    def split(self) -> str:
        """Split of the scene, derived from its content, so that equal scenes are always in the same split."""
        content = repr((sorted(self.things), self.background)).encode()
        bucket = int(digest(content, length=2), 16)
        return "test" if bucket < 32 else "validation" if bucket < 48 else "train"


def sample_scene(rng: random.Random, split: str | None = None, counts: tuple[int, ...] = (2, 2, 2, 3, 3, 4)) -> Scene:
    """Sample a random scene, of one split if given.

    Args:
        rng: Random generator.
        split: ``"train"``, ``"validation"``, ``"test"``, or None for any. Defaults to None.
        counts: Numbers of objects to sample from uniformly.
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
    """Whether a spatial relation holds between two objects, by their cells."""
    (row, column), (other_row, other_column) = first.cell, second.cell
    return {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]


@dataclass(frozen=True)
class Pattern:
    """Partial description of one object; None leaves an attribute open."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    texture: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether an object has all named attributes."""
        return all(getattr(self, name) in (None, getattr(thing, name)) for name in ATTRIBUTES)

    @property
    def named(self) -> list[str]:
        """Names of the attributes that are set."""
        return [name for name in ATTRIBUTES if getattr(self, name) is not None]


@dataclass(frozen=True)
class Description:
    """Content of a caption: objects, relations ``(index, relation, index)`` between them, and a background."""

    patterns: tuple[Pattern, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None

    def true_of(self, scene: Scene) -> bool:
        """Whether the description is true of a scene: distinct objects match all patterns and relations."""
        if self.background not in (None, scene.background):
            return False
        return any(
            all(pattern.fits(thing) for pattern, thing in zip(self.patterns, cast))
            and all(related(cast[i], relation, cast[j]) for i, relation, j in self.relations)
            for cast in permutations(scene.things, len(self.patterns))
        )


def pattern_of(thing: Thing, rng: random.Random, detail: float = 0.5) -> Pattern:
    """Sample a partial description: shape or color always, every other attribute with probability ``detail``."""
    named = {name: getattr(thing, name) for name in ATTRIBUTES if rng.random() < detail}
    anchor = "shape" if rng.random() < 0.8 else "color"
    named[anchor] = getattr(thing, anchor)
    return Pattern(**named)


def describe(scene: Scene, rng: random.Random, detail: float = 0.6) -> Description:
    """Sample a short true description of two objects, in most cases with their spatial relation."""
    if len(scene.things) == 1:
        return Description((pattern_of(scene.things[0], rng, detail),))
    first, second = rng.sample(scene.things, 2)
    patterns = (pattern_of(first, rng, detail), pattern_of(second, rng, detail))
    relation = rng.choice([name for name in RELATIONS if related(first, name, second)])
    return Description(patterns, ((0, relation, 1),) if rng.random() < 0.6 else ())


def change_thing(scene: Scene, index: int, **attributes: str) -> Scene:
    """Copy of a scene with some attributes of one object replaced."""
    things = list(scene.things)
    things[index] = replace(things[index], **attributes)  # type: ignore[arg-type]
    return Scene(tuple(things), scene.background)
