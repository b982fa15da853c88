"""Moving scenes: drawn clips of one object whose direction is visible in the order of the frames alone."""

from __future__ import annotations

import random
from collections.abc import Iterator

from PIL import Image

from unime_st.data.items import Item
from unime_st.data.records import PairRecord
from unime_st.data.scenes.draw import paint_object
from unime_st.data.scenes.world import BACKGROUNDS, COLORS, SHAPES
from unime_st.data.videos import VideoRef

DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
"""Steps in x and y, by the word of the caption."""

_SIDE = 84
_OBJECT = 26
_CERTAIN = 8.0  # log-odds


def motion_records(size: int, *, num_frames: int = 4, seed: int = 0) -> Iterator[PairRecord]:
    """Draw pairs of a clip and its caption, such as "it moves left".

    Both directions of an axis show the object at the same positions, so that a single frame or shuffled ones do not tell
    which of the two it is.

    Args:
        size: Number of pairs.
        num_frames: Frames of a clip, at least 2. Defaults to 4.
        seed: Seed of the drawing.

    Yields:
        PairRecord: Clip, caption, and as negatives the captions of the other directions, judged as right and wrong.

    Example:
        >>> from unime_st.data.scenes.motion import motion_records
        >>> (pair,) = motion_records(1)
        >>> pair.query.modality, pair.positive.modality, len(pair.negatives)
        ('video', 'text', 3)
    """
    rng = random.Random(seed)
    for _ in range(size):
        color, shape, direction = rng.choice(COLORS), rng.choice(SHAPES), rng.choice(list(DIRECTIONS))
        captions = {name: Item(f"it moves {name}") for name in DIRECTIONS}
        clip = _draw(color, shape, DIRECTIONS[direction], num_frames, rng)
        negatives = tuple(item for name, item in captions.items() if name != direction)
        logits = (-_CERTAIN,) * len(negatives)
        yield PairRecord(Item(video=clip), captions[direction], "motion", negatives, _CERTAIN, logits)


def shuffled(item: Item, rng: random.Random) -> Item:
    """The same item with the frames of its video in a random order.

    Args:
        item: Item with a video of stored frames.
        rng: Random generator.
    """
    if item.video is None:
        return item
    order = list(range(len(item.video.frames)))
    rng.shuffle(order)
    return Item(item.text, item.image, VideoRef.of_frames([item.video.frames[index] for index in order]))


def _draw(color: str, shape: str, step: tuple[int, int], num_frames: int, rng: random.Random) -> list[Image.Image]:
    """Frames of an object that moves through the center, somewhat aside of it, on one background."""
    background, aside = rng.choice(BACKGROUNDS), rng.randint(-12, 12)
    reach = (_SIDE - _OBJECT) / 2
    frames = []
    for number in range(num_frames):
        along = reach * (2 * number / (num_frames - 1) - 1)
        x, y = (reach + axis * along + (0 if axis else aside) for axis in step)
        frames.append(paint_object(color, shape, background, (round(x), round(y)), _SIDE))
    return frames
