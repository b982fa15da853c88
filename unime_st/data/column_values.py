"""Column values: texts, images and whole items from the cells of a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unime_st.data.images import ImageRef, resolve_inside
from unime_st.data.items import Item
from unime_st.data.parquet_shards import split_zip_path


def as_item(value: object, root: Path) -> Item:
    """Item of a value of a column of whole items: a text, an image (except paths), or {"text": ..., "image": ...}.

    Raises:
        ValueError: If the value has another type or is empty.
    """
    if isinstance(value, Mapping) and value.keys() & {"text", "image"}:
        text, image = value.get("text"), value.get("image")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"text {text!r:.80} is not a string")
        return Item(text, None if is_empty(image) else as_image(image, root))
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
