"""Compositional foils: captions made false by one small edit, in SugarCrepe's seven categories."""

from __future__ import annotations

import random
from dataclasses import replace

from unime_st.data.scenes.language import full_pattern
from unime_st.data.scenes.world import (
    ATTRIBUTES,
    COLORS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    Description,
    Pattern,
    Scene,
    related,
)

FOIL_CATEGORIES = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")


def _caption_description(scene: Scene, rng: random.Random, relation: bool) -> Description:
    """Description of two objects by color and shape, sometimes with one more attribute."""
    first, second = rng.sample(scene.things, 2)
    patterns = []
    for thing in (first, second):
        pattern = replace(full_pattern(thing), size=None, texture=None)
        if rng.random() < 0.5:
            extra = rng.choice(("size", "texture"))
            pattern = replace(pattern, **{extra: getattr(thing, extra)})
        patterns.append(pattern)
    names = [name for name in RELATIONS if related(first, name, second)]
    return Description(tuple(patterns), ((0, rng.choice(names), 1),) if relation else ())


def _other(options: tuple[str, ...], value: str | None, rng: random.Random) -> str:
    return rng.choice([option for option in options if option != value])


def _with_pattern(description: Description, index: int, **attributes: str | None) -> Description:
    patterns = list(description.patterns)
    patterns[index] = replace(patterns[index], **attributes)
    return replace(description, patterns=tuple(patterns))


def _change(category: str, true: Description, rng: random.Random) -> Description | None:
    """Apply the edit of a category; None if the description does not allow it."""
    index = rng.randrange(2)
    pattern = true.patterns[index]
    first, second = true.patterns
    if category == "replace_obj":
        return _with_pattern(true, index, shape=_other(SHAPES, pattern.shape, rng))
    if category == "replace_att":
        name = rng.choice([name for name in pattern.named if name != "shape"])
        return _with_pattern(true, index, **{name: _other(ATTRIBUTES[name], getattr(pattern, name), rng)})
    if category == "replace_rel":
        ((i, relation, j),) = true.relations
        return replace(true, relations=((i, OPPOSITE[relation], j),))
    if category == "swap_obj":
        return replace(true, patterns=(second, first))
    if category == "swap_att":
        swapped = _with_pattern(_with_pattern(true, 0, color=second.color), 1, color=first.color)
        return swapped
    if category == "add_obj":
        new = Pattern(color=rng.choice(COLORS), shape=rng.choice(SHAPES))
        return replace(true, patterns=(*true.patterns, new), relations=())
    missing = [name for name in ("size", "texture") if getattr(pattern, name) is None]
    if not missing:
        return None
    name = rng.choice(missing)
    return _with_pattern(true, index, **{name: rng.choice(ATTRIBUTES[name])})


def sample_foil(category: str, scene: Scene, rng: random.Random) -> tuple[Description, Description] | None:
    """Sample a true description of a scene of two or more objects, and a false one that differs by a category's edit.

    None if this draw allows no such foil.
    """
    relation = category in ("replace_rel", "swap_obj") or (
        category in ("replace_obj", "swap_att") and rng.random() < 0.5
    )
    true = _caption_description(scene, rng, relation)
    false = _change(category, true, rng)
    return None if false is None or false.true_of(scene) else (true, false)
