"""From a batch of inputs to its vectors: images, features, device, and what happens when memory runs out."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import truncate_embeddings

from unime_st.compat import inference_device
from unime_st.data.images import BadImageError
from unime_st.encoding.model_inputs import load
from unime_st.encoding.packed import has_packed_attention, without_padding
from unime_st.encoding.replicas import on_devices, shared_by_threads
from unime_st.encoding.token_counts import pack, pixel_budget

logger = logging.getLogger(__name__)

TOKENS_PER_ROW = 256
"""Tokens that one unit of ``batch_size`` stands for."""

_CPU_BUDGET = 1024
"""Tokens after which a larger batch gains nothing on a CPU, and only takes memory."""

_THREAD_PIXELS = 2_000_000
"""Stored pixels of a batch on a CPU, where every thread holds one: fewer than training allows its only batch."""

_CPU_THREADS, _DEVICE_THREADS = 4, 8


@dataclass
class Job:
    """An input on its way to a vector.

    Args:
        row: Its place in the stream.
        value: The input.
        cost: Tokens it will become.
        pixels: Pixels of its images as they are stored.
        tokens: The tokens themselves, where the input is a plain text.
        error: Why there is no vector.
    """

    row: int
    value: Any
    cost: int = 0
    pixels: int = 0
    tokens: np.ndarray | None = None
    error: Exception | None = None


class BatchRunner:
    """Runs one model on batches, in several threads that each carry a batch from the file to the vector.

    They take turns at the accelerators, or on a CPU at the cores, each with its share of them: for models that fit on
    a CPU this uses them better than one operation spread over all. There are more threads than turns, so that batches
    are ready when the model is.

    Args:
        model: The embedder.
        batch_size: Size of a batch, in rows of :data:`TOKENS_PER_ROW` tokens. Defaults to 32.
        token_budget: Most tokens of a batch, padding included. Defaults to None: by ``batch_size``, on a CPU at most
            1024.
        workers: Threads. Defaults to None: one for each core that torch may use, at most eight; on a CPU at most four,
            and one more.
        device: Where to run: a device, or several for one copy of the model on each. Defaults to None, where the model
            is.
        prompt: Instruction that goes with every input.
        truncate_dim: Leading dimensions to keep.
        normalize_embeddings: Scale vectors to unit length.
        output_device: Where vectors are put; None leaves them where they are made.
        packed: Run a batch as one row without padding. Defaults to None: where the model has flash attention.
        **options: Passed on to ``preprocess`` and ``forward`` of the model.

    Raises:
        ValueError: If a number is below one, or there is no device.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        batch_size: int = 32,
        token_budget: int | None = None,
        workers: int | None = None,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        output_device: str | torch.device | None = "cpu",
        packed: bool | None = None,
        **options: Any,
    ) -> None:
        model.eval()
        for name, value in (("batch_size", batch_size), ("token_budget", token_budget), ("workers", workers)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        several: list[Any] = list(device) if isinstance(device, (list, tuple)) else [device]
        if not several:
            raise ValueError("device is an empty list: name at least one device, or None for where the model is")
        devices = [inference_device(model, several[0]), *map(torch.device, several[1:])]
        on_cpu = all(index.type == "cpu" for index in devices)
        cores = torch.get_num_threads()
        turns = min(cores, _CPU_THREADS) if on_cpu else len(devices)
        self.workers = workers or (turns + 1 if on_cpu else min(max(cores, 2), _DEVICE_THREADS))
        turns = min(turns, self.workers)
        self._threads_each = max(1, cores // turns) if on_cpu else 1
        self.budget = token_budget or batch_size * TOKENS_PER_ROW
        if token_budget is None and on_cpu:
            self.budget = min(self.budget, _CPU_BUDGET)
        self.pixels = _THREAD_PIXELS if on_cpu else pixel_budget(*devices)
        self.prompting = {"prompt": prompt, **options}
        self.truncate_dim, self.normalize = truncate_dim, normalize_embeddings
        self.output_device, self.options = output_device, options
        self.text_features: Callable[[list[np.ndarray]], dict[str, Any]] | None = None
        copies = on_devices(model, devices) if len(devices) > 1 else [model]
        self.packed = has_packed_attention(model) if packed is None else packed
        if self.packed:
            copies = [without_padding(copy) for copy in copies]
        self.model = shared_by_threads(copies[0])
        self._free: queue.SimpleQueue[tuple[SentenceTransformer, torch.device]] = queue.SimpleQueue()
        for copy, index in zip(copies, devices):
            self._free.put((shared_by_threads(copy), index))
        for _ in range(turns - 1 if on_cpu else 0):
            self._free.put((self.model, devices[0]))
        self._shrinking = threading.Lock()

    @contextmanager
    def threads(self) -> Iterator[ThreadPoolExecutor]:
        """The threads that :meth:`embed` is to run in, each with its share of the cores."""
        before = torch.get_num_threads()
        share = lambda: torch.set_num_threads(self._threads_each)
        try:
            with ThreadPoolExecutor(self.workers, thread_name_prefix="embedding", initializer=share) as pool:
                yield pool
        finally:
            torch.set_num_threads(before)  # torch also keeps the last value for threads to come

    def embed(self, jobs: list[Job]) -> list[torch.Tensor | None]:
        """Embed a batch; halve it when memory runs out.

        Args:
            jobs: The batch.

        Returns:
            list: A vector for each job, or None where ``job.error`` says why not.
        """
        costs = [max(job.cost, 1) for job in jobs]
        if len(jobs) > 1 and len(jobs) * max(costs) > self.budget:
            return self._in_parts(jobs, pack(costs, self.budget))
        try:
            return self._embed_at_once(jobs)
        except (RuntimeError, MemoryError) as error:
            if len(jobs) == 1 or not _out_of_memory(error):
                raise
        clear_device_cache(garbage_collection=True)  # outside the except block, which holds on to its tensors
        with self._shrinking:
            self.budget = min(self.budget, max(1, len(jobs) * max(costs) // 2))
        logger.warning("out of memory with %d tokens; going on with %d a batch", len(jobs) * max(costs), self.budget)
        half = len(jobs) // 2
        return self._in_parts(jobs, [np.arange(half), np.arange(half, len(jobs))])

    def _in_parts(self, jobs: list[Job], parts: list[np.ndarray]) -> list[torch.Tensor | None]:
        vectors: list[torch.Tensor | None] = [None] * len(jobs)
        for part in parts:
            for index, vector in zip(part, self.embed([jobs[index] for index in part])):
                vectors[index] = vector
        return vectors

    def _embed_at_once(self, jobs: list[Job]) -> list[torch.Tensor | None]:
        good, features = self._prepare(jobs)
        vectors: list[torch.Tensor | None] = [None] * len(jobs)
        if not good:
            return vectors
        model, device = self._free.get()
        try:
            found = self._run(model, features, device)
        finally:
            self._free.put((model, device))
        # A GPU is still at work: the next thread may queue its batch while this one waits.
        found = found if self.output_device is None else found.to(self.output_device)
        for index, vector in zip(good, found):
            vectors[index] = vector
        return vectors

    def _prepare(self, jobs: list[Job]) -> tuple[list[int], dict[str, Any]]:
        """Features of the jobs that can be read, and their places."""
        if self.text_features is not None and all(job.tokens is not None for job in jobs):
            rows = [job.tokens for job in jobs if job.tokens is not None]
            return list(range(len(jobs))), self.text_features(rows)
        good, inputs = [], []
        for index, job in enumerate(jobs):
            try:
                inputs.append(load(job.value))
                good.append(index)
            except BadImageError as error:
                job.error = error
        if not good:
            return [], {}
        try:
            return good, self._features(inputs)
        except Exception as error:  # decoders raise nearly any type on hostile bytes
            if _out_of_memory(error):
                raise
            if len(good) == 1:
                jobs[good[0]].error = error
                return [], {}
        for index, value in zip(good, inputs):  # one of them; find it
            try:
                self._features([value])
            except Exception as error:
                if _out_of_memory(error):
                    raise
                jobs[index].error = error
        kept = [(index, value) for index, value in zip(good, inputs) if jobs[index].error is None]
        if len(kept) == len(good):
            self._features(inputs)  # each alone is fine, so say what is wrong with all of them
        return ([index for index, _ in kept], self._features([value for _, value in kept])) if kept else ([], {})

    def _features(self, inputs: list[Any]) -> dict[str, Any]:
        return self.model.preprocess(inputs, **self.prompting)

    @torch.inference_mode()
    def _run(self, model: SentenceTransformer, features: dict[str, Any], device: torch.device) -> torch.Tensor:
        moved = {name: _to_device(value, device) for name, value in features.items()}
        vectors = model(moved, **self.options)["sentence_embedding"]
        vectors = truncate_embeddings(vectors, self.truncate_dim)
        return torch.nn.functional.normalize(vectors, p=2, dim=1) if self.normalize else vectors


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def _to_device(value: Any, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if device.type == "cuda":  # from pinned memory the copy does not hold up the kernels that are queued
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def named_error(row: int, error: Exception) -> Exception:
    """Return a ValueError, or a BadImageError for one, that says which item it is about."""
    named = (BadImageError if isinstance(error, BadImageError) else ValueError)(f"item {row}: {error}")
    named.__cause__ = error
    return named
