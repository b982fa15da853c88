"""From a stream of inputs to rows of vectors: distinct inputs, like lengths together, decoding ahead of the device."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from unime_st.data.images import BadImageError
from unime_st.encoding.batch_runner import BatchRunner, Job, named_error
from unime_st.encoding.model_inputs import content_key, is_chat, refuse_single
from unime_st.encoding.text_fast_path import TextFastPath, plain_text
from unime_st.encoding.token_counts import TokenCounter, pack, split_by_pixels
from unime_st.encoding.vector_shards import VectorSink

logger = logging.getLogger(__name__)

WINDOW = 4096
"""Inputs among which like lengths are sought; with shards, the rows of a shard."""

_WORTH_PROBING = 64
"""Plain texts from which on it pays to find out how the template frames them."""


@dataclass
class _Window:
    """A stretch of the stream: which rows are to be embedded, which repeat another row."""

    start: int
    size: int
    jobs: list[Job] = field(default_factory=list)
    repeats: list[tuple[int, int]] = field(default_factory=list)  # row, the row that it repeats
    batches: list[list[Job]] = field(default_factory=list)
    waiting: int = 0
    vectors: torch.Tensor | None = None


class Engine:
    """Embeds a stream of inputs with one model.

    The stream is read in windows of :data:`WINDOW`. Of equal inputs one is embedded. The cost of each is known before
    its images are decoded; batches of like cost, the costliest first, fill a token budget. Threads decode and process
    the next batches while the device works on the present one, so the images of few batches are in memory at a time.

    Args:
        forward: The model and how it is run.
        on_error: "raise" stops at the first input that cannot be read, "skip" goes on without it.
    """

    def __init__(self, forward: BatchRunner, *, on_error: Literal["raise", "skip"] = "raise") -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self.forward, self.on_error = forward, on_error
        self.failed: dict[int, str] = {}
        self._first: dict[Hashable, int] = {}
        self._texts: TextFastPath | None = None
        self._cost: TokenCounter | None = None

    def run(
        self,
        inputs: Iterable[Any],
        results: VectorSink,
        *,
        window: int | None = None,
        total: int | None = None,
        progress: bool = False,
    ) -> None:
        """Embed all inputs.

        Args:
            inputs: Items or whatever ``SentenceTransformer.encode`` takes; an iterator is read as vectors are made.
            results: Where the vectors go, window by window.
            window: Inputs among which like lengths are sought. The first windows, of a sixteenth and a quarter, are
                soon ready: the model waits for them. Defaults to None: :data:`WINDOW`, the first ones, too.
            total: Length of the stream, for the progress bar.
            progress: Show one.

        Raises:
            TypeError: If ``inputs`` is a single input.
            BadImageError: If an image cannot be read and ``on_error`` is "raise"; the message names its item. Other
                inputs that the processor refuses raise ValueError in the same way.
        """
        refuse_single(inputs)
        open_windows: deque[_Window] = deque()
        pending: deque[tuple[_Window, list[Job], Future[list[torch.Tensor | None]]]] = deque()
        bar = tqdm(total=total, desc="encoding", unit="item", disable=not progress)

        def finish(but: int = 0) -> None:
            while len(pending) > but:
                self._take(*pending.popleft(), bar)
                self._close(open_windows, results, bar)
            self._close(open_windows, results, bar)

        # A stream that breaks off leaves the vectors of what came before: shards go on from there.
        ahead = _ahead(self._windows(iter(inputs), window), on_failure=finish)
        with bar, self.forward.threads() as pool, closing(ahead) as windows:
            try:
                for upcoming in windows:
                    open_windows.append(upcoming)
                    for batch in upcoming.batches:
                        pending.append((upcoming, batch, pool.submit(self.forward.embed, batch)))
                        finish(but=self.forward.workers + 1)
                finish()
            finally:
                for _, _, future in pending:
                    future.cancel()

    def _windows(self, inputs: Iterator[Any], size: int | None) -> Iterator[_Window]:
        sizes = repeat(WINDOW) if size is None else chain((max(1, size // 16), max(1, size // 4)), repeat(size))
        start = 0
        while block := list(islice(inputs, next(sizes))):
            window = _Window(start, len(block))
            for row, value in enumerate(block, start):
                self._sort(window, row, value)
            self._plan(window)
            yield window
            start += len(block)

    def _sort(self, window: _Window, row: int, value: Any) -> None:
        """Make an input a job, or find the row that it repeats."""
        try:
            key = content_key(value)
        except BadImageError as error:
            if self.on_error == "raise":
                raise named_error(row, error) from error
            self.failed[row] = str(error)
            return
        first = self._first.setdefault(key, row)
        if first == row:
            window.jobs.append(Job(row, value))
        else:
            window.repeats.append((row, first))

    def _plan(self, window: _Window) -> None:
        """Count the tokens of every job and pack those of like kind and length."""
        if len(window.jobs) > 1:
            try:
                self._measure(window.jobs)
            except (ValueError, TypeError):  # one of them, such as a text that is no valid Unicode; find it
                window.jobs = [job for job in window.jobs if self._is_measurable(job)]
                self._measure(window.jobs)
        kinds: dict[str, list[Job]] = {}
        for job in window.jobs:
            # Sentence Transformers wraps a chat once more when it shares a batch with other inputs.
            kind = "text" if job.tokens is not None else "chat" if is_chat(job.value) else "other"
            kinds.setdefault(kind, []).append(job)
        for jobs in kinds.values():
            indices = pack([job.cost for job in jobs], self.forward.budget)
            indices = split_by_pixels(indices, [job.pixels for job in jobs], self.forward.pixels)
            window.batches += [[jobs[index] for index in batch] for batch in indices]
        window.batches.sort(key=lambda batch: -batch[0].cost)
        window.waiting = len(window.batches)

    def _measure(self, jobs: list[Job]) -> None:
        self._tokenise(jobs)
        self._count([job for job in jobs if job.tokens is None])

    def _is_measurable(self, job: Job) -> bool:
        try:
            self._measure([job])
        except (ValueError, TypeError) as error:
            if self.on_error == "raise":
                raise named_error(job.row, error) from error
            self.failed[job.row] = str(error)
            return False
        return True

    def _tokenise(self, jobs: list[Job]) -> None:
        texts = [(job, text) for job in jobs if (text := plain_text(job.value)) is not None]
        if self._texts is None and len(texts) >= _WORTH_PROBING:
            self._texts = TextFastPath(self.forward.model, **self.forward.prompting)
            self.forward.text_features = self._texts.features
        if self._texts is None or not self._texts.usable:
            return
        for (job, _), tokens in zip(texts, self._texts.tokens([text for _, text in texts])):
            if tokens is not None:
                job.tokens, job.cost = tokens, len(tokens)

    def _count(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        if self._cost is None:
            self._cost = TokenCounter(self.forward.model, **self.forward.prompting)
        costs, pixels = self._cost.tokens_and_pixels([job.value for job in jobs])
        for job, cost, count in zip(jobs, costs.tolist(), pixels.tolist()):
            job.cost, job.pixels = cost, count

    def _take(
        self, window: _Window, batch: list[Job], future: Future[list[torch.Tensor | None]], bar: tqdm[Any]
    ) -> None:
        for job, vector in zip(batch, future.result()):
            job.value = None  # encoded images need not wait for the rest of their window
            if vector is None:
                assert job.error is not None
                if self.on_error == "raise":
                    raise named_error(job.row, job.error)
                self.failed[job.row] = str(job.error)
                continue
            if window.vectors is None:
                window.vectors = vector.new_full((window.size, *vector.shape), float("nan"))
            window.vectors[job.row - window.start] = vector
        window.waiting -= 1
        bar.update(len(batch))

    def _close(self, windows: deque[_Window], results: VectorSink, bar: tqdm[Any]) -> None:
        """Hand over the windows at the front that are done."""
        while windows and windows[0].waiting == 0:
            window = windows.popleft()
            for row, first in window.repeats:
                if first in self.failed:
                    self.failed[row] = self.failed[first]
            repeats = [(row, first) for row, first in window.repeats if first not in self.failed]
            earlier = [(row, first) for row, first in repeats if first < window.start]
            if earlier:
                found = results.rows([first for _, first in earlier])
                if window.vectors is None:
                    window.vectors = found.new_full((window.size, *found.shape[1:]), float("nan"))
                window.vectors[[row - window.start for row, _ in earlier]] = found.to(window.vectors)
            here = [(row - window.start, first - window.start) for row, first in repeats if first >= window.start]
            if here and window.vectors is not None:
                rows, sources = np.array(here).T
                window.vectors[rows] = window.vectors[sources]
            results.add(window.vectors, window.size)
            bar.update(window.size - len(window.jobs))


def _ahead(windows: Iterator[_Window], *, on_failure: Callable[[], None]) -> Generator[_Window, None, None]:
    """Prepare the next window while the present one is used."""
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
    inputs: Iterable[Any],
    results: VectorSink,
    *,
    on_error: Literal["raise", "skip"],
    **how: Any,
) -> dict[int, str]:
    """Embed a stream into ``results``.

    Args:
        model: The embedder.
        inputs: The stream.
        results: Where vectors go.
        on_error: See :class:`Engine`.
        **how: ``window``, ``total`` and ``progress`` of :meth:`Engine.run`; the rest goes to :class:`BatchRunner`.

    Returns:
        dict[int, str]: Rows without a vector, and why.
    """
    run = {name: how.pop(name) for name in ("window", "total", "progress") if name in how}
    engine = Engine(BatchRunner(model, **how), on_error=on_error)
    engine.run(inputs, results, **run)
    for row, reason in islice(engine.failed.items(), 10):
        logger.warning("item %d has no vector: %s", row, reason)
    if len(engine.failed) > 10:
        logger.warning("%d items have no vector; the first ten are named above", len(engine.failed))
    return engine.failed
