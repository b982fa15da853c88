"""Token and pixel counts of items, from text, image and video headers; rows with unreadable ones are set aside."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from unime_st.backbones.video_frames import stacks_videos
from unime_st.data.images import BadImageError
from unime_st.data.items import Item
from unime_st.data.records import ItemFolder
from unime_st.data.validation import RejectedWriter
from unime_st.data.videos import VideoRef
from unime_st.encoding import TokenCounter
from unime_st.encoding.input_videos import video_shapes
from unime_st.encoding.token_counts import decoded_pixels
from unime_st.files import atomic_write
from unime_st.training.arguments import StageArguments
from unime_st.training.processes import partial_state

logger = logging.getLogger(__name__)
UNREADABLE = -1
"""Token count of an item whose image or video header cannot be read."""
COSTS = "costs.npy"
_CHUNK = 1024


def item_costs(records: ItemFolder, model: Any, path: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each stored item and pixels of its image and frames, int64 of shape (items,) each. Nothing is decoded.

    Items whose image or video header cannot be read have :data:`UNREADABLE` tokens. A ``.npy`` file, if given, keeps
    the counts for a resumed run.
    """
    if path is not None and path.is_file():
        tokens, pixels = np.load(path, allow_pickle=False)
        return tokens, pixels
    count = TokenCounter(model)
    parts = []
    items = iter(records.items)
    with tqdm(total=len(records.items), desc="counting tokens", unit="item") as progress:
        while chunk := list(islice(items, _CHUNK)):
            parts.append(_costs(chunk, count))
            progress.update(len(chunk))
    costs = np.concatenate(parts, axis=1)
    if path is not None:
        with atomic_write(path, sync=False) as temporary, temporary.open("wb") as file:
            np.save(file, costs, allow_pickle=False)
    return costs[0], costs[1]


def _costs(items: Sequence[Item], count: TokenCounter) -> np.ndarray:
    costs = count([{"text": item.text or ""} for item in items])
    pixels = np.zeros_like(costs)
    with_images, sizes = [], []
    unreadable = []
    for index, item in enumerate(items):
        try:
            if item.image is not None:
                size = item.image.size()
                with_images.append(index)
                sizes.append(size)
            for shape in video_shapes(item):
                costs[index] += count.video_tokens(shape)
                pixels[index] += decoded_pixels(shape)
        except BadImageError:
            unreadable.append(index)
    if sizes:
        costs[with_images] += np.asarray(count.image_tokens(sizes))
        pixels[with_images] += [width * height for width, height in sizes]
    costs[unreadable], pixels[unreadable] = UNREADABLE, 0
    return np.stack([costs, pixels])


def stacked_frames(records: ItemFolder, model: Any) -> np.ndarray | None:
    """Frames of each stored item's video, 0 without one, for a model whose mini-batches need equally many.

    Returns:
        Int64 array of shape (items,); None for the other families, and without videos.
    """
    if not stacks_videos(getattr(model[0], "processor", None)) or not records.items.has("video"):
        return None
    return np.array([_num_frames(item.video) for item in records.items], dtype=np.int64)


def _num_frames(video: VideoRef | None) -> int:
    try:
        return 0 if video is None else len(video.frames) or video.shape()[0]
    except BadImageError:  # its row is set aside
        return 0


def counted_costs(arguments: StageArguments, records: ItemFolder, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """:func:`item_costs`, kept in the output folder for a resumed run. A dry run writes nothing."""
    if arguments.dry_run:
        return item_costs(records, model)
    with partial_state().main_process_first():  # the others read its file
        return item_costs(records, model, Path(arguments.output) / COSTS)


def usable_rows(
    arguments: StageArguments, records: ItemFolder, rows: Dataset, costs: np.ndarray
) -> tuple[Dataset, np.ndarray, int]:
    """Set rows with an unreadable image or video aside, and list them in ``rejected.jsonl``. A dry run writes nothing.

    Returns:
        The other rows, the positions of their items of shape (rows, columns), and the number of rows set aside.

    Raises:
        ValueError: If no row is left.
    """
    names = [name for name in rows.column_names if name not in ("label", "dataset")]
    indices = np.stack([records.items.positions(list(rows[name])) for name in names], axis=1)
    bad = (costs[indices] == UNREADABLE).any(axis=1)
    if not bad.any():
        return rows, indices, 0
    numbers = np.flatnonzero(bad)
    if partial_state().is_main_process and not arguments.dry_run:
        with RejectedWriter(Path(arguments.output)) as rejected:
            for row in numbers:
                item = records.items.at(next(int(p) for p in indices[row] if costs[p] == UNREADABLE))
                reason = " or ".join(f"{part!r}" for part in (item.image, item.video) if part) + " cannot be read"
                rejected.add(reason, folder=str(records.folder), row=int(row))
    logger.warning("%d of %d rows have an unreadable image or video and are set aside.", len(numbers), len(rows))
    if bad.all():
        raise ValueError(f"{records.folder}: every row has an unreadable image or video; see rejected.jsonl.")
    good = np.flatnonzero(~bad)
    return rows.select(good), indices[good], len(numbers)
