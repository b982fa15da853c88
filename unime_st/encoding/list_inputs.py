"""List encoding for :meth:`unime_st.UniME.encode`: a list of inputs to one tensor."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from unime_st.encoding.batch_runner import BatchRunner, Job
from unime_st.encoding.content_keys import content_key
from unime_st.encoding.engine import encode_into
from unime_st.encoding.input_videos import has_video
from unime_st.encoding.model_inputs import is_chat, is_media, looks_like_image_path, normalize_input
from unime_st.encoding.vector_shards import MemorySink

_FEW = 4
"""Number of inputs that are encoded as one batch, without threads and without a look for duplicates."""

_SHORT_TEXTS, _CHARACTERS, _EVEN = 32, 256, 0.7
"""Number of short texts that are encoded as one batch, characters of the longest, and least share of the batch that is not
padding."""


def encode_list(
    model: SentenceTransformer,
    inputs: Sequence[object],
    *,
    progress: bool = False,
    on_cpu: bool = True,
    **options: Any,
) -> torch.Tensor:
    """Encode a list of inputs to a tensor of shape (len(inputs), dim) in the dtype of the model.

    With ``on_cpu`` vectors move to the CPU as they are computed. ``options`` are those of
    :class:`~unime_st.encoding.batch_runner.BatchRunner`.
    """
    one_batch = not progress and (
        _are_few(inputs) or _are_short_texts(inputs, options.get("batch_size", _SHORT_TEXTS))
    )
    few = _encode_few(model, inputs, on_cpu=on_cpu, **options) if one_batch else None
    if few is not None:
        return few
    results = MemorySink()
    options["output_device"] = "cpu" if on_cpu else None
    encode_into(model, inputs, results, on_error="raise", progress=progress, total=len(inputs), **options)
    vectors = results.tensor()
    return torch.tensor([], device=model.device) if vectors is None else vectors


def _are_few(inputs: Sequence[object]) -> bool:
    """Whether the inputs can be encoded as one batch; the engine warns of texts that look like the path of an image."""
    if not 0 < len(inputs) <= _FEW or any(map(looks_like_image_path, inputs)):
        return False
    return len(inputs) == 1 or not any(is_chat(value) or has_video(value) for value in inputs)


def _are_short_texts(inputs: Sequence[object], batch_size: int) -> bool:
    """Whether the inputs are distinct texts that fill one batch of few tokens, for which counting them first is not worth
    its time."""
    texts = [value for value in inputs if isinstance(value, str)]
    if not 0 < len(texts) == len(inputs) <= min(batch_size, _SHORT_TEXTS) or len(set(texts)) < len(texts):
        return False
    lengths = [len(text) for text in texts]
    even = sum(lengths) >= _EVEN * len(lengths) * max(lengths)
    plain = not any(looks_like_image_path(text) or is_media(text) for text in texts)
    return max(lengths) <= _CHARACTERS and even and plain


def _encode_few(
    model: SentenceTransformer, inputs: Sequence[object], *, on_cpu: bool, **options: Any
) -> Tensor | None:
    """Encode inputs as one batch; None if something fails, for which the engine finds the input and a remedy."""
    if isinstance(options.get("device"), (list, tuple)):
        return None
    options.pop("batch_size", None)
    try:
        runner = BatchRunner(model, workers=1, single_thread=True, output_device="cpu" if on_cpu else None, **options)
        vectors = runner.encode([Job(row, normalize_input(value)) for row, value in enumerate(inputs)])
    except (RuntimeError, MemoryError, ValueError, TypeError):
        return None
    return None if any(vector is None for vector in vectors) else torch.stack([v for v in vectors if v is not None])


def distinct_inputs(inputs: Sequence[object]) -> tuple[list[object], list[int]]:
    """Distinct inputs in order, and for every input its index among them."""
    index: dict[Hashable, int] = {}
    distinct: list[object] = []
    indices: list[int] = []
    for value in inputs:
        try:
            key = content_key(normalize_input(value))
        except ValueError:  # reported when it is encoded
            key = object()
        if key not in index:
            index[key] = len(distinct)
            distinct.append(value)
        indices.append(index[key])
    return distinct, indices
