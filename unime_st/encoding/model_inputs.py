"""Model inputs: normalization, texts, image sizes and loading of the inputs of ``encode``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from sentence_transformers.base.modality import (
    is_audio_url_or_path,
    is_image_url_or_path,
    is_message_dict,
    is_video_url_or_path,
)
from sentence_transformers.base.modality_types import SingleInput

from unime_st.data.image_urls import is_url
from unime_st.data.images import BadImageError, ImageRef
from unime_st.data.items import Item
from unime_st.data.videos import VIDEO_SUFFIXES, BadVideoError, VideoRef, check_num_frames, is_frame_list
from unime_st.encoding.input_images import image_of_array, image_size, load_image
from unime_st.encoding.input_videos import is_reference

Features = dict[str, Any]
"""Input of a model's ``forward``: tensors by name, and what else its modules pass on."""

ModelInput = SingleInput | Item
"""An input of ``UniME.encode``: whatever ``SentenceTransformer.encode`` accepts, or an :class:`~unime_st.Item`."""

_UNKNOWN_SIZE = (512, 512)
"""Assumed (width, height) of an image behind a URL."""

_IMAGE_NAME = re.compile(
    r"\S.*\.(png|jpe?g|jpe|jfif|gif|bmp|dib|tiff?|webp|avif|heic|heif|jp2|ico|ppm)", re.IGNORECASE
)
_PARTS = ("text", "image", "audio", "video")


def normalize_input(value: object) -> Any:
    """Bring an item, or any input of ``SentenceTransformer.encode``, into the form that the engine works with.

    Parts that are None (or NaN, as pandas stores a missing value) are removed: ``{"image": image, "text": None}`` is
    the image. Path objects become ``{"image": path}``, those of video files a video, and the ``{"bytes", "path"}``
    structs of the `datasets` library become image references.

    Raises:
        ValueError: If nothing is left of the input.

    Example:
        >>> from unime_st.encoding.model_inputs import normalize_input
        >>> normalize_input({"image": None, "text": "a ship"})
        {'text': 'a ship'}
    """
    if isinstance(value, Item):
        return value
    if _is_absent(value):
        raise ValueError(f"the input is {value!r}; expected a text, an image or both")
    if hasattr(value, "as_py"):  # a scalar of Arrow
        return normalize_input(value.as_py())
    if isinstance(value, VideoRef) or (isinstance(value, (str, os.PathLike)) and _is_video_file(os.fspath(value))):
        return Item(video=value if isinstance(value, VideoRef) else os.fspath(value))
    if isinstance(value, os.PathLike):
        return {"image": os.fspath(value)}
    if isinstance(value, ImageRef):
        return Item(image=value)
    if is_chat(value):
        return (
            _normalize_message(value)
            if isinstance(value, Mapping)
            else list(map(_normalize_message, cast(Iterable[object], value)))
        )
    if isinstance(value, Mapping):
        return _normalize_parts(value)
    return value


def _normalize_parts(parts: Mapping[str, object]) -> dict[str, object]:
    found = {name: _normalize_part(name, part) for name, part in parts.items()}
    kept = {name: part for name, part in found.items() if not (name in _PARTS and _is_absent(part))}
    if not kept or (len(kept) < len(found) and not kept.keys() & set(_PARTS)):
        raise ValueError(f"the input has neither a text nor an image: {dict(parts)!r:.100}")
    return kept


def _normalize_part(name: str, part: object) -> object:
    if name == "video":
        _check_video(part)
    if isinstance(part, (list, tuple)) and name in _PARTS and not (name == "video" and is_frame_list(part)):
        kept = [_normalize_part(name, entry) for entry in part if not _is_absent(entry)]
        return type(part)(kept) if kept else None
    if name == "image":
        if isinstance(part, os.PathLike):
            return os.fspath(part)
        if isinstance(part, Mapping) and part.keys() <= {"bytes", "path"}:
            return _struct_image(part)
    if name == "video" and is_reference(part):
        return VideoRef.of(part)
    return part


def _check_video(video: object) -> None:
    """Raise a BadVideoError for a list without frames, or where one is missing, and for too many frames."""
    if isinstance(video, (list, tuple)):
        if not video or any(map(_is_absent, video)):
            raise BadVideoError(f"a video is a list of frames, and one is missing: {video!r:.100}")
        if is_frame_list(video):
            check_num_frames(len(video), f"<{len(video)} frames>")
    elif isinstance(video, (np.ndarray, torch.Tensor)) and video.ndim == 4:
        check_num_frames(len(video), f"<{len(video)} frames>")


def _is_video_file(path: str) -> bool:
    return path[-5:].lower().endswith(VIDEO_SUFFIXES) and not is_url(path) and os.path.isfile(path)


