"""Cost estimate of embedding a task, from a sample that is embedded on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from datasets import Image
from sentence_transformers import SentenceTransformer

from mteb_tasks.columns import OFFICIAL_TEXT, PROMPT_NAME, iter_items
from mteb_tasks.video_column import VideoFeature
from unime_st.data.items import Item
from unime_st.durations import format_duration
from unime_st.encoding import TokenCounter

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T", bound=Sized)
R = TypeVar("R")

_WINDOW = 1024

SAMPLE = 32
"""Items that are looked at, and embedded, to find out."""


@dataclass(frozen=True)
class EmbeddingEstimate:
    """Expected cost of embedding tables.

    Args:
        items: Rows of all tables.
        distinct: Of these, different ones.
        new: Of these, the ones without an embedding yet (from a sample).
        tokens: Tokens of the new ones.
        seconds: Time that they will take on this device.

    Example:
        >>> print(EmbeddingEstimate(2000, 1500, 1200, 120_000, 150.0))
        2,000 items, 1,500 distinct, about 1,200 to embed: 120,000 tokens, 2.5 minutes
    """

    items: int
    distinct: int
    new: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        head = f"{self.items:,} items, {self.distinct:,} distinct, "
        if not self.new:
            return head + "all embedded before"
        return f"{head}about {self.new:,} to embed: {self.tokens:,} tokens, {format_duration(self.seconds)}"


def timed_sample(run: Callable[[T], R], some: T, count: int) -> tuple[R, str]:
    """Run a function on a sample, and estimate the time of the whole.

    Args:
        run: What is to be done.
        some: A few of the things that it is to be done to.
        count: Number of all of them.

    Returns:
        What `run` gave, and the time for all, for a reader.

    Example:
        >>> timed_sample(sum, [1, 2], 1000)[0]
        3
    """
    started = time.perf_counter()
    found = run(some)
    return found, format_duration((time.perf_counter() - started) * count / max(1, len(some)))


def estimate_embedding(
    model: SentenceTransformer,
    tables: Sequence[Dataset],
    is_known: Callable[[Item], bool],
    embed: Callable[[list[Item]], object],
) -> EmbeddingEstimate:
    """Estimate the cost of embedding tables from a sample, which is embedded on the way.

    Args:
        model: The embedder.
        tables: Tables made by `mteb_tasks.columns.to_dataset`.
        is_known: Whether an item needs no embedding any more.
        embed: Embeds items and keeps what it found.

    Returns:
        What to expect. Equal images in different files count as different here; they are embedded once nevertheless.

    Raises:
        BadImageError: If an image of the sample cannot be read.
    """
    first: dict[tuple[str, str, object], tuple[int, int]] = {}
    for number, table in enumerate(tables):
        for row, content in enumerate(_contents(table)):
            first.setdefault(content, (number, row))
    distinct = list(first.values())
    chosen = [distinct[index] for index in np.linspace(0, len(distinct) - 1, min(SAMPLE, len(distinct)), dtype=int)]
    fresh = []
    for number, table in enumerate(tables):
        part = table.select([row for owner, row in chosen if owner == number])
        items = (item for window in iter_items(part, prompts=model.prompts) for item in window)
        fresh += [item for item in items if not is_known(item)]
    count = sum(map(len, tables))
    if not fresh:
        return EmbeddingEstimate(count, len(distinct), 0, 0, 0.0)
    per_item = float(TokenCounter(model)(fresh).mean())
    started = time.perf_counter()
    embed(fresh)
    seconds = (time.perf_counter() - started) / len(fresh)
    new = round(len(distinct) * len(fresh) / len(chosen))
    return EmbeddingEstimate(count, len(distinct), new, round(new * per_item), new * seconds)


def _contents(table: Dataset) -> Iterator[tuple[str, str, object]]:
    """Content of the rows of a table, without reading image files."""
    if "video" in table.column_names:
        table = table.cast_column("video", VideoFeature(decode=False))
    if "image" in table.column_names:
        table = table.cast_column("image", Image(decode=False))
    for rows in table.iter(_WINDOW):  # a table may hold the encoded images themselves
        size = len(rows[OFFICIAL_TEXT])
        images = rows.get("image") or [None] * size
        videos = rows.get("video") or [None] * size
        prompts = rows.get(PROMPT_NAME) or [""] * size
        for text, prompt, image, video in zip(rows[OFFICIAL_TEXT], prompts, images, videos):
            yield text or "", prompt, (image and (image["path"] or hash(image["bytes"])), video and repr(video))
