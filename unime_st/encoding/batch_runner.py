"""Batch runner: decodes, preprocesses and encodes batches in threads, and halves them when memory runs out."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import truncate_embeddings

from unime_st.backbones.last_token import only_last_tokens, prepare_last_layer
from unime_st.backbones.video_frames import raise_without_video
from unime_st.compat import inference_device
from unime_st.data.images import BadImageError
from unime_st.encoding.byte_images import with_visual_tokens
from unime_st.encoding.input_videos import has_video
from unime_st.encoding.model_inputs import Features, load_input, unreadable_image
from unime_st.encoding.packed import has_packed_attention, without_padding
from unime_st.encoding.replicas import on_devices, shared_by_threads
from unime_st.encoding.rope_positions import RopePositions
from unime_st.encoding.shared_videos import SharedVideo, VideoSharing
from unime_st.encoding.text_fast_path import plain_text
from unime_st.encoding.token_counts import pack, pixel_budget
from unime_st.options import check_count

logger = logging.getLogger(__name__)

TOKENS_PER_ROW = 256
"""Number of tokens per unit of ``batch_size``."""

_CPU_BUDGET = 2048
"""Token budget on a CPU, where larger batches cost memory without being faster."""

_THREAD_PIXELS, _LARGE_IMAGES, _MOST_PIXELS = 1_000_000, 16, 8_000_000
"""Pixel budget of a batch on a CPU, where every thread holds a batch; so many larger images share one, up to a limit."""

_CPU_THREADS, _DEVICE_THREADS = 4, 8


@dataclass
class Job:
    """One input to encode: its row in the stream, and what is known of it.

    ``tokens`` are those of a plain text, or of the prompt around one image; ``shared`` is the video that it has in
    common with other inputs.
    """

    row: int
    value: object
    num_tokens: int = 0
    pixels: int = 0
    frames: tuple[int, ...] = ()
    tokens: np.ndarray | None = None
    shared: SharedVideo | None = None
    error: Exception | None = None


class BatchRunner:
    """Encodes batches with one model in several threads; each thread takes a batch from decoding to vectors.

    The threads take turns on the accelerators. On a CPU several forward passes run side by side, each on its share of
    the cores, which is faster for models of this size than one pass on all cores. Where a pass has several cores, one
    thread more preprocesses the next batches in time.

    Args:
        model: The embedding model.
        batch_size: Size of a batch in units of :data:`TOKENS_PER_ROW` tokens.
        token_budget: Maximum number of tokens of a batch, padding included. Defaults to None, derived from
            ``batch_size`` and at most 2048 on a CPU.
        workers: Number of threads. Defaults to None: the number of cores that torch may use, at most eight; on a CPU
            at most four, plus one where the passes have several cores each.
        device: Device, or several with one copy of the model each. Defaults to None, the model's device.
        prompt: Instruction that is added to every input.
        truncate_dim: Number of leading dimensions to keep. Defaults to None, all.
        normalize_embeddings: Scale vectors to unit length.
        output_device: Device of the vectors. None leaves them on the model's device.
        packed: Encode a batch as one row without padding. Defaults to None, if the model uses flash attention.
        single_thread: One thread calls the runner, and no other tokenizes meanwhile. Defaults to False.
        **options: Passed on to ``preprocess`` and ``forward`` of the model.
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
        single_thread: bool = False,
        **options: Any,
    ) -> None:
        if any(module.training for module in model.modules()):  # setting the mode takes three times as long
            model.eval()
        for name, value in (("batch_size", batch_size), ("token_budget", token_budget), ("workers", workers)):
            if value is not None or name == "batch_size":
                check_count(name, value)
        if truncate_dim is not None:
            check_count("truncate_dim", truncate_dim)
        several: list[Any] = list(device) if isinstance(device, (list, tuple)) else [device]
        if not several:
            raise ValueError("device is an empty list: name at least one device, or None for the model's device")
        devices = [inference_device(model, several[0]), *map(torch.device, several[1:])]
        self.on_cpu = on_cpu = all(target.type == "cpu" for target in devices)
        cores = torch.get_num_threads()
        turns = min(cores, _CPU_THREADS) if on_cpu else len(devices)
        spare = cores > turns  # cores that a pass leaves idle while its thread preprocesses
        self.workers = workers or (turns + spare if on_cpu else min(max(cores, 2), _DEVICE_THREADS))
        self.turns = turns = min(turns, self.workers)
        self._threads_each = max(1, cores // turns) if on_cpu else 1
        self.budget = token_budget or batch_size * TOKENS_PER_ROW
        if token_budget is None and on_cpu:
            self.budget = min(self.budget, _CPU_BUDGET)
        self._pixels = None if on_cpu else pixel_budget(*devices)
        self.prompting = {"prompt": prompt, **options}
        self.truncate_dim, self.normalize = truncate_dim, normalize_embeddings
        self.output_device, self.options = output_device, options
        self.text_features: Callable[[list[np.ndarray]], Features] | None = None
        self.image_features: Callable[[list[np.ndarray], list[Any]], Features] | None = None
        copies = on_devices(model, devices) if len(devices) > 1 else [model]
        self.packed = has_packed_attention(model) if packed is None else packed
        if self.packed:
            copies = [without_padding(copy) for copy in copies]
        shared = copies if single_thread else [shared_by_threads(copy) for copy in copies]
        self.model, self._num_devices = shared[0], len(devices)
        self._free: queue.SimpleQueue[tuple[SentenceTransformer, torch.device]] = queue.SimpleQueue()
        for turn in range(turns if on_cpu and len(devices) == 1 else len(devices)):
            index = min(turn, len(devices) - 1)
            self._free.put((shared[index], devices[index]))
        self._positions = RopePositions(self.model[0])
        self._last_only = all(map(needs_last_tokens_only, copies))
        self._shrinking = threading.Lock()

    def pixel_limit(self, largest: int) -> int:
        """Most stored pixels of a batch whose largest image has ``largest``; images of few tokens go together even if
        they are stored large."""
        if self._pixels is not None:
            return self._pixels
        return max(_THREAD_PIXELS, min(_LARGE_IMAGES * largest, _MOST_PIXELS))

    @cached_property
    def sharing(self) -> VideoSharing | None:
        """Sharing of visual tokens between inputs with the same video; None without such a model, or on several devices."""
        sharing = VideoSharing(self.model, self.prompting) if self._num_devices == 1 else None
        return sharing if sharing is not None and sharing.applies else None

    @contextmanager
    def threads(self) -> Iterator[ThreadPoolExecutor]:
        """Thread pool for :meth:`encode`, in which each thread uses its share of the cores."""
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self.workers, "encoding", torch.set_num_threads, (self._threads_each,)) as pool:
                yield pool
        finally:
            torch.set_num_threads(before)  # torch applies the last value to future threads, too

    def encode(self, jobs: list[Job]) -> list[torch.Tensor | None]:
        """Encode a batch, in halves if the device runs out of memory.

        Each job gets a vector, or None with the reason in ``job.error``.
        """
        counts = [max(job.num_tokens, 1) for job in jobs]
        tokens = len(jobs) * max(counts)
        if len(jobs) > 1 and tokens > self.budget:
            return self._encode_parts(jobs, pack(counts, self.budget))
        try:
            return self._encode_whole(jobs)
        except (RuntimeError, MemoryError) as error:
            if len(jobs) == 1 or not _out_of_memory(error):
                raise
        clear_device_cache(garbage_collection=True)  # after the except block, whose traceback references tensors
        with self._shrinking:
            self.budget = min(self.budget, max(1, tokens // 2))
        logger.warning("out of memory with a batch of %d tokens; continuing with at most %d", tokens, self.budget)
        half = len(jobs) // 2
        return self._encode_parts(jobs, [np.arange(half), np.arange(half, len(jobs))])

    def _encode_parts(self, jobs: list[Job], parts: list[np.ndarray]) -> list[torch.Tensor | None]:
        vectors: list[torch.Tensor | None] = [None] * len(jobs)
        for part in parts:
            for index, vector in zip(part, self.encode([jobs[index] for index in part])):
                vectors[index] = vector
        return vectors

    def _encode_whole(self, jobs: list[Job]) -> list[torch.Tensor | None]:
        good, features = self._prepare_shared(jobs) if jobs[0].shared is not None else self._prepare(jobs)
        vectors: list[torch.Tensor | None] = [None] * len(jobs)
        if not good:
            return vectors
        model, device = self._free.get()
        try:
            found = self._run(model, features, device)
        finally:
            self._free.put((model, device))
        # The GPU still computes: the next thread can queue its batch while this one waits for the copy.
        found = found if self.output_device is None else found.to(self.output_device)
        for index, vector in zip(good, found):
            vectors[index] = vector
        return vectors

    def _prepare(self, jobs: list[Job]) -> tuple[list[int], Features]:
        """Indices of the jobs whose inputs can be read, and their features."""
        tokens = [job.tokens for job in jobs if job.tokens is not None]
        if len(tokens) == len(jobs) and not jobs[0].pixels and self.text_features is not None:
            return list(range(len(jobs))), self.text_features(tokens)
        good, inputs = [], []
        for index, job in enumerate(jobs):
            try:
                if has_video(job.value):
                    raise_without_video(getattr(self.model, "processor", None))
                inputs.append(self._load(job.value))
                good.append(index)
            except ValueError as error:  # BadImageError included
                job.error = error
        if not good:
            return [], {}
        try:
            if len(tokens) == len(good) == len(jobs) and self.image_features is not None:
                images = [value["image"] if isinstance(value, Mapping) else value for value in inputs]
                return good, self._positions.add(self.image_features(tokens, images))
            return good, self._features(inputs)
        except Exception as error:  # decoders raise arbitrary exception types on corrupt bytes
            if _out_of_memory(error):
                raise
            if len(good) == 1:
                jobs[good[0]].error = unreadable_image(jobs[good[0]].value) or error
                return [], {}
        for index, value in zip(good, inputs):  # at least one input is invalid: find it
            try:
                self._features([value])
            except Exception as error:
                if _out_of_memory(error):
                    raise
                jobs[index].error = unreadable_image(jobs[index].value) or error
        kept = [(index, value) for index, value in zip(good, inputs) if jobs[index].error is None]
        if len(kept) == len(good):
            self._features(inputs)  # each input alone is valid: raise the error of the whole batch
        return ([index for index, _ in kept], self._features([value for _, value in kept])) if kept else ([], {})

    def _prepare_shared(self, jobs: list[Job]) -> tuple[list[int], Features]:
        """As :meth:`_prepare`, for jobs whose videos pass the vision tower once for all jobs that have them."""
        assert self.sharing is not None
        videos = [job.shared for job in jobs if job.shared is not None]
        try:
            for video in videos:
                self.sharing.load(video, self._video_tokens)
            return list(range(len(jobs))), self.sharing.features([job.value for job in jobs], videos)
        except Exception as error:
            if _out_of_memory(error):
                raise
        finally:
            for job, video in zip(jobs, videos, strict=True):
                video.release()
                job.shared = None
        return self._prepare(jobs)  # a video or a text is invalid: find it

    @torch.inference_mode()
    def _video_tokens(self, features: Features) -> list[torch.Tensor]:
        assert self.sharing is not None
        model, device = self._free.get()
        try:
            return self.sharing.run_tower({name: _to_device(value, device) for name, value in features.items()})
        finally:
            self._free.put((model, device))

    def _load(self, value: object) -> object:
        # Other first modules than a Transformer, such as a StaticEmbedding, take a text as a string alone.
        text = None if isinstance(self.model[0], Transformer) else plain_text(value)
        return load_input(value) if text is None else text

    def _features(self, inputs: list[object]) -> Features:
        features = self.model.preprocess(inputs, **self.prompting)
        # One input has no layout in common with others, and a CPU is not waited for: the model's own positions are as cheap.
        return features if len(inputs) == 1 and self.on_cpu else self._positions.add(features)

    @torch.inference_mode()
    def _run(self, model: SentenceTransformer, features: Features, device: torch.device) -> torch.Tensor:
        moved = {name: _to_device(value, device) for name, value in features.items()}
        moved = with_visual_tokens(model, moved)
        mask = moved.get("attention_mask")
        masked = self._last_only and isinstance(mask, torch.Tensor)
        with only_last_tokens(mask, packed=self.packed) if masked else nullcontext():  # type: ignore[arg-type]
            vectors = model(moved, **self.options)["sentence_embedding"]
        vectors = truncate_embeddings(vectors, self.truncate_dim)
        return torch.nn.functional.normalize(vectors, p=2, dim=1) if self.normalize else vectors


def needs_last_tokens_only(model: SentenceTransformer) -> bool:
    """Whether a model pools last tokens, and its last layer is now prepared for ``only_last_tokens``.

    Example:
        >>> from unime_st import UniME
        >>> from unime_st.encoding.batch_runner import needs_last_tokens_only
        >>> needs_last_tokens_only(UniME("unime-tiny"))
        True
    """
    pooling = model[1] if len(model) > 1 else None
    pools = isinstance(pooling, Pooling) and pooling.pooling_mode == "lasttoken"
    return pools and isinstance(model[0], Transformer) and prepare_last_layer(model[0].model)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def _to_device(value: object, device: torch.device) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    if device.type == "cuda":  # copies from pinned memory do not block queued kernels
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def named_error(row: int, error: Exception) -> Exception:
    """Copy an error as ValueError or BadImageError, with the row of the item in its message."""
    named = (BadImageError if isinstance(error, BadImageError) else ValueError)(f"item {row}: {error}")
    named.__cause__ = error
    return named