def _struct_image(struct: Mapping[str, Any]) -> ImageRef | None:
    """Image of a struct as `datasets` stores undecoded images; None if it is empty."""
    if struct.get("bytes") is not None:
        return ImageRef(data=bytes(struct["bytes"]))
    return None if _is_absent(struct.get("path")) else ImageRef(path=os.fspath(struct["path"]))


def _normalize_message(message: object) -> object:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), (list, tuple)):
        return message
    parts = []
    for part in message["content"]:
        if isinstance(part, Mapping) and part.get("type") in _PARTS and part["type"] in part:
            name = str(part["type"])
            part = {**part, name: _normalize_part(name, part[name])}
            if _is_absent(part[name]):
                continue
        parts.append(part)
    if not parts:
        raise ValueError(f"the message has neither a text nor an image: {dict(message)!r:.100}")
    return {**message, "content": parts}


def copy_arrays(value: object) -> object:
    """Copy the arrays of an input from an iterator, which may fill one buffer again and again."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) is list:
        return [copy_arrays(part) for part in value]
    if type(value) is tuple:
        return tuple(copy_arrays(part) for part in value)
    return {name: copy_arrays(part) for name, part in value.items()} if isinstance(value, dict) else value


def _is_absent(value: object) -> bool:
    """Whether a value is None, or what pandas and Arrow use for it: NaN, NaT or NA."""
    return (
        value is None or (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")
    )


def as_item(value: ModelInput) -> Item:
    """Convert an input with at most one text, one image and one video to an item, without decoding them.

    A text that is the path of an existing image is the image.

    Raises:
        ValueError: If the input has other or several parts, or neither a text nor an image; for URLs, which are not
            stored.
    """
    value = normalize_input(value)
    if isinstance(value, Item):
        return value
    parts: Mapping[str, object]
    if isinstance(value, str):
        parts = {"image" if is_image_url_or_path(value) else "text": value}
    else:
        parts = value if isinstance(value, Mapping) and not is_chat(value) else {"image": value}
    single: dict[str, Any] = {
        name: part[0] if isinstance(part, (list, tuple)) and len(part) == 1 else part for name, part in parts.items()
    }
    text, image, video = (single.pop(name, None) for name in ("text", "image", "video"))
    if single or isinstance(image, (list, tuple)) or not (text is None or isinstance(text, str)):
        raise ValueError(f"expected one text, one image or both, got {value!r:.100}")
    if isinstance(image, str) and (is_url(image) or image.startswith("data:")):
        raise ValueError(f"image {image:.100}: download or decode it first; an index stores files and bytes")
    if isinstance(image, (np.ndarray, torch.Tensor)):
        image = image_of_array(image)
    return Item(text, image, video)  # Item checks the types


def texts_and_sizes(value: object) -> tuple[list[str], list[tuple[int, int]]]:
    """Texts of a normalized input, and (width, height) of every image of it that can be opened, from its header.

    Example:
        >>> from PIL import Image
        >>> from unime_st.encoding.model_inputs import texts_and_sizes
        >>> texts_and_sizes({"text": "a ship", "image": [Image.new("RGB", (4, 2))] * 2})
        (['a ship'], [(4, 2), (4, 2)])
    """
    texts: list[str] = []
    sizes: list[tuple[int, int]] = []
    _collect(value, None, texts, sizes)
    return texts, sizes


def _collect(value: object, name: str | None, texts: list[str], sizes: list[tuple[int, int]]) -> None:
    if isinstance(value, str):
        if name != "image" and not (name is None and is_image_url_or_path(value)):
            texts.append(value)
        elif (size := _UNKNOWN_SIZE if is_url(value) else image_size(value)) is not None:
            sizes.append(size)
    elif isinstance(value, Item):
        texts += [value.text] if value.text is not None else []
        if value.image is not None:
            _collect(value.image, "image", texts, sizes)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key in ("text", "image", "content"):
                _collect(part, "text" if key == "content" and isinstance(part, str) else key, texts, sizes)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _collect(part, name if name in ("text", "image") else None, texts, sizes)
    elif isinstance(value, (Image.Image, np.ndarray, torch.Tensor, ImageRef, bytes)):
        size = image_size(value)
        sizes += [] if size is None else [size]


def same_features(left: Features, right: Features) -> bool:
    """Whether features have the same names and values.

    Example:
        >>> import torch
        >>> from unime_st.encoding.model_inputs import same_features
        >>> same_features({"input_ids": torch.ones(2), "modality": "text"}, {"input_ids": torch.ones(2)})
        False
    """
    return left.keys() == right.keys() and all(_equal(left[name], right[name]) for name in left)


def _equal(left: object, right: object) -> bool:
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    return bool(left == right)


def load_input(value: object) -> object:
    """Load the images of a normalized input with :func:`~unime_st.encoding.input_images.load_image`."""
    return value.to_input() if isinstance(value, Item) else _load(value, None)


def _load(value: object, name: str | None) -> object:
    if isinstance(value, str):
        return load_image(value) if name == "image" or (name is None and is_image_url_or_path(value)) else value
    if isinstance(value, Mapping):
        return {
            key: part if key == "content" and isinstance(part, str) else _load(part, key if key in _PARTS else "other")
            for key, part in value.items()
        }
    if isinstance(value, VideoRef):
        return value.open()
    if isinstance(value, (list, tuple)):
        if name == "video" and is_frame_list(value):
            return value
        return type(value)(_load(part, name if name in _PARTS else None) for part in value)
    if isinstance(value, Image.Image) or (
        name == "image" and isinstance(value, (np.ndarray, torch.Tensor, ImageRef, bytes))
    ):
        return load_image(value)
    # A single array of another shape may be audio or video.
    return (
        load_image(value)
        if isinstance(value, (np.ndarray, torch.Tensor)) and name is None and value.ndim == 3
        else value
    )


def image_paths(value: object) -> list[str]:
    """Paths of the image files of a normalized input."""
    if isinstance(value, str):
        return [value] if is_image_url_or_path(value) and not is_url(value) and not value.startswith("data:") else []
    if not isinstance(value, Mapping):
        return [path for part in value for path in image_paths(part)] if isinstance(value, (list, tuple)) else []
    images = value.get("image")
    candidates = images if isinstance(images, (list, tuple)) else [images]
    found = [image for image in candidates if isinstance(image, str) and not is_url(image) and image[:5] != "data:"]
    return found + (image_paths(value["content"]) if isinstance(value.get("content"), (list, tuple)) else [])


def unreadable_image(value: object) -> BadImageError | None:
    """Error that names the first image file or frame of an input that cannot be decoded; None if all can."""
    video = value.video if isinstance(value, Item) else value.get("video") if isinstance(value, Mapping) else None
    try:
        for path in image_paths(value):
            ImageRef(path=path).open()
        if isinstance(video, VideoRef):
            video.check()
    except BadImageError as error:
        return error
    return None


def undecodable_image(value: object) -> BadImageError | None:
    """Error that names the first image file of an input that transformers cannot decode; None if it can.

    Its decoder takes neither animations nor rare formats, which :class:`~unime_st.UniME` decodes itself.
    """
    value = normalize_input(value)
    if (error := unreadable_image(value)) is not None:
        return error
    for path in image_paths(value):
        if not isinstance(load_image(path), str):
            return BadImageError(f"image {path}: transformers cannot decode it; open it with Pillow, or use UniME")
    return None


def looks_like_image_path(value: object) -> bool:
    """Whether an input is a text that ends like the name of an image file.

    Example:
        >>> looks_like_image_path("photo.tif"), looks_like_image_path("a photo")
        (True, False)
    """
    return isinstance(value, str) and len(value) < 1000 and _IMAGE_NAME.fullmatch(value) is not None


def is_media(text: str) -> bool:
    """Whether Sentence Transformers treats a text as the path or URL of an image, video or audio."""
    return is_image_url_or_path(text) or is_video_url_or_path(text) or is_audio_url_or_path(text)


def is_chat(value: object) -> bool:
    """Whether an input is a chat: a message or a list of messages."""
    return is_message_dict(value[0] if isinstance(value, (list, tuple)) and value else value)


def is_single(inputs: object) -> bool:
    """Whether an argument is a single input rather than a list or an iterator of inputs."""
    if isinstance(inputs, (np.ndarray, torch.Tensor)):
        return inputs.ndim in (0, 2, 3) and getattr(inputs.dtype, "kind", "f") not in "UO"
    return isinstance(inputs, (str, bytes, Mapping, Item, ImageRef, Image.Image, os.PathLike)) or not isinstance(
        inputs, Iterable
    )


def raise_if_table(inputs: object) -> None:
    """Raise a TypeError for a table of pandas or Arrow, whose column names would be taken for a list of texts."""
    if type(inputs).__name__ in ("DataFrame", "Table", "RecordBatch") and hasattr(inputs, "columns"):
        raise TypeError(
            f"expected inputs, got a {type(inputs).__name__}: pass one column of it, or its rows as dicts "
            "(to_dict('records') in pandas, to_pylist() in Arrow) with the keys text and image"
        )


def raise_if_single(inputs: object) -> None:
    """Raise a TypeError for a single input or a table, whose letters or keys would be taken for a list of texts."""
    raise_if_table(inputs)
    if is_single(inputs):
        raise TypeError(
            f"expected a list or an iterator of inputs, got a single {type(inputs).__name__}; put it in a list"
        )
