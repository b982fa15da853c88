"""Encoding engine: deduplicates a stream of inputs, batches it by length, and decodes images ahead of the device."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, repeat
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from unime_st.encoding.batch_runner import BatchRunner, Job, named_error
from unime_st.encoding.byte_images import takes_bytes
from unime_st.encoding.content_keys import content_key
from unime_st.encoding.fast_paths import remembered
from unime_st.encoding.image_fast_path import ImageFastPath, order_and_text
from unime_st.encoding.model_inputs import (
    copy_arrays,
    is_chat,
    is_media,
    looks_like_image_path,
    normalize_input,
    raise_if_single,
)
from unime_st.encoding.shared_videos import SharedVideo, video_key, video_of
from unime_st.encoding.text_fast_path import TextFastPath, plain_text
from unime_st.encoding.token_counts import TokenCounter, even_budget, pack, split_by_pixels
from unime_st.encoding.vector_shards import VectorSink

logger = logging.getLogger(__name__)

WINDOW = 4096
"""Number of inputs that are deduplicated and batched together; also the number of rows per shard."""

_SMALL_TOKENS, _SMALL_PIXELS = 1024, 500_000
"""Most tokens and stored pixels of a window that passes a model on a CPU as one batch on all cores; threads would cost more
than they save."""

_MIN_TEXTS, _MIN_IMAGES = 64, 16
"""Number of plain texts, or of images, from which probing the chat template for a fast path pays off."""

_Vectors = list[torch.Tensor | None]


@dataclass
class _Window:
    """A slice of the stream: rows to encode, and rows that duplicate another row."""

    start: int
    size: int
    jobs: list[Job] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)  # (row, first row with this content)
    batches: list[list[Job]] = field(default_factory=list)
    open_batches: int = 0
    vectors: torch.Tensor | None = None
    inline: bool = False  # encoded in the calling thread


class Engine:
    """Encodes a stream of inputs with one model.

    The stream is read in windows of :data:`WINDOW` inputs, and each distinct input is encoded once. Token counts are
    known before images are decoded, so that inputs of similar length are batched up to a token budget, the longest
    first. Threads decode and preprocess the next batches while the device runs the current one, so that only the
    images of a few batches are in memory. ``on_error`` "raise" stops at the first input that cannot be read, "skip"
    continues.
    """

    def __init__(self, runner: BatchRunner, *, on_error: Literal["raise", "skip"] = "raise") -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self.runner, self.on_error = runner, on_error
        self.failed: dict[int, str] = {}
        self._first: dict[Hashable, int] = {}
        self._warned = False
        self._texts: TextFastPath | None = None
        self._images: ImageFastPath | None = None
        self._counter: TokenCounter | None = None

    def run(
        self,
        inputs: Iterable[object],
        results: VectorSink,
        *,
        window: int | None = None,
        total: int | None = None,
        progress: bool = False,
    ) -> None:
        """Encode all inputs.

        Args:
            inputs: Items or any inputs of ``SentenceTransformer.encode``. An iterator is read as vectors are computed.
            results: Receives the vectors window by window.
            window: Number of inputs per window. The first two windows have a sixteenth and a quarter of this size,
                so that the model starts early. Defaults to None, windows of :data:`WINDOW` from the start.
            total: Length of the stream for the progress bar. Defaults to None, unknown.
            progress: Show a progress bar.

        Raises:
            TypeError: If ``inputs`` is a single input.
            BadImageError: If an image cannot be read and ``on_error`` is "raise"; the message names the item.
            ValueError: If the processor refuses another input and ``on_error`` is "raise".
        """
        raise_if_single(inputs)
        open_windows: deque[_Window] = deque()
        pending: deque[tuple[_Window, list[Job], Future[_Vectors]]] = deque()
        bar = tqdm(total=total, desc="encoding", unit="item", disable=not progress)

        def finish(keep: int = 0) -> None:
            while len(pending) > keep:
                self._collect(*pending.popleft(), bar)
                self._emit(open_windows, results, bar)
            self._emit(open_windows, results, bar)

        # If the stream raises, the vectors of earlier windows are still emitted: shards resume from there.
        source = map(copy_arrays, inputs) if isinstance(inputs, Iterator) else iter(inputs)
        ahead = _prefetch(self._windows(source, window), on_failure=finish)
        with bar, self.runner.threads() as pool, closing(ahead) as windows:
            try:
                for upcoming in windows:
                    open_windows.append(upcoming)
                    if upcoming.inline:
                        finish()  # the threads use the cores until then
                    for batch in upcoming.batches:
                        encode = _encode_inline if upcoming.inline else pool.submit
                        pending.append((upcoming, batch, encode(self.runner.encode, batch)))
                        finish(keep=self.runner.workers + 1)
                finish()
            finally:
                for _, _, future in pending:
                    future.cancel()

    def _windows(self, inputs: Iterator[object], size: int | None) -> Iterator[_Window]:
        sizes = repeat(WINDOW) if size is None else chain((max(1, size // 16), max(1, size // 4)), repeat(size))
        start = 0
        while block := list(islice(inputs, next(sizes))):
            window = _Window(start, len(block))
            for row, value in enumerate(block, start):
                self._add(window, row, value)
            self._make_batches(window)
            yield window
            start += len(block)

    def _add(self, window: _Window, row: int, value: object) -> None:
        """Register an input as a job, or as a duplicate of an earlier row."""
        try:
            value = normalize_input(value)
            key = content_key(value)
        except ValueError as error:  # BadImageError included
            if self.on_error == "raise":
                raise named_error(row, error) from error
            self.failed[row] = str(error)
            return
        if not self._warned and isinstance(value, str) and looks_like_image_path(value) and not is_media(value):
            self._warned = True
            logger.warning(
                "item %d, %r, ends like an image file but is encoded as a text, because Sentence Transformers does not "
                'recognize it as the path of an existing image. Pass {"image": path} for an image, {"text": ...} for a '
                "text. Further items of this kind are not reported.",
                row,
                value,
            )
        first = self._first.setdefault(key, row)
        if first == row:
            window.jobs.append(Job(row, value))
        else:
            window.duplicates.append((row, first))

    def _make_batches(self, window: _Window) -> None:
        """Count the tokens of all jobs and batch those of the same kind by length."""
        if len(window.jobs) > 1:
            try:
                self._measure(window.jobs)
            except (ValueError, TypeError):  # at least one is invalid, such as a text with a lone surrogate: find it
                window.jobs = [job for job in window.jobs if self._is_measurable(job)]
                self._measure(window.jobs)
        kinds: dict[str, list[Job]] = {}
        for job in self._share_videos(window.jobs):
            # Sentence Transformers formats a chat differently when it shares a batch with other inputs.
            framed = "image" if job.pixels else "text"
            kind = framed if job.tokens is not None else "chat" if is_chat(job.value) else "other"
            # Processors stack videos, which must have as many frames as one another.
            kind += f", frames {job.frames}" if job.frames else ""
            kind += ", shared" if job.shared is not None else ""
            kinds.setdefault(kind, []).append(job)
        one_thread_suffices = self.runner.workers == 1 or (len(kinds) == 1 and _is_small(window.jobs))
        window.inline = self.runner.on_cpu and one_thread_suffices
        turns = 1 if window.inline else self.runner.turns
        for jobs in kinds.values():
            costs, pixels = [job.num_tokens for job in jobs], [job.pixels for job in jobs]
            indices = pack(costs, even_budget(costs, self.runner.budget, turns))
            limit = even_budget(pixels, self.runner.pixel_limit(max(pixels)), turns)
            indices = split_by_pixels(indices, pixels, limit)
            window.batches += [[jobs[index] for index in batch] for batch in indices]
        window.batches.sort(key=lambda batch: -batch[0].num_tokens)
        window.open_batches = len(window.batches)

    def _share_videos(self, jobs: list[Job]) -> list[Job]:
        """Mark jobs that have their video in common, and put them next to each other, also after sorting by length."""
        if not any(job.frames for job in jobs) or self.runner.sharing is None:
            return jobs
        groups: dict[Hashable, list[Job]] = {}
        for job in jobs:
            key = video_key(job.value) if len(job.frames) == 1 else None
            groups.setdefault(job.row if key is None else ("video", key), []).append(job)
        for members in groups.values():
            if len(members) == 1:
                continue
            shared = SharedVideo(video_of(members[0].value), len(members))
            longest = max(job.num_tokens for job in members)
            for job in members:
                job.shared, job.num_tokens = shared, longest
                job.pixels = job.pixels if job is members[0] else 0
        return [job for members in groups.values() for job in members]

    def _measure(self, jobs: list[Job]) -> None:
        self._tokenize_texts(jobs)
        self._count_tokens([job for job in jobs if job.tokens is None])
        self._tokenize_images(jobs)

    def _is_measurable(self, job: Job) -> bool:
        try:
            self._measure([job])
        except (ValueError, TypeError) as error:
            if self.on_error == "raise":
                raise named_error(job.row, error) from error
            self.failed[job.row] = str(error)
            return False
        return True

    def _tokenize_texts(self, jobs: list[Job]) -> None:
        texts = [(job, text) for job in jobs if (text := plain_text(job.value)) is not None]
        if self._texts is None and len(texts) >= _MIN_TEXTS:
            self._texts = remembered(TextFastPath, self.runner.model, self.runner.prompting)
            self.runner.text_features = self._texts.features
        if self._texts is None or not self._texts.usable:
            return
        for (job, _), tokens in zip(texts, self._texts.tokens([text for _, text in texts])):
            if tokens is not None:
                job.tokens, job.num_tokens = tokens, len(tokens)

    def _tokenize_images(self, jobs: list[Job]) -> None:
        images = [(job, parts) for job in jobs if job.pixels and (parts := order_and_text(job.value)) is not None]
        if self._images is None and len(images) >= _MIN_IMAGES:
            self._images = remembered(ImageFastPath, self.runner.model, self.runner.prompting)
            as_bytes = takes_bytes(self.runner.model)
            self.runner.image_features = partial(self._images.features, as_bytes=as_bytes)
        if self._images is None or not self._images.usable:
            return
        for (job, _), tokens in zip(images, self._images.tokens([parts for _, parts in images])):
            if tokens is not None and self._images.fits(job.num_tokens):
                job.tokens = tokens

    def _count_tokens(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        if self._counter is None:
            self._counter = TokenCounter(self.runner.model, **self.runner.prompting)
        counts, pixels, frames = self._counter.measure([job.value for job in jobs])
        for job, count, num_pixels, num_frames in zip(jobs, counts.tolist(), pixels.tolist(), frames):
            job.num_tokens, job.pixels, job.frames = count, num_pixels, num_frames

    def _collect(self, window: _Window, batch: list[Job], future: Future[_Vectors], bar: tqdm[NoReturn]) -> None:
        rows, vectors = [], []
        for job, vector in zip(batch, future.result()):
            job.value = None  # releases the encoded image before the window is finished
            if vector is not None:
                rows.append(job.row - window.start)
                vectors.append(vector)
                continue
            assert job.error is not None
            if self.on_error == "raise":
                raise named_error(job.row, job.error)
            self.failed[job.row] = str(job.error)
        if vectors:
            if window.vectors is None:
                window.vectors = vectors[0].new_full((window.size, *vectors[0].shape), float("nan"))
            window.vectors[rows] = torch.stack(vectors)
        window.open_batches -= 1
        bar.update(len(batch))

    def _emit(self, windows: deque[_Window], results: VectorSink, bar: tqdm[NoReturn]) -> None:
        """Pass finished windows at the front of the queue on to the results."""
        while windows and windows[0].open_batches == 0:
            window = windows.popleft()
            for row, first in window.duplicates:
                if first in self.failed:
                    self.failed[row] = self.failed[first]
            duplicates = [(row, first) for row, first in window.duplicates if first not in self.failed]
            earlier = [(row, first) for row, first in duplicates if first < window.start]
            if earlier:
                found = results.rows([first for _, first in earlier])
                if window.vectors is None:
                    window.vectors = found.new_full((window.size, *found.shape[1:]), float("nan"))
                window.vectors[[row - window.start for row, _ in earlier]] = found.to(window.vectors)
            here = [(row - window.start, first - window.start) for row, first in duplicates if first >= window.start]
            if here and window.vectors is not None:
                rows, sources = np.array(here).T
                window.vectors[rows] = window.vectors[sources]
            results.add(window.vectors, window.size)
            bar.update(window.size - len(window.jobs))


def _is_small(jobs: list[Job]) -> bool:
    tokens, pixels = sum(job.num_tokens for job in jobs), sum(job.pixels for job in jobs)
    return tokens <= _SMALL_TOKENS and pixels <= _SMALL_PIXELS


def _encode_inline(encode: Callable[[list[Job]], _Vectors], batch: list[Job]) -> Future[_Vectors]:
    """The vectors of a batch, computed in this thread."""
    done: Future[_Vectors] = Future()
    done.set_result(encode(batch))
    return done


def _prefetch(windows: Iterator[_Window], *, on_failure: Callable[[], None]) -> Generator[_Window, None, None]:
    """Prepare the next window in a thread while the current one is encoded."""
    with ThreadPoolExecutor(1, thread_name_prefix="windows") as pool:
        upcoming = pool.submit(next, windows, None)
        while True:
            try:
                window = upcoming.result()
            except BaseException:
                on_failure()
                raise
            if window is None:
                return
            upcoming = pool.submit(next, windows, None)
            yield window


def encode_into(
    model: SentenceTransformer,
    inputs: Iterable[object],
    results: VectorSink,
    *,
    on_error: Literal["raise", "skip"],
    **options: Any,
) -> dict[int, str]:
    """Encode a stream of inputs into a sink, and return the reasons of the rows without a vector.

    ``options`` are ``window``, ``total`` and ``progress`` of :meth:`Engine.run`, and those of :class:`BatchRunner`.
    """
    run_options = {name: options.pop(name) for name in ("window", "total", "progress") if name in options}
    engine = Engine(BatchRunner(model, **options), on_error=on_error)
    engine.run(inputs, results, **run_options)
    for row, reason in islice(engine.failed.items(), 10):
        logger.warning("item %d has no vector: %s", row, reason)
    if len(engine.failed) > 10:
        logger.warning("%d items have no vector; the first ten are listed above", len(engine.failed))
    return engine.failed
