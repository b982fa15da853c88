"""Item: the unit that is embedded and judged; a text, an image, a video, or an image or video with a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unime_st.data.images import ImageLike, ImageRef, as_image_ref, padded_to_aspect
from unime_st.data.videos import FrameDecoder, VideoRef
from unime_st.files import digest

VideoLike = VideoRef | FrameDecoder | str | Path | np.ndarray | Sequence[ImageLike]


class Item:
    """An immutable text, image or video, or image or video with text, identified by its content.

    Two items with the same text and the same encoded image and frame bytes have the same :attr:`id`, compare equal and
    hash alike, wherever they are stored. So equal items are embedded and judged only once.

    Args:
        text: The text, kept verbatim. None and the empty string mean no text.
        image: Pillow image, path, encoded bytes or :class:`ImageRef`. A Pillow image is stored as lossless PNG. None
            means no image.
        video: Folder of frames, video file (decoded by ``torchcodec``, extra ``video``), list or tuple of frames,
            decoder, or :class:`~unime_st.data.VideoRef`. Of a folder, file or decoder 8 frames are sampled; a list is
            taken whole, and a :class:`~unime_st.data.VideoRef` says how many. None means no video.

    Raises:
        ValueError: If there is neither an image nor a video nor a text with a visible character, or the text is not
            valid Unicode.
        BadVideoError: If a folder has no frames or lacks one of them, or a list has more than 64.
        TypeError: If an argument has an unsupported type.

    Example:
        >>> from unime_st.data import Item
        >>> Item("a red square") == Item(text="a red square"), Item("a red square").modality
        (True, 'text')
        >>> Item("a red square").to_input()
        {'text': 'a red square'}
    """

    __slots__ = ("_id", "_image", "_text", "_video")
    _text: str | None
    _image: ImageRef | None
    _video: VideoRef | None
    _id: str | None

    def __init__(
        self, text: str | None = None, image: ImageLike | None = None, video: VideoLike | None = None
    ) -> None:
        if text is not None and not isinstance(text, str):
            raise TypeError(f"Item.text must be a str or None, got {type(text).__name__}")
        if image is None and video is None and (text is None or not text.strip()):
            raise ValueError("an item needs a text, an image or a video; all are missing or empty")
        if text is not None and not text.isascii():
            check_unicode(text)
        self._text = text or None
        self._image = None if image is None else as_image_ref(image, "Item.image")
        self._video = None if video is None else VideoRef.of(video)
        self._id = None

    @classmethod
    def stored(cls, text: str | None, image: ImageRef | None, item_id: str, video: VideoRef | None = None) -> Item:
        """Restore an item with the :attr:`id` that was computed when it was stored, without reading its images."""
        item = cls(text, image, video)
        item._id = item_id
        return item

    @property
    def text(self) -> str | None:
        """The text, or None."""
        return self._text

    @property
    def image(self) -> ImageRef | None:
        """The undecoded image, or None."""
        return self._image

    @property
    def video(self) -> VideoRef | None:
        """The undecoded video, or None."""
        return self._video

    @property
    def id(self) -> str:
        """Content hash: 32 hexadecimal digits of a SHA-256 over the text, the encoded image and the encoded frames.

        Computed on first access, which reads image and frames but does not decode them.

        Raises:
            BadImageError: If the image cannot be read.
        """
        if self._id is None:
            parts: list[bytes] = []
            if self._text is not None:
                encoded = self._text.encode("utf-8")
                # The length prefix prevents a text from colliding with a text plus image.
                parts += [b"text", len(encoded).to_bytes(8, "big"), encoded]
            if self._image is not None:
                parts += [b"image", bytes.fromhex(digest(self._image.read(), length=64))]
            if self._video is not None:
                parts += [b"video", self._video.digest()]
            self._id = digest(*parts)
        return self._id

    @property
    def modality(self) -> str:
        """Modality of the item: "text", "image", "video", "image+text", "video+text", ..."""
        parts = (("image", self._image), ("video", self._video), ("text", self._text))
        return "+".join(name for name, part in parts if part is not None)

    def to_input(self) -> dict[str, Any]:
        """Return the item as an input of ``SentenceTransformer.encode``.

        Returns:
            dict: "image" (decoded, RGB), "video" (list of frames) and "text", as far as present; the text comes last
                because chat templates keep this order. Images with an aspect ratio above 200 are padded to it with
                white margins.

        Raises:
            BadImageError: If the image cannot be decoded.
        """
        decoded: dict[str, Any] = {}
        if self._image is not None:
            decoded["image"] = padded_to_aspect(self._image.open())
        if self._video is not None:
            decoded["video"] = self._video.open()
        if self._text is not None:
            decoded["text"] = self._text
        return decoded

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Item) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        image = "" if self._image is None else f"image={self._image.label!r}"
        text = "" if self._text is None else f"text={self._text!r}"
        video = "" if self._video is None else f"video={self._video.label!r}"
        return f"Item({', '.join(part for part in (text, image, video) if part)})"

    def __reduce__(self) -> tuple[object, ...]:
        video = () if self._video is None else (self._video,)
        if self._id:
            return Item.stored, (self._text, self._image, self._id, *video)
        return Item, (self._text, self._image, *video)


def raise_for_video(item: Item, where: str) -> None:
    """Refuse an item with a video where only texts and images are taken, lest its text be taken for the whole.

    Args:
        item: The item.
        where: What does not take it, for the message.

    Raises:
        ValueError: If the item has a video.
    """
    if item.video is not None:
        raise ValueError(
            f"{where} takes texts and images, and {item!r} has a video: leave it out, or encode it directly"
        )


def check_unicode(text: str) -> None:
    """Refuse a text with lone surrogates, which cannot be stored.

    Args:
        text: The text.

    Raises:
        ValueError: If it is not valid Unicode.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode: {error}") from None
