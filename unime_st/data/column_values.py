"""Column values: texts, images, videos and whole items from the cells of a table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from unime_st.data.images import ImageRef, resolve_inside
from unime_st.data.items import Item
from unime_st.data.parquet_shards import split_zip_path
from unime_st.data.videos import BadVideoError, VideoRef


def as_item(value: object, root: Path) -> Item:
    """Item of a value of a column of whole items: a text, an image (except paths), or {"text", "image", "video"}.

    Raises:
        ValueError: If the value has another type or is empty.
    """
    if isinstance(value, Mapping) and value.keys() & {"text", "image", "video"}:
        text, image, video = (value.get(name) for name in ("text", "image", "video"))
        if text is not None and not isinstance(text, str):
            raise ValueError(f"text {text!r:.80} is not a string")
        return Item(
            text,
            None if is_empty(image) else as_image(image, root),
            None if is_empty(video) else as_video(video, root),
        )
    if value is None or isinstance(value, str):
        return Item(value)
    return Item(image=as_image(value, root))


def as_image(value: object, root: Path) -> ImageRef:
    """Reference to the undecoded image of a value of an image column, a ValueError for other values and paths outside.

    The value is encoded bytes, a path relative to ``root`` (or ``zip://member::archive``), or the {"bytes", "path"}
    struct of a `datasets` Image column.
    """
    if isinstance(value, Mapping) and value.keys() & {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return ImageRef(data=value)
    if isinstance(value, str) and value:
        member, path = split_zip_path(value)
        return ImageRef(path=str(resolve_inside(root, path)), member=member)
    raise ValueError(f"{value!r:.80} is not an image: expected bytes, a path or {{'bytes', 'path'}}")


def as_video(value: object, root: Path) -> VideoRef:
    """Reference to the undecoded video of a value of a video column, a ValueError for other values and paths outside.

    The value is a path relative to ``root`` of a folder of frames or of a video file, or a list of frames as
    :func:`as_image` takes them. Of a folder or file 8 frames are sampled.
    """
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"} and value.get("path"):
        value = value["path"]
    if isinstance(value, str) and value:
        path = str(resolve_inside(root, value))
        if not os.path.exists(path):
            raise BadVideoError(f"video {path}: no such file or folder")
        return VideoRef.of(path)
    if isinstance(value, (list, tuple)) and value:
        return VideoRef.of_frames([as_image(frame, root) for frame in value])
    raise ValueError(f"{value!r:.80} is not a video: expected the path of a file or a folder, or a list of frames")


def as_text(value: object, column: str) -> str:
    """Text of a value of a text column; lists are joined by ", ", and a struct or bytes are a ValueError."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, (Mapping, bytes)):
        raise ValueError(f"column {column} contains {type(value).__name__}, expected a text, a number or a list")
    return str(value)


def is_empty(value: object) -> bool:
    """Whether a value of a column is empty: None, an empty text, bytes or list, or a struct of such values."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return value is None or value in ("", b"", [])
