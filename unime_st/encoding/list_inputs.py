"""The engine as :meth:`unime_st.UniME.encode` uses it: a list of inputs, one tensor."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from unime_st.encoding.engine import encode_into
from unime_st.encoding.model_inputs import content_key
from unime_st.encoding.vector_shards import MemorySink


def embed_list(
    model: SentenceTransformer, inputs: list[Any], *, progress: bool = False, on_cpu: bool = True, **how: Any
) -> torch.Tensor:
    """Embed a list of inputs.

    Args:
        model: The embedder.
        inputs: Items or whatever ``SentenceTransformer.encode`` takes.
        progress: Show a progress bar.
        on_cpu: Bring vectors to the CPU as they are made.
        **how: Options of :class:`~unime_st.encoding.batch_runner.BatchRunner`.

    Returns:
        torch.Tensor: Of shape (len(inputs), dim), in the type of the model.
    """
    results = MemorySink()
    how["output_device"] = "cpu" if on_cpu else None
    encode_into(model, inputs, results, on_error="raise", progress=progress, total=len(inputs), **how)
    made = results.tensor()
    return torch.tensor([], device=model.device) if made is None else made


def distinct_inputs(inputs: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Leave out repeats.

    Args:
        inputs: Items or whatever ``SentenceTransformer.encode`` takes.

    Returns:
        tuple: The distinct inputs in order, and for every input its place among them.
    """
    index: dict[Hashable, int] = {}
    distinct: list[Any] = []
    indices: list[int] = []
    for value in inputs:
        key = content_key(value)
        if key not in index:
            index[key] = len(distinct)
            distinct.append(value)
        indices.append(index[key])
    return distinct, indices
