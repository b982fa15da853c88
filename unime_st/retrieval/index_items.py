"""Items of a search index: pairing with ids, and resumable encoding of the distinct ones."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from unime_st.data.images import BadImageError
from unime_st.data.items import Item
from unime_st.data.manifest import StageConflictError
from unime_st.data.parquet_shards import ItemReader, ItemWriter
from unime_st.data.records import RecordSet
from unime_st.encoding import VectorShards, encode_to_shards
from unime_st.encoding.model_inputs import ModelInput, as_item
from unime_st.files import digest, folder_lock
from unime_st.retrieval.item_vectors import chunk_encoder, encode_once

logger = logging.getLogger(__name__)


class IndexedItems:
    """Items by position: those at ``positions`` of a folder, then those in memory."""

    def __init__(self, reader: ItemReader | None, positions: np.ndarray, extra: Iterable[Item] = ()) -> None:
        self.reader, self.positions, self.extra = reader, positions, list(extra)

    def __getitem__(self, position: int) -> Item:
        if position >= len(self.positions):
            return self.extra[position - len(self.positions)]
        assert self.reader is not None
        return self.reader.at(int(self.positions[position]))

    def load_all(self) -> None:
        """Read all items into memory, so that their folder may be removed."""
        assert self.reader is not None
        wanted = set(self.positions.tolist())
        stored = {position: item for position, item in enumerate(self.reader) if position in wanted}
        self.extra = [stored[position] for position in self.positions.tolist()] + self.extra
        self.reader, self.positions = None, np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class EncodingOptions:
    """How the items of an index are encoded, as for :func:`~unime_st.encoding.encode_items`; no prompt is None."""

    prompt: str | None
    truncate_dim: int | None
    batch_size: int
    show_progress_bar: bool


def with_ids(
    items: Iterable[ModelInput], ids: Iterable[str] | None, used: Iterable[str] = ()
) -> Iterator[tuple[str, Item]]:
    """Pair items with their ids, which are the positions if there are none; ``used`` ids may not occur.

    Raises:
        ValueError: If an id occurs twice, the numbers of items and ids differ, or an input cannot be an item.

    Example:
        >>> from unime_st.retrieval.index_items import with_ids
        >>> list(with_ids(["a star"], None))
        [('0', Item(text='a star'))]
    """
    seen = set(used)
    names = iter(map(str, ids)) if ids is not None else None
    for position, value in enumerate(items):
        name = str(position) if names is None else next(names, None)
        if name is None:
            raise ValueError(f"there are more items than ids ({position})")
        if name in seen:
            raise ValueError(f"id {name!r} occurs twice")
        seen.add(name)
        try:
            yield name, as_item(value)
        except ValueError as error:
            raise ValueError(f"item {position} ({name}): {error}") from error
    if names is not None and next(names, None) is not None:
        raise ValueError("there are more ids than items")


@contextmanager
def work_folder(folder: str | Path | None) -> Iterator[Path]:
    """Folder for the intermediate files of a build, held by this process.

    It is kept after an error, so that the build resumes. An index in memory (None) uses a temporary one.

    Raises:
        FolderInUseError: If another process builds the same index.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    kept = unfinished_build(folder)
    with folder_lock(kept, wait=False):
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        shutil.rmtree(kept, ignore_errors=True)


def check_output(folder: str | Path | None, *, overwrite: bool) -> None:
    """Refuse a folder for a new index.

    Raises:
        FileExistsError: If it exists and ``overwrite`` is False.
        FolderInUseError: If another process builds an index there.
    """
    if folder is None:
        return
    if Path(folder).exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another folder or pass overwrite=True (--overwrite)")
    with folder_lock(unfinished_build(folder), wait=False):
        pass


def unfinished_build(folder: str | Path) -> Path:
    """Folder of the intermediate files of an index in ``folder``."""
    return Path(f"{folder}.build")


def encode_named(
    named: Iterable[tuple[str, Item]],
    model: SentenceTransformer,
    work: Path,
    image_root: str | Path | None,
    options: EncodingOptions,
) -> tuple[list[str], IndexedItems, np.ndarray]:
    """Write the distinct items to a folder, encode them to shards, and gather the vectors of all items.

    Returns:
        tuple[list[str], IndexedItems, np.ndarray]: Ids, items and float32 vectors of the readable items.
    """
    shutil.rmtree(work / "items", ignore_errors=True)
    (work / "items").mkdir(parents=True)
    writer = ItemWriter(work / "items", image_root)
    names, hashes = [], []
    with writer.shards:
        for name, item in named:
            try:
                hashes.append(writer.add(item))
                names.append(name)
            except BadImageError as error:
                logger.warning("%s is left out: %s", name, error)
    reader = ItemReader(work / "items", image_root)
    # The items are part of the name, so that an interrupted build resumes only with the same ones.
    target = work / f"vectors-{digest(*reader.ids, length=16)}"

    def encode(*, overwrite: bool) -> VectorShards:
        return encode_to_shards(
            model, reader, target, on_error="skip", overwrite=overwrite, prompt=options.prompt or "",
            truncate_dim=options.truncate_dim, batch_size=options.batch_size,
            show_progress_bar=options.show_progress_bar,
        )  # fmt: skip

    try:
        shards = encode(overwrite=False)
    except StageConflictError:  # of another model or prompt
        shards = encode(overwrite=True)
    return _readable(names, reader, reader.positions(hashes), shards)


def encode_records(
    records: RecordSet,
    model: SentenceTransformer,
    identity: Mapping[str, object],
    vectors: str | Path,
    batch_size: int,
) -> tuple[list[str], IndexedItems, np.ndarray]:
    """Gather the vectors of all distinct positives of records from a folder shared with mining; as :func:`encode_named`.

    Vectors that are absent are encoded.

    Raises:
        StageConflictError: If the vectors are those of other records, another model or another prompt.
    """
    prompt = identity["prompt"]
    embed = chunk_encoder(records, model, prompt=str(prompt or ""), batch_size=batch_size)
    shards = encode_once(records, identity, vectors, embed)
    names = records.positive_ids
    return _readable(names, records.items, records.items.positions(names), shards)


def _readable(
    names: list[str], reader: ItemReader, positions: np.ndarray, shards: VectorShards
) -> tuple[list[str], IndexedItems, np.ndarray]:
    vectors = shards[positions]
    readable = ~np.isnan(vectors[:, 0])
    for row in np.flatnonzero(~readable).tolist():
        logger.warning("%s is left out: its image or video cannot be decoded", names[row])
    kept = [name for name, good in zip(names, readable, strict=True) if good]
    return kept, IndexedItems(reader, positions[readable]), np.ascontiguousarray(vectors[readable])
