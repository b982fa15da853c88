"""Items to mteb's dataset columns and back.

mteb hands a model rows of a ``datasets.Dataset``. Two facts of mteb shape the columns used here: a modality that the
task's ``category`` does not give to a side is dropped before the model sees it, and document texts are stripped. The
exact text of an item therefore travels in a column of its own, ``official_text``, which mteb leaves alone; ``text``
and ``image`` are what foreign models read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
from datasets import Dataset, Features, Image, Value

from mteb_tasks.video_column import VIDEO_TYPE, StoredImage, StoredVideo, VideoFeature, stored_video, video_of
from unime_st.data.items import Item

OFFICIAL_TEXT = "official_text"
"""Column with the untouched text of an item; an empty string stands for "no text"."""

PROMPT_NAME = "prompt_name"
"""Column that names one of the model's own prompts, for benchmarks where every model has an instruction of its own."""

PROMPT_STYLE = "prompt_style"
"""Column that names the style of chat template a benchmark prescribes, for models whose template has that style."""

SYSTEM_PROMPT = "system_prompt"
"""Column with the system turn a benchmark prescribes for all items of a side."""

PIXEL_RULE = "pixel_rule"
"""Column with the image size a benchmark prescribes, see `mteb_tasks.pixel_rule`."""

Modality = Literal["text", "image", "video"]

_ENCODED_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@dataclass(frozen=True)
class Setting:
    """How a benchmark prescribes that the items of a table are encoded; what is None is left to the model.

    Args:
        style: Style of chat template, for models whose template has it.
        system: System turn of the chat.
        pixels: Image size, as text of a `mteb_tasks.pixel_rule.PixelRule`.
    """

    style: str | None = None
    system: str | None = None
    pixels: str | None = None


_SETTING_COLUMNS = {"style": PROMPT_STYLE, "system": SYSTEM_PROMPT, "pixels": PIXEL_RULE}


def setting_of(table: Dataset) -> Setting:
    """Read the setting that a table prescribes.

    Args:
        table: A table made by `to_dataset`.

    Example:
        >>> from unime_st.data.items import Item
        >>> setting_of(to_dataset({"d0": Item(text="a cat")}, ["text"], setting=Setting(style="mmeb"))).style
        'mmeb'
    """
    named = {name: column for name, column in _SETTING_COLUMNS.items() if column in table.column_names and len(table)}
    return Setting(**{name: table[column][0] for name, column in named.items()})


def category_modalities(category: str) -> tuple[list[Modality], list[Modality]]:
    """Split an mteb category into the modalities of its queries and of its documents.

    Args:
        category: mteb's code, for instance ``"it2t"``.

    Returns:
        The modalities of the queries and those of the documents, text first.

    Example:
        >>> category_modalities("it2t")
        (['text', 'image'], ['text'])
    """
    names: dict[str, Modality] = {"t": "text", "i": "image", "v": "video"}
    sides = [[names[code] for code in side] for side in category.split("2")]
    queries, documents = (sorted(side, key=["text", "image", "video"].index) for side in sides)
    return queries, documents


