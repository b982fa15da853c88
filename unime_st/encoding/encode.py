"""Encoding functions: items to an array, to a stream of windows, or to shards on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from unime_st.data.manifest import StageConflictError, begin_stage, finish_stage
from unime_st.data.validation import RejectedWriter
from unime_st.encoding.engine import encode_into
from unime_st.encoding.item_keys import ItemKeys
from unime_st.encoding.model_identity import model_fingerprint
from unime_st.encoding.model_inputs import ModelInput
from unime_st.encoding.vector_shards import MemorySink, ShardSink, VectorShards, VectorSink
from unime_st.files import locks_folder

Device = str | torch.device | Sequence[str | torch.device] | None


class _Options(TypedDict, total=False):
    """Options of :func:`encode_items` beside ``on_error``, which decides what it returns."""

    batch_size: int
    token_budget: int | None
    workers: int | None
    device: Device
    prompt: str | None
    truncate_dim: int | None
    normalize_embeddings: bool
    show_progress_bar: bool
    reasons: dict[int, str] | None


@overload
def encode_items(
    model: SentenceTransformer,
    items: Iterable[ModelInput],
    *,
    on_error: Literal["raise"] = ...,
    **options: Unpack[_Options],
) -> np.ndarray: ...


@overload
def encode_items(
    model: SentenceTransformer, items: Iterable[ModelInput], *, on_error: Literal["skip"], **options: Unpack[_Options]
) -> tuple[np.ndarray, np.ndarray]: ...


def encode_items(
    model: SentenceTransformer,
    items: Iterable[ModelInput],
    *,
    batch_size: int = 64,
    token_budget: int | None = None,
    workers: int | None = None,
    device: Device = None,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    normalize_embeddings: bool = False,
    show_progress_bar: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    reasons: dict[int, str] | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Encode items. Equal items are encoded once, and images are decoded only for the current batches.

    Args:
        model: A Sentence Transformers model that supports the modalities of the items.
        items: Sequence or iterator of items, or of any inputs of ``SentenceTransformer.encode``.
        batch_size: Size of a forward pass in units of 256 tokens, so that batches contain more short items and fewer
            long ones. Defaults to 64. On a CPU a batch never exceeds 2048 tokens.
        token_budget: Maximum number of tokens of a forward pass, padding included. Defaults to None, derived from
            ``batch_size``.
        workers: Number of threads that decode images ahead of the device. Defaults to None, derived from the number
            of cores.
        device: Device, or list of devices with one copy of the model each. Defaults to None, the model's device.
        prompt: Instruction that is added to every item. Defaults to None, the default prompt of the model, as in
            ``SentenceTransformer.encode``; "" adds none.
        truncate_dim: Number of leading dimensions to keep; the vectors are normalized again. Defaults to None, the
            setting of the model.
        normalize_embeddings: Scale vectors to unit length. Defaults to False.
        show_progress_bar: Show a progress bar over items. Defaults to False.
        on_error: "raise" stops at the first item that cannot be read. "skip" leaves its row NaN and marks it in the
            returned mask. Defaults to "raise".
        reasons: Dictionary that is filled with the reason for every row without a vector. Defaults to None.

    Returns:
        np.ndarray: float32 vectors of shape (num_items, dim) as the model computes them (unit length for UniME
        models). With ``on_error="skip"``, a tuple of the vectors and a boolean mask of shape (num_items,), which is
        True for rows with a vector.

    Raises:
        BadImageError: If an image cannot be decoded and ``on_error`` is "raise"; the message names the item.
        TypeError: If ``items`` is a single item.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> from unime_st import Item
        >>> from unime_st.encoding import encode_items
        >>> model = SentenceTransformer("unime-tiny", device="cpu")
        >>> encode_items(model, [Item("a red square"), Item("a blue circle")]).shape
        (2, 128)
    """
    results = MemorySink()
    failed = encode_into(
        model, items, results, on_error=on_error, batch_size=batch_size, token_budget=token_budget, workers=workers,
        device=device, prompt=resolve_prompt(model, prompt), progress=show_progress_bar, total=_length(items),
        **{"normalize_embeddings": normalize_embeddings, **_truncation(model, truncate_dim)},
    )  # fmt: skip
    if reasons is not None:
        reasons.update(failed)
    made = results.tensor()
    if made is None:
        vectors = np.full((results.size, _width(model, truncate_dim)), np.nan, dtype=np.float32)
    else:
        vectors = made.float().cpu().numpy()
    if on_error == "raise":
        return vectors
    mask = np.ones(len(vectors), dtype=bool)
    mask[list(failed)] = False
    return vectors, mask


def encode_stream(
    model: SentenceTransformer,
    items: Iterable[ModelInput],
    results: VectorSink,
    *,
    window: int,
    batch_size: int = 64,
    prompt: str | None = None,
    total: int | None = None,
    show_progress_bar: bool = False,
) -> None:
    """Encode a stream of items and pass the vectors on window by window.

    Arguments that are not listed are those of :func:`encode_items`.

    Args:
        model: The model.
        items: Sequence or iterator, read in another thread one window ahead of the model.
        results: Receives the vectors of each window in stream order.
        window: Number of items that are held in memory and batched by length.
        total: Length of the stream for the progress bar. Defaults to None, unknown.

    Raises:
        BadImageError: If an image cannot be decoded; the message names the item.
    """
    encode_into(
        model, items, results, on_error="raise", window=window, batch_size=batch_size,
        prompt=resolve_prompt(model, prompt),
        total=total, progress=show_progress_bar, **_truncation(model, None),
    )  # fmt: skip


