"""Column values: texts, images and whole items from the cells of a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unime_st.data.images import ImageRef, resolve_inside
from unime_st.data.items import Item
from unime_st.data.parquet_shards import split_zip_path


def as_item(value: object, root: Path) -> Item:
    """Build an item from a value of a column of whole items.

    Args:
        value: A text; an image (see :func:`as_image`, except paths); or {"text": ..., "image": ...}.
        root: Folder that image paths are relative to.

    Returns:
        Item: The item.

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
    """Build an image reference from a value of an image column.

    Args:
        value: Encoded bytes, a path relative to ``root`` (or ``zip://member::archive``), or the {"bytes", "path"}
            struct of a `datasets` Image column.
        root: Folder that contains the images.

    Returns:
        ImageRef: Reference to the undecoded image.

    Raises:
        ValueError: If the value has another type, or the path lies outside ``root``.
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
    """Convert a value of a text column to text; lists are joined by ", ".

    Args:
        value: Text, number or list.
        column: Name of the column, for the message.

    Raises:
        ValueError: If the value is a struct or bytes.
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, (Mapping, bytes)):
        raise ValueError(f"column {column} contains {type(value).__name__}, expected a text, a number or a list")
    return str(value)


def is_empty(value: object) -> bool:
    """Whether a value of a column is empty: None, an empty text, bytes or list, or a struct of such values.

    Args:
        value: Any value.
    """
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return value is None or value in ("", b"", [])
