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

_SHORT_TEXTS, _CHARACTERS, _LEAST_FILLED = 32, 256, 0.7
"""The same for distinct short texts: their number, characters of the longest, and least share of characters in the padded
batch."""


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
    if not progress and _fit_one_batch(inputs, options.get("batch_size", _SHORT_TEXTS)):
        vectors = _encode_one_batch(model, inputs, on_cpu=on_cpu, **options)
        if vectors is not None:
            return vectors
    results = MemorySink()
    options["output_device"] = "cpu" if on_cpu else None
    encode_into(model, inputs, results, on_error="raise", progress=progress, total=len(inputs), **options)
    vectors = results.tensor()
    return torch.tensor([], device=model.device) if vectors is None else vectors


def _fit_one_batch(inputs: Sequence[object], batch_size: int) -> bool:
    """Whether counting the tokens of the inputs and looking for duplicates would cost more time than they save."""
    if not 0 < len(inputs) <= min(batch_size, _SHORT_TEXTS):
        return False
    if any(map(looks_like_image_path, inputs)):  # the engine warns of those that are encoded as texts
        return False
    if len(inputs) <= _FEW:
        return len(inputs) == 1 or not any(is_chat(value) or has_video(value) for value in inputs)
    texts = [value for value in inputs if isinstance(value, str) and not is_media(value)]
    lengths = [len(text) for text in texts]
    if len(set(texts)) < len(inputs) or max(lengths) > _CHARACTERS:
        return False
    return sum(lengths) >= _LEAST_FILLED * len(lengths) * max(lengths)


def _encode_one_batch(
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
