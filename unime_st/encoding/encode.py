"""Items in, vectors out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from unime_st.data.items import Item
from unime_st.data.manifest import begin_stage, finish_stage
from unime_st.data.validation import RejectedWriter
from unime_st.encoding.engine import encode_into
from unime_st.encoding.model_identity import weights_fingerprint
from unime_st.encoding.vector_shards import MemorySink, ShardSink, VectorShards, VectorSink

Device = str | torch.device | Sequence[str | torch.device] | None


@overload
def encode_items(
    model: SentenceTransformer,
    items: Iterable[Item],
    *,
    batch_size: int = ...,
    token_budget: int | None = ...,
    workers: int | None = ...,
    device: Device = ...,
    prompt: str | None = ...,
    truncate_dim: int | None = ...,
    show_progress_bar: bool = ...,
    on_error: Literal["raise"] = ...,
    reasons: dict[int, str] | None = ...,
) -> np.ndarray: ...


@overload
def encode_items(
    model: SentenceTransformer,
    items: Iterable[Item],
    *,
    batch_size: int = ...,
    token_budget: int | None = ...,
    workers: int | None = ...,
    device: Device = ...,
    prompt: str | None = ...,
    truncate_dim: int | None = ...,
    show_progress_bar: bool = ...,
    on_error: Literal["skip"],
    reasons: dict[int, str] | None = ...,
) -> tuple[np.ndarray, np.ndarray]: ...


def encode_items(
    model: SentenceTransformer,
    items: Iterable[Item],
    *,
    batch_size: int = 64,
    token_budget: int | None = None,
    workers: int | None = None,
    device: Device = None,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    show_progress_bar: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    reasons: dict[int, str] | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Embed items; equal items are embedded once, and pixels exist only for the batches at hand.

    Args:
        model: Any Sentence Transformers model that takes the modalities at hand.
        items: Items, as a sequence or an iterator; what ``SentenceTransformer.encode`` takes is welcome, too.
        batch_size: Size of a forward pass, in rows of 256 tokens: batches hold more short items and fewer long ones.
            Defaults to 64; on a CPU a batch stays below 1024 tokens whatever this says.
        token_budget: Most tokens of a forward pass, padding included. Defaults to None: by ``batch_size``.
        workers: Threads that decode images ahead of the device. Defaults to None: by the number of cores.
        device: Where to run; a list runs a copy of the model on each. Defaults to None, where the model is.
        prompt: Instruction that goes with every item. Defaults to None.
        truncate_dim: Leading dimensions to keep, scaled to unit length again. Defaults to None: those of the model.
        show_progress_bar: Show progress over items. Defaults to False.
        on_error: "raise" (default) stops at the first item that cannot be read; "skip" leaves its row NaN and says so
            in the returned mask.
        reasons: Filled with row -> why there is no vector.

    Returns:
        np.ndarray: float32 of shape (number of items, dim), as the model gives them (UniME models: unit length). With
        ``on_error="skip"`` a tuple of it and a boolean mask of shape (number of items,), True where there is a vector.

    Raises:
        BadImageError: If an image cannot be decoded and ``on_error`` is "raise"; the message names the item.
        TypeError: If ``items`` is a single item.

    Example:
        ::

            from sentence_transformers import SentenceTransformer
            from unime_st import Item
            from unime_st.encoding import encode_items

            model = SentenceTransformer("unime-tiny")
            vectors = encode_items(model, [Item("a red square"), Item("a blue circle")])
            print(vectors @ vectors.T)
    """
    results = MemorySink()
    failed = encode_into(
        model, items, results, on_error=on_error, batch_size=batch_size, token_budget=token_budget, workers=workers,
        device=device, prompt=prompt, progress=show_progress_bar, total=_length(items),
        **_truncation(model, truncate_dim),
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
    items: Iterable[Item],
    results: VectorSink,
    *,
    window: int,
    batch_size: int = 64,
    total: int | None = None,
    show_progress_bar: bool = False,
) -> None:
    """Embed a stream, and hand vectors over as they are made.

    Args:
        model: As for :func:`encode_items`.
        items: A sequence or an iterator; it is read in another thread, a window ahead of the model.
        results: Takes float vectors in the order of the stream, a window at a time.
        window: Items that are held at once, and among which like lengths are sought.
        batch_size: As for :func:`encode_items`.
        total: Length of the stream for the progress bar, where it is known.
        show_progress_bar: Show progress over items. Defaults to False.

    Raises:
        BadImageError: If an image cannot be decoded; the message names the item.
    """
    encode_into(
        model, items, results, on_error="raise", window=window, batch_size=batch_size, total=total,
        progress=show_progress_bar, **_truncation(model, None),
    )  # fmt: skip