@locks_folder("folder")
def encode_to_shards(
    model: SentenceTransformer,
    items: Iterable[ModelInput],
    folder: str | Path,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    on_error: Literal["raise", "skip"] = "raise",
    overwrite: bool = False,
    batch_size: int = 64,
    token_budget: int | None = None,
    workers: int | None = None,
    device: Device = None,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    source: str | None = None,
    show_progress_bar: bool = True,
) -> VectorShards:
    """Encode a stream of any length to shards on disk. An interrupted call resumes when called with the same stream.

    Memory holds a few batches, one window of 4096 items and about 200 bytes per distinct item to detect duplicates.
    Arguments that are not listed are those of :func:`encode_items`.

    Args:
        model: The model.
        items: Sequence or iterator of items.
        folder: Output folder for ``vectors-00000.npy``, ... and ``rejected.jsonl``, which lists items without a vector.
        dtype: Data type of the files. Defaults to "float32".
        on_error: As for :func:`encode_items`; rows without a vector are NaN.
        overwrite: Replace the vectors of another call. Defaults to False.
        source: Identity of the stream, such as a digest; a folder begun with another one is refused. Defaults to None:
            the items are compared one by one.

    Returns:
        VectorShards: The vectors on disk. A finished folder of the same model and items is returned as it is.

    Raises:
        StageConflictError: If the folder contains vectors of another model or other items and ``overwrite`` is False.
        BadImageError: If an image cannot be decoded and ``on_error`` is "raise".

    Example:
        >>> import tempfile
        >>> from unime_st import Item, UniME
        >>> from unime_st.encoding import encode_to_shards
        >>> captions = (Item(text) for text in ("a red square", "a blue circle"))
        >>> vectors = encode_to_shards(
        ...     UniME("unime-tiny", device="cpu"), captions, tempfile.mkdtemp(), show_progress_bar=False
        ... )
        >>> len(vectors), vectors[0].shape
        (2, (128,))
    """
    folder = Path(folder)
    dim = _width(model, truncate_dim)
    prompt = resolve_prompt(model, prompt)
    options = {"model": model_fingerprint(model), "dtype": dtype, "prompt": prompt, "dim": dim}
    options |= {} if source is None else {"source": source}
    keys = ItemKeys(folder) if source is None else None
    length = _length(items)
    if not begin_stage(folder, "encode", inputs=[], options=options, overwrite=overwrite):
        found = VectorShards(folder)
        if keys is not None:
            if length is not None and length != len(found):
                raise StageConflictError(f"{folder} holds {len(found)} vectors, not {length}: choose another folder")
            keys.compare(iter(items), len(found.shards()), len(found), finished=True)
        return found
    shards = ShardSink(folder, dim, np.dtype(dtype), keys)
    with RejectedWriter(folder) as rejected:
        for row in shards.without_vector():
            rejected.add("no vector; the reason was reported by the interrupted run before this one", row=row)
        total = None if length is None else max(0, length - shards.before)
        stream = iter(items)
        if keys is None:
            rest: Iterator[ModelInput] = islice(stream, shards.before, None)
        else:
            keys.compare(stream, len(shards.sizes), shards.before)
            rest = keys.record(stream)
        failed = encode_into(
            model, rest, shards, on_error=on_error, batch_size=batch_size, token_budget=token_budget, workers=workers,
            device=device, prompt=prompt, progress=show_progress_bar, total=total, **_truncation(model, truncate_dim),
        )  # fmt: skip
        for row, reason in sorted(failed.items()):
            rejected.add(reason, row=row + shards.before)
    facts = {"dim": shards.dim, "rows": sum(shards.sizes), "shards": shards.sizes, "rejected": rejected.count}
    finish_stage(folder, facts)
    return VectorShards(folder)


def resolve_prompt(model: SentenceTransformer, prompt: str | None) -> str | None:
    """Prompt that ``SentenceTransformer.encode`` would use: the given one ("" is none), or the model's default."""
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"prompt must be a text or None, got {prompt!r:.80}")
    if prompt is None and model.default_prompt_name is not None:
        prompt = model.prompts.get(model.default_prompt_name)
    return prompt or None


def _length(items: Iterable[ModelInput]) -> int | None:
    return len(items) if isinstance(items, Sized) else None


def _width(model: SentenceTransformer, truncate_dim: int | None) -> int:
    # The option of a call overrides the setting of the model, even if that one is smaller.
    with nullcontext() if truncate_dim is None else model.truncate_embeddings(truncate_dim):
        return model.get_embedding_dimension() or 0


def _truncation(model: SentenceTransformer, truncate_dim: int | None) -> dict[str, int | bool]:
    kept = model.truncate_dim if truncate_dim is None else truncate_dim
    return {} if kept is None else {"truncate_dim": kept, "normalize_embeddings": True}
