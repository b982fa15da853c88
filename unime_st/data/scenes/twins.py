"""Families of near-twin scenes: a corpus whose mined candidates hold many false negatives, with the truth of every pair.

A family grows from one scene by small edits. Some members are drawn again (duplicates), and some captions name little
(vague captions), so a caption is often true of several images of its family.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from unime_st.data.items import Item
from unime_st.data.records import PairRecord
from unime_st.data.scenes.contrast import scene_image, with_instruction
from unime_st.data.scenes.language import short_caption
from unime_st.data.scenes.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    RELATIONS,
    Description,
    Pattern,
    Scene,
    Thing,
    change_thing,
    related,
    sample_scene,
)

TWIN_TASKS = ("twins_t2i", "twins_i2t")
MEMBERS = 8
"""Members of a family."""
_OBJECTS = (2, 2, 3)
_DUPLICATES, _VAGUE = 0.2, 0.35
_DETAIL, _RELATION = 0.85, 0.8  # probability that a caption names size, texture and background; and a relation


@dataclass(frozen=True)
class Member:
    """One member of a family: scene, caption with its content, and drawing."""

    scene: Scene
    description: Description
    caption: str
    image: Item

    def items(self) -> tuple[Item, Item, Item, Item]:
        """Query and document of text-to-image retrieval, then of image-to-text retrieval."""
        image_query = with_instruction("i2t", image=self.image)
        return with_instruction("t2i", self.caption), self.image, image_query, Item(text=self.caption)


def _twin(scene: Scene, rng: random.Random) -> Scene:
    """Copy of a scene with one attribute, the background, or an attribute of two objects exchanged."""
    while True:
        index, kind = rng.randrange(len(scene.things)), rng.random()
        if kind < 0.75:
            name = rng.choice(list(ATTRIBUTES))
            value = rng.choice([value for value in ATTRIBUTES[name] if value != getattr(scene.things[index], name)])
            changed = change_thing(scene, index, **{name: value})
        elif kind < 0.85:
            changed = replace(scene, background=rng.choice([name for name in BACKGROUNDS if name != scene.background]))
        else:
            changed = _exchange(scene, rng.choice(("cell", "color", "shape")), rng)
        if changed.distinct and changed != scene:
            return changed


def _exchange(scene: Scene, name: str, rng: random.Random) -> Scene:
    things = list(scene.things)
    first, second = rng.sample(range(len(things)), 2)
    one, other = things[first], things[second]
    things[first] = replace(one, **{name: getattr(other, name)})
    things[second] = replace(other, **{name: getattr(one, name)})
    return Scene(tuple(things), scene.background)


def sample_family(rng: random.Random, split: str, duplicates: float = _DUPLICATES) -> list[Scene]:
    """Draw the scenes of one family, ``duplicates`` of them on average copies of others."""
    base = sample_scene(rng, split, _OBJECTS)
    scenes = [base]
    while len(scenes) < MEMBERS:
        if rng.random() < duplicates:
            scenes.append(rng.choice(scenes))
            continue
        twin = _twin(base if rng.random() < 0.6 else rng.choice(scenes), rng)
        if twin not in scenes:
            scenes.append(twin)
    return scenes


def describe_twin(scene: Scene, rng: random.Random, vague: bool) -> Description:
    """True description of two objects; a vague one names little of them and nothing else."""
    first, second = rng.sample(scene.things, 2)
    if vague:
        one = Pattern(first.color if rng.random() < 0.7 else None, first.shape)
        return Description((one, Pattern(second.color, second.shape if rng.random() < 0.5 else None)))
    relation = rng.choice([name for name in RELATIONS if related(first, name, second)])
    return Description(
        (_detailed(first, rng), _detailed(second, rng)),
        ((0, relation, 1),) if rng.random() < _RELATION else (),
        scene.background if rng.random() < _DETAIL else None,
    )


def _detailed(thing: Thing, rng: random.Random) -> Pattern:
    size, texture = (getattr(thing, name) if rng.random() < _DETAIL else None for name in ("size", "texture"))
    return Pattern(thing.color, thing.shape, size, texture)


def twins(split: str, seed: int) -> Iterator[Member]:
    """Generate members of families without end, one family after the other.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``: of the scene that a family grows from. Its edits may be scenes
            of another split.
        seed: Seed of scenes, drawing and words.
    """
    rng = random.Random(f"twins-{split}-{seed}")
    while True:
        for scene in sample_family(rng, split):
            description = describe_twin(scene, rng, rng.random() < _VAGUE)
            yield Member(scene, description, short_caption(description, rng), scene_image(scene, rng))


def held_out_twins(split: str, size: int, seed: int) -> tuple[list[Member], list[int], np.ndarray]:
    """Draw a gallery of twice as many members as queries, half of each family asked.

    Returns:
        Members, indices of those that are asked, and which caption (row) is true of which image (column).
    """
    members = list(islice(twins(split, seed), 2 * size))
    asked = [index for index in range(len(members)) if index % MEMBERS < MEMBERS // 2][:size]
    table = SceneTable([member.scene for member in members])
    return members, asked, np.stack([table.true_of(member.description) for member in members])


def twin_records(size: int, *, seed: int = 0) -> Iterator[PairRecord]:
    """Generate training pairs about families of near-twins, two per member: text to image, and image to text.

    Args:
        size: Number of pairs.
        seed: Seed of scenes, drawing and words. Defaults to 0.

    Yields:
        PairRecord: Query and positive, of the datasets ``twins_t2i`` and ``twins_i2t``.

    Example:
        >>> from unime_st.data.scenes import twin_records
        >>> [record.dataset for record in twin_records(4)]
        ['twins_t2i', 'twins_i2t', 'twins_t2i', 'twins_i2t']
    """
    for number, member in enumerate(islice(twins("train", seed), (size + 1) // 2)):
        caption_query, image, image_query, caption = member.items()
        yield PairRecord(caption_query, image, "twins_t2i")
        if 2 * number + 1 < size:
            yield PairRecord(image_query, caption, "twins_i2t")


class SceneTable:
    """Scenes as arrays, to ask of all of them at once whether a description is true."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        most = max(len(scene.things) for scene in scenes)
        self.scenes = len(scenes)
        self.background = np.array([scene.background for scene in scenes])
        self.attributes = {name: np.full((len(scenes), most), "", dtype="<U10") for name in ATTRIBUTES}
        self.cells = np.full((len(scenes), most, 2), -1)
        for row, scene in enumerate(scenes):
            for column, thing in enumerate(scene.things):
                self.cells[row, column] = thing.cell
                for name, values in self.attributes.items():
                    values[row, column] = getattr(thing, name)

    def true_of(self, description: Description) -> np.ndarray:
        """Whether a description of two objects is true, per scene; the same as :meth:`Description.true_of`."""
        first, second = (self._fits(pattern) for pattern in description.patterns)
        found = first[:, :, None] & second[:, None, :] & ~np.eye(first.shape[1], dtype=bool)
        for i, relation, j in description.relations:
            holds = self._related(relation)
            found &= holds if (i, j) == (0, 1) else holds.transpose(0, 2, 1)
        true = found.any(axis=(1, 2))
        return true if description.background is None else true & (self.background == description.background)

    def _fits(self, pattern: Pattern) -> np.ndarray:
        found = self.cells[:, :, 0] >= 0
        for name in pattern.named:
            found = found & (self.attributes[name] == getattr(pattern, name))
        return found

    def _related(self, relation: str) -> np.ndarray:
        axis = 1 if relation in ("left of", "right of") else 0
        one, other = self.cells[:, :, None, axis], self.cells[:, None, :, axis]
        return one < other if relation in ("left of", "above") else one > other


class TwinTruth:
    """Which pairs of the items of :func:`twin_records` are true, by the content of scene and caption.

    Args:
        size: Number of training pairs, as given to :func:`twin_records`.
        seed: The same.
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        self._meaning: dict[str, Scene | Description] = {}
        for member in islice(twins("train", seed), (size + 1) // 2):
            caption_query, image, image_query, caption = (item.id for item in member.items())
            self._meaning |= dict.fromkeys((caption_query, caption), member.description)
            self._meaning |= dict.fromkeys((image_query, image), member.scene)

    def __call__(self, query: str, candidate: str) -> bool:
        """Whether a pair of a caption and an image, by the ids of its items, is true."""
        one, other = self._meaning[query], self._meaning[candidate]
        if isinstance(one, Description) and isinstance(other, Scene):
            return one.true_of(other)
        if isinstance(other, Description) and isinstance(one, Scene):
            return other.true_of(one)
        raise ValueError("expected a caption and an image")
