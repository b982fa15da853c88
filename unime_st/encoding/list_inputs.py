"""List encoding for :meth:`unime_st.UniME.encode`: a list of inputs to one tensor."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from sentence_transformers import SentenceTransformer

from unime_st.encoding.content_keys import content_key
from unime_st.encoding.engine import encode_into
from unime_st.encoding.model_inputs import normalize_input
from unime_st.encoding.vector_shards import MemorySink


def encode_list(
    model: SentenceTransformer,
    inputs: Sequence[object],
    *,
    progress: bool = False,
    on_cpu: bool = True,
    **options: object,
) -> torch.Tensor:
    """Encode a list of inputs to a tensor of shape (len(inputs), dim) in the dtype of the model.

    With ``on_cpu`` vectors move to the CPU as they are computed. ``options`` are those of
    :class:`~unime_st.encoding.batch_runner.BatchRunner`.
    """
    results = MemorySink()
    options["output_device"] = "cpu" if on_cpu else None
    encode_into(model, inputs, results, on_error="raise", progress=progress, total=len(inputs), **options)
    vectors = results.tensor()
    return torch.tensor([], device=model.device) if vectors is None else vectors


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
