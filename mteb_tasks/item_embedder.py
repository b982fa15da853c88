"""Item embedder: vectors of streams of items as a benchmark prescribes them, each distinct item once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sentence_transformers import SentenceTransformer

from mteb_tasks.columns import Setting, iter_items, setting_of
from mteb_tasks.embedding_estimate import estimate_embedding
from mteb_tasks.embedding_store import EmbeddingStore, NewEmbeddings
from mteb_tasks.mmeb.subsets import IMAGE_TOKEN, VIDEO_TOKEN
from mteb_tasks.pixel_rule import PixelRule
from mteb_tasks.ruled_images import RuledItem, prescribed_model
from mteb_tasks.vector_format import VectorFormat
from unime_st.data.items import Item
from unime_st.encoding import encode_stream
from unime_st.files import digest
from unime_st.losses.quantization import Precision
from unime_st.memory import malloc_trim
from unime_st.scoring.prompts import clean_text

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

NO_SETTING = Setting()
WHOLE = VectorFormat()
WINDOW = 1024
"""Items that are sorted by length together, and after which embeddings are safe on disk."""

_ROWS_PER_READ = 64


class ItemEmbedder:
    """Embed items, and remember the embeddings.

    Images stay undecoded until their mini-batch.

    Args:
        model: A SentenceTransformer.
        cache_folder: Where embeddings are kept from run to run, one folder for one model at one setting; None keeps
            them in memory.
        vector_format: Dimension and precision of the returned embeddings; whole ones are kept. Defaults to all, float32.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> embedder = ItemEmbedder(SentenceTransformer("unime-tiny", device="cpu"))
        >>> embedder.embed([[Item("a red circle"), Item("a blue star")], [Item("a red circle")]]).shape
        (3, 128)
    """

    def __init__(
        self,
        model: SentenceTransformer,
        cache_folder: str | Path | None = None,
        vector_format: VectorFormat = WHOLE,
    ) -> None:
        self.model, self.vector_format = model, vector_format
        self.store = EmbeddingStore(cache_folder)
        self._read_template()

    def forget(self) -> None:
        """Forget the embeddings, because the model has changed."""
        self.store = EmbeddingStore(None)
        self._read_template()

    def _read_template(self) -> None:
        # UniME's templates put the image where MMEB's token stands; others would read the token as a word.
        processor = getattr(self.model[0], "processor", None)
        self._template = str(getattr(processor, "chat_template", None))
        self._knows_token = IMAGE_TOKEN in self._template
        self._knows_video_token = VIDEO_TOKEN in self._template

    def embed(
        self,
        windows: Iterable[list[Item]],
        *,
        setting: Setting = NO_SETTING,
        batch_size: int = 32,
        total: int | None = None,
        show_progress_bar: bool = False,
        precision: Precision | None = None,
        **_: object,
    ) -> np.ndarray:
        """Embed a stream of items.

        Args:
            windows: Lists of items; few lists are held at a time.
            setting: How a benchmark prescribes that they are encoded.
            batch_size: Rows of 256 tokens in a forward pass. Defaults to 32.
            total: Approximate number of new items, for the progress bar.
            show_progress_bar: Show a bar over the new items. Defaults to False.
            precision: As of `VectorFormat`, which it overrides; mteb files such a run as an experiment.

        Returns:
            float32 array ``(num_items, dim)`` in stream order. An item seen before in the life of this object is
            not encoded again.

        Raises:
            ValueError: If there is nothing to embed.
        """
        vector_format = replace(self.vector_format, precision=precision) if precision else self.vector_format
        setting = self._usable(setting)
        order: list[str] = []
        new = NewEmbeddings(self.store)
        encode_stream(
            self._prescribed(setting), self._new_items(windows, setting, order, new), new, prompt=setting.system,
            window=WINDOW, batch_size=batch_size, total=total, show_progress_bar=show_progress_bar,
        )  # fmt: skip
        if not order:
            raise ValueError("there is nothing to embed: the dataset has no rows")
        return vector_format(self.store.take(order))

    def embed_tables(self, tables: Sequence[Dataset], **kwargs: object) -> np.ndarray:
        """Embed the rows of tables made by `mteb_tasks.columns.to_dataset` that prescribe the same setting.

        Args:
            tables: The tables.
            **kwargs: As for `embed`.

        Returns:
            float32 array ``(num_rows, dim)``.
        """
        malloc_trim()  # memory of the reading of the tables
        # One stream, for which the model never waits between two tables.
        windows = chain.from_iterable(iter_items(table, _ROWS_PER_READ, self.model.prompts) for table in tables)
        vectors = self.embed(windows, setting=setting_of(tables[0]), **kwargs)  # type: ignore[arg-type]
        malloc_trim()  # memory of the decoding threads; ranking needs memory of another kind
        return vectors

    def log_estimate(self, name: str, tables: Sequence[Dataset], **kwargs: object) -> int | None:
        """Log the cost of embedding some tables: items, distinct items, tokens and time.

        Args:
            name: Name of the task.
            tables: Tables with encoded items that prescribe the same setting.
            **kwargs: As for `embed`, for the sample that is embedded on the way.

        Returns:
            Approximate number of items still to be embedded; None where level INFO is not logged.

        Raises:
            BadImageError: If an image of the sample cannot be read.
        """
        if not logger.isEnabledFor(logging.INFO) or not any(len(table) for table in tables):
            return None
        before = len(self.store)
        setting = self._usable(setting_of(tables[0]))
        expected = estimate_embedding(
            self._prescribed(setting),
            tables,
            lambda item: _store_key(self._readable(item), setting) in self.store,
            lambda items: self.embed([items], setting=setting, **kwargs),  # type: ignore[arg-type]
        )
        logger.info("%s: %s", name, expected)
        return max(0, expected.new - (len(self.store) - before))

    def _new_items(
        self, windows: Iterable[list[Item]], setting: Setting, order: list[str], new: NewEmbeddings
    ) -> Iterator[Item]:
        """The items that have no embedding yet, each once; the keys of all go to `order`."""
        rule = None if setting.pixels is None else PixelRule.parse(setting.pixels)
        for items in windows:
            for item in map(self._readable, items):
                if rule is not None:
                    item = RuledItem.of(item, rule)
                key = _store_key(item, setting)
                order.append(key)
                if new.awaits(key):
                    yield item

    def _usable(self, setting: Setting) -> Setting:
        """The setting without a style that the model's chat template does not have."""
        known = setting.style is not None and f"'{setting.style}'" in self._template
        return setting if known else replace(setting, style=None)

    def _prescribed(self, setting: Setting) -> SentenceTransformer:
        """The model with the chat style and the image size that a benchmark prescribes; the weights are shared."""
        if setting.style is None and setting.pixels is None:
            return self.model
        rule = None if setting.pixels is None else PixelRule.parse(setting.pixels)
        return prescribed_model(self.model, rule, setting.style)

    def _readable(self, item: Item) -> Item:
        """Remove MMEB's media tokens from a text for a model whose chat template does not know them."""
        if item.video is not None and item.text is not None and not self._knows_video_token:
            return Item(item.text.removeprefix(VIDEO_TOKEN).removeprefix(" ") or None, item.image, item.video)
        if self._knows_token or item.text is None or IMAGE_TOKEN not in item.text:
            return item
        return Item(clean_text(item.text), item.image, item.video)


def _store_key(item: Item, setting: Setting) -> str:
    pixels = setting.pixels if item.image is not None or item.video is not None else None
    prescribed = [part for part in (setting.style, setting.system, pixels) if part is not None]
    return digest(" ".join([item.id, *prescribed])) if prescribed else item.id