def encode_to_shards(
    model: SentenceTransformer,
    items: Iterable[Item],
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
    show_progress_bar: bool = True,
) -> VectorShards:
    """Embed a stream of any length straight to disk. Killed and called again with the same stream, it goes on there.

    Memory holds a few batches, one stretch of 4096 items and, to know repeats, about 200 bytes for each distinct item.

    Args:
        model: As for :func:`encode_items`.
        items: A sequence or an iterator.
        folder: Where ``vectors-00000.npy``, ... go, and ``rejected.jsonl`` with the items that have no vector.
        dtype: Type in the files. Defaults to "float32".
        on_error: As for :func:`encode_items`; rows without a vector are NaN.
        overwrite: Replace what another call wrote. Defaults to False.
        batch_size: As for :func:`encode_items`, and so are the options up to ``truncate_dim``.
        token_budget: Most tokens of a forward pass.
        workers: Threads that decode images.
        device: Where to run.
        prompt: Instruction that goes with every item.
        truncate_dim: Leading dimensions to keep.
        show_progress_bar: Show progress over items. Defaults to True.

    Returns:
        VectorShards: The vectors, on disk. A folder that was finished with the same model is returned as it is: the
        stream itself is not compared.

    Raises:
        StageConflictError: If the folder holds vectors of another model and ``overwrite`` is False.
        BadImageError: If an image cannot be decoded and ``on_error`` is "raise".

    Example:
        ::

            from unime_st import Item, UniME
            from unime_st.encoding import encode_to_shards

            captions = (Item(line) for line in open("captions.txt") if line.strip())
            vectors = encode_to_shards(UniME("unime-tiny"), captions, "runs/captions")
            print(len(vectors), vectors[0].shape)
    """
    folder = Path(folder)
    dim = _width(model, truncate_dim)
    options = {"model": weights_fingerprint(model), "dtype": dtype, "prompt": prompt, "dim": dim}
    if not begin_stage(folder, "encode", inputs=[], options=options, overwrite=overwrite):
        return VectorShards(folder)
    shards = ShardSink(folder, dim, np.dtype(dtype))
    with RejectedWriter(folder) as rejected:
        for row in shards.without_vector():
            rejected.add("no vector, for a reason that the run before this one met", row=row)
        length = _length(items)
        total = None if length is None else max(0, length - shards.before)
        rest = islice(items, shards.before, None)
        failed = encode_into(
            model, rest, shards, on_error=on_error, batch_size=batch_size, token_budget=token_budget, workers=workers,
            device=device, prompt=prompt, progress=show_progress_bar, total=total, **_truncation(model, truncate_dim),
        )  # fmt: skip
        for row, reason in sorted(failed.items()):
            rejected.add(reason, row=row + shards.before)
    facts = {"dim": shards.dim, "rows": sum(shards.sizes), "shards": shards.sizes, "rejected": rejected.count}
    finish_stage(folder, facts)
    return VectorShards(folder)


def _length(items: Iterable[Item]) -> int | None:
    return len(items) if isinstance(items, Sized) else None


def _width(model: SentenceTransformer, truncate_dim: int | None) -> int:
    # Given in a call, it takes the place of the model's own, also where that is smaller.
    with nullcontext() if truncate_dim is None else model.truncate_embeddings(truncate_dim):
        return model.get_embedding_dimension() or 0


def _truncation(model: SentenceTransformer, truncate_dim: int | None) -> dict[str, Any]:
    kept = model.truncate_dim if truncate_dim is None else truncate_dim
    return {} if kept is None else {"truncate_dim": kept, "normalize_embeddings": True}
