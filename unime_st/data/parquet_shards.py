"""Parquet shards of rows and items: written atomically, read by position one row group at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unime_st.data.images import ImageRef, resolve_inside
from unime_st.data.items import Item
from unime_st.data.manifest import record_shard
from unime_st.data.videos import VideoRef
from unime_st.files import commit_file, temporary_path

_IMAGE_TYPE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
_VIDEO_TYPE = pa.struct(
    [pa.field("frames", pa.list_(_IMAGE_TYPE)), pa.field("path", pa.string()), pa.field("num_frames", pa.int32())]
)
ITEM_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("image", _IMAGE_TYPE),
        pa.field("video", _VIDEO_TYPE),
    ]
)
"""One row per distinct item. ``image.path`` and the paths of a video are relative to the "image_root" of the manifest. An
entry of a zip archive is stored as ``zip://member::archive``, as in `datasets`. Folders of earlier versions have no
``video``."""

Row = dict[str, Any]
"""Row of a table: values by column."""

_GROUP_ROWS = 1024
_GROUP_BYTES = 4 << 20
_SHARD_BYTES = 512 << 20
_CACHED_BYTES = 128 << 20
_ZIP = "zip://"


class ShardWriter:
    """Writer of rows to ``<stem>-00000.parquet``, ``<stem>-00001.parquet``, ... in bounded memory.

    Args:
        folder: Existing folder.
        stem: Prefix of the file names.
        schema: Arrow schema of the rows.
        first_shard: Number of the first file. Defaults to 0.
        group_rows: Maximum number of rows per row group, the unit of reading. Defaults to 1024.
        resumable: Write down the digest of every file, for a stage that goes on from finished files. Defaults to False.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        schema: pa.Schema,
        *,
        first_shard: int = 0,
        group_rows: int = _GROUP_ROWS,
        resumable: bool = False,
    ) -> None:
        self.folder, self.stem, self.schema = Path(folder), stem, schema
        self.shard, self.group_rows, self.rows = first_shard, group_rows, 0
        self.resumable = resumable
        self._buffer: list[Row] = []
        self._buffered = self._written = 0
        self._file: pq.ParquetWriter | None = None

    def add(self, row: Row, size: int = 0) -> None:
        """Append one row; ``size`` is the number of bytes of its large values."""
        self._buffer.append(row)
        self._buffered += size
        self.rows += 1
        if len(self._buffer) >= self.group_rows or self._buffered >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write the buffered rows and commit the last file. A writer without rows commits one empty file."""
        if self._buffer or (self._file is None and self.rows == 0):
            self._flush()
        self._publish()

    def abort(self) -> None:
        """Discard the file in progress."""
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._file = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def _temporary(self) -> Path:
        return temporary_path(self._final)

    @property
    def _final(self) -> Path:
        return self.folder / f"{self.stem}-{self.shard:05d}.parquet"

    def _flush(self) -> None:
        if self._file is None:
            # Encoded images do not compress, and dictionary encoding would only duplicate them.
            compression = {name: "none" if name.endswith("bytes") else "zstd" for name in _leaves(self.schema)}
            self._file = pq.ParquetWriter(
                self._temporary, self.schema, compression=compression, use_dictionary="image" not in self.schema.names
            )
        self._file.write_table(pa.Table.from_pylist(self._buffer, schema=self.schema))
        self._written += self._buffered
        self._buffer, self._buffered = [], 0
        if self._written >= _SHARD_BYTES:
            self._publish()

    def _publish(self) -> None:
        if self._file is None:
            return
        self._file.close()
        if self.resumable:
            record_shard(self.folder, self._temporary, self._final.name)
        commit_file(self._temporary, self._final)
        self._file, self._written = None, 0
        self.shard += 1


class ShardReader:
    """Reader of ``<stem>-*.parquet`` by position, which caches at most 128 MiB of row groups.

    Args:
        folder: Folder of the shards.
        stem: Prefix of the file names.

    Attributes:
        names: Names of the columns.

    Raises:
        FileNotFoundError: If there is no such shard.
        ValueError: If a shard cannot be read.
    """

    def __init__(self, folder: str | Path, stem: str) -> None:
        self.folder, self.stem = Path(folder), stem
        self.paths = sorted(self.folder.glob(f"{stem}-*.parquet"))
        if not self.paths:
            raise FileNotFoundError(f"{folder}: no {stem}-*.parquet")
        self._files = [_opened(path) for path in self.paths]
        self.names: list[str] = self._files[0].schema_arrow.names
        self._groups = [(file, number) for file in self._files for number in range(file.num_row_groups)]
        sizes = [file.metadata.row_group(number).num_rows for file, number in self._groups]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._cache: OrderedDict[int, dict[str, pa.Array]] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> Row:
        """Return one row, 0 <= index < len(self), as Python values."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.folder}")
        group = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        return {name: column[index - start].as_py() for name, column in self._group(group).items()}

    def rows(self) -> Iterator[Row]:
        """Iterate over all rows in order, one row group at a time."""
        for file, number in self._groups:
            yield from file.read_row_group(number, use_threads=False).to_pylist()

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a whole top-level column."""
        return self.table([name]).column(name)

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """Return the whole table, or some of its top-level columns."""
        return pa.concat_tables([file.read(columns=columns, use_threads=False) for file in self._files])

    def _group(self, group: int) -> dict[str, pa.Array]:
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            file, number = self._groups[group]
            # Arrow's thread pool does not survive the fork of data loader workers.
            table = file.read_row_group(number, use_threads=False).combine_chunks()
            columns = {name: table.column(name).chunk(0) for name in table.column_names}
            self._cache[group] = columns
            self._cached_bytes += _nbytes(columns)
            while self._cached_bytes > _CACHED_BYTES and len(self._cache) > 1:
                self._cached_bytes -= _nbytes(self._cache.popitem(last=False)[1])
            return columns


class ItemWriter:
    """Writer of items that stores every distinct item once.

    Args:
        folder: Existing folder.
        image_root: Image and video files below this folder are stored as relative paths, all other images as bytes and
            other videos as their sampled frames. Defaults to None, which stores no path and makes the folder
            self-contained.
    """

    def __init__(self, folder: Path, image_root: str | Path | None = None) -> None:
        self.root = None if image_root is None else Path(image_root).resolve()
        self.shards = ShardWriter(folder, "items", ITEM_SCHEMA)
        self._seen: set[bytes] = set()

    def add(self, item: Item) -> str:
        """Store an item unless it was stored before, and return its id.

        Raises:
            BadImageError: If its image or its video cannot be read.
        """
        key = bytes.fromhex(item.id)
        if key not in self._seen:
            image = None if item.image is None else self._image(item.image)
            video = None if item.video is None else self._video(item.video)
            images = [*([image] if image else []), *(video["frames"] if video else [])]
            size = len(item.text or "") + sum(len(entry.get("bytes") or b"") for entry in images)
            self.shards.add({"id": item.id, "text": item.text, "image": image, "video": video}, size)
            self._seen.add(key)
        return item.id

    def _image(self, image: ImageRef) -> Row:
        if (relative := self._relative(image.path)) is not None:
            return {"path": f"{_ZIP}{image.member}::{relative}" if image.member is not None else relative}
        return {"bytes": image.read()}

    def _video(self, video: VideoRef) -> Row:
        if (relative := self._relative(video.path)) is not None:
            return {"frames": [], "path": relative, "num_frames": video.num_frames}
        return {"frames": list(map(self._image, video.stored_frames())), "num_frames": video.num_frames}

    def _relative(self, path: str | None) -> str | None:
        """Path below the root, None for another one."""
        if self.root is None or path is None:
            return None
        resolved = Path(path).resolve()
        return resolved.relative_to(self.root).as_posix() if resolved.is_relative_to(self.root) else None


class ItemReader:
    """Reader of the items of a stage folder, by id or position. Images and videos stay undecoded.

    Args:
        folder: A stage folder.
        image_root: Folder that stored image paths are relative to. Defaults to None, the stage folder.
    """

    def __init__(self, folder: str | Path, image_root: str | Path | None = None) -> None:
        self.folder, self.image_root = Path(folder), image_root
        self._shards = ShardReader(folder, "items")
        self._ids: list[str] = self._shards.column("id").to_pylist()
        # A sorted array takes 32 bytes per item, a dict ten times as much.
        keys = np.array([item_id.encode("ascii") for item_id in self._ids], dtype="S32")
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.folder, self.image_root)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> list[str]:
        """Ids of all items in stored order."""
        return list(self._ids)

    @property
    def texts(self) -> list[str | None]:
        """Texts of all items in stored order; None for those without one."""
        return self._shards.column("text").to_pylist()

    def has(self, part: Literal["image", "video"]) -> bool:
        """Whether any item has an image or a video; nothing of it is read."""
        if part not in self._shards.names:  # a folder of an earlier version
            return False
        leaf = "path" if part == "image" else "num_frames"
        column = self._shards.table([f"{part}.{leaf}"]).column(part)
        return column.null_count < len(column)

    def position(self, item_id: str) -> int:
        """Return the position of an item in stored order; KeyError if there is no such item."""
        key = item_id.encode("ascii", "replace")
        index = int(np.searchsorted(self._keys, np.bytes_(key)))
        if index == len(self._keys) or self._keys[index] != key:
            raise KeyError(f"item {item_id!r} is not in {self.folder}")
        return int(self._order[index])

    def positions(self, item_ids: Sequence[str]) -> np.ndarray:
        """Return the positions of items in stored order, int64; KeyError if there is no such item."""
        wanted = np.array([item_id.encode("ascii", "replace") for item_id in item_ids], dtype="S32")
        indices = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        missing = np.flatnonzero(self._keys[indices] != wanted)
        if len(missing):
            raise KeyError(f"item {item_ids[missing[0]]!r} is not in {self.folder}")
        return self._order[indices].astype(np.int64)

    def at(self, position: int) -> Item:
        """Return the item at a position in stored order."""
        return self._build(self._shards.row(position))

    def item(self, item_id: str) -> Item:
        """Return the item with an id.

        Raises:
            KeyError: If there is no such item.
            BadImageError: If its stored path lies outside the image root.
        """
        return self._build(self._shards.row(self.position(item_id)))

    def __iter__(self) -> Iterator[Item]:
        return (self._build(row) for row in self._shards.rows())

    def _build(self, row: Row) -> Item:
        image, video = row["image"], row.get("video")
        return Item.stored(
            row["text"],
            None if image is None else self._image(image),
            row["id"],
            None if video is None else self._video(video),
        )

    def _image(self, image: Row) -> ImageRef:
        if image["bytes"] is not None:
            return ImageRef(data=image["bytes"])
        member, path = split_zip_path(image["path"])
        return ImageRef(path=self._path(path), member=member)

    def _video(self, video: Row) -> VideoRef:
        if video["path"] is not None:
            return VideoRef(path=self._path(video["path"]), num_frames=video["num_frames"])
        return VideoRef(tuple(map(self._image, video["frames"])), num_frames=video["num_frames"])

    def _path(self, relative: str) -> str:
        return str(resolve_inside(self.image_root or self.folder, relative))


def split_zip_path(path: str) -> tuple[str | None, str]:
    """Split ``zip://member::archive`` into (member, archive); any other path gives (None, path)."""
    if path.startswith(_ZIP) and "::" in path:
        member, archive = path[len(_ZIP) :].split("::", 1)
        return member, archive
    return None, path


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error}); run the stage that writes it again") from error


def _leaves(schema: pa.Schema) -> list[str]:
    """Names of the columns in the file, which has one for each part of a nested type."""
    return [name for field in schema for name in _leaves_of(field.name, field.type)]


def _leaves_of(name: str, kind: pa.DataType) -> list[str]:
    if pa.types.is_struct(kind):
        return [leaf for child in kind for leaf in _leaves_of(f"{name}.{child.name}", child.type)]
    return _leaves_of(f"{name}.list.element", kind.value_type) if pa.types.is_list(kind) else [name]


def _nbytes(columns: Mapping[str, pa.Array]) -> int:
    return sum(column.nbytes for column in columns.values())