def to_dataset(
    items: Mapping[str, Item],
    modalities: Sequence[Modality],
    *,
    body: Callable[[str], str] | None = None,
    prompt_name: str | None = None,
    setting: Setting | None = None,
) -> Dataset:
    """Build the query or corpus table of a retrieval task without decoding an image.

    Args:
        items: Row id to item.
        modalities: What foreign models see of this side. Our loader sees the whole item in any case.
        body: Takes the instruction off a text for foreign models, which have their own; None leaves it on.
        prompt_name: Name of the prompt that our models put to items without a text; None puts none.
        setting: How all items of this side are encoded; None leaves it to the model.

    Returns:
        A dataset with the columns ``id``, ``official_text``, ``image`` and ``video`` (when some item has one) and
        ``text`` (when `modalities` names it). Images stay encoded: paths stay paths, bytes stay bytes.

    Example:
        >>> from unime_st.data.items import Item
        >>> to_dataset({"d0": Item(text="a cat")}, ["text"])[0]
        {'id': 'd0', 'official_text': 'a cat', 'text': 'a cat'}
    """
    texts = [item.text or "" for item in items.values()]
    columns: dict[str, Sequence[str | None]] = {"id": list(items), OFFICIAL_TEXT: texts}
    if "text" in modalities:
        columns["text"] = texts if body is None else [body(text) for text in texts]
    prescribed = {column: getattr(setting, name, None) for name, column in _SETTING_COLUMNS.items()}
    for name, value in {PROMPT_NAME: prompt_name, **prescribed}.items():
        if value is not None:
            columns[name] = [value] * len(texts)
    # Arrow arrays: datasets would look at every value of a list.
    arrays: dict[str, pa.Array] = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    features: dict[str, Value | Image | VideoFeature] = {name: Value("string") for name in arrays}
    if any(item.image is not None for item in items.values()):
        arrays["image"] = pa.array([_encoded_image(item) for item in items.values()], _ENCODED_IMAGE)
        features["image"] = Image()
    if any(item.video is not None for item in items.values()):
        videos = [stored_video(item.video, item.image) for item in items.values()]
        arrays["video"] = pa.array(videos, VIDEO_TYPE)
        features["video"] = VideoFeature()
    return Dataset.from_dict(arrays, features=Features(features))


def _encoded_image(item: Item) -> StoredImage | None:
    if item.image is None:
        return None
    if item.image.path is not None and item.image.member is None:
        return {"path": str(item.image.path), "bytes": None}
    return {"path": None, "bytes": item.image.read()}


def has_encoded_items(dataset: object) -> bool:
    """Whether rows of `dataset` can be read as items without decoding (a plain table with our exact-text column).

    Args:
        dataset: What mteb passes as corpus, queries or ``DataLoader.dataset``.

    Returns:
        True for tables made by `to_dataset` (or by mteb from one of them).

    Example:
        >>> from unime_st.data.items import Item
        >>> has_encoded_items(to_dataset({"d0": Item(text="a cat")}, ["text"]))
        True
    """
    return isinstance(dataset, Dataset) and OFFICIAL_TEXT in dataset.column_names


def iter_items(
    dataset: Dataset, window: int = 1024, prompts: Mapping[str, str | None] | None = None
) -> Iterator[list[Item]]:
    """Read items from a table made by `to_dataset`, a window at a time, images undecoded.

    Args:
        dataset: The table.
        window: Rows held at once. Bounds the encoded images in memory.
        prompts: The model's own prompts, for tables that name one; None puts none.

    Yields:
        Lists of at most `window` items in row order.

    Example:
        >>> from unime_st.data.items import Item
        >>> [[item.text for item in part] for part in iter_items(to_dataset({"d0": Item(text="a cat")}, ["text"]))]
        [['a cat']]
    """
    if "image" in dataset.column_names:
        dataset = dataset.cast_column("image", Image(decode=False))
    if "video" in dataset.column_names:
        dataset = dataset.cast_column("video", VideoFeature(decode=False))
    for start in range(0, len(dataset), window):
        rows = dataset[start : start + window]
        images = rows.get("image") or [None] * len(rows["id"])
        videos = rows.get("video") or [None] * len(rows["id"])
        names = rows.get(PROMPT_NAME) or [""] * len(rows["id"])
        texts = [text or (prompts or {}).get(name) for text, name in zip(rows[OFFICIAL_TEXT], names)]
        yield [_item(*parts) for parts in zip(texts, images, videos)]


def _item(text: str | None, image: StoredImage | None, video: StoredVideo | None) -> Item:
    source = None if image is None else (image["bytes"] if image["bytes"] is not None else image["path"])
    return Item(text or None, source, video_of(video))
