"""One mteb model object for every alias, local folder and in-memory SentenceTransformer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from datasets import Image
from mteb.models.search_wrappers import SearchEncoderWrapper
from sentence_transformers import SentenceTransformer

from mteb_tasks.columns import OFFICIAL_TEXT, Setting, has_encoded_items, iter_items, setting_of
from mteb_tasks.embedding_estimate import estimate_embedding
from mteb_tasks.embedding_store import EmbeddingStore, NewEmbeddings
from mteb_tasks.metadata import model_meta
from mteb_tasks.pixel_rule import PixelRule
from mteb_tasks.ranking import rank_candidates, tie_order
from mteb_tasks.ruled_images import RuledItem, prescribed_model
from unime_st.data.images import BadImageError
from unime_st.data.items import Item
from unime_st.encoding import encode_stream, weights_fingerprint
from unime_st.files import digest
from unime_st.memory import malloc_trim
from unime_st.model import UniME
from unime_st.registry import resolve
from unime_st.scoring.prompts import clean_text

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.models_protocols import EncoderProtocol
    from mteb.types import PromptType, RetrievalOutputType
    from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<|image_1|>"
NO_SETTING = Setting()
WINDOW = 1024
"""Items among which like lengths are sought, and after which embeddings are safe on disk."""

_READ_AT_ONCE = 64
"""Rows of a table that are read at once."""


class UniMELoader:
    """Run a SentenceTransformer on mteb's tasks.

    Reads the exact text of our tasks where they carry it, encodes each distinct item once, keeps images undecoded
    until their mini-batch, and ranks by itself (it is an encoder and a search model), which spares mteb's row-wise
    conversion of every corpus and its loop over queries.

    Args:
        model_name: ``organisation/alias``, an alias or a folder; resolved by `unime_st.registry`. Ignored for
            loading when `model` is given.
        revision: Revision stored with the results.
        device: Device to load the model on; None lets sentence-transformers choose.
        model: A model already in memory.
        cache_folder: Where embeddings are kept from run to run, one folder for one model at one setting; None keeps
            them in memory.
        **model_kwargs: Passed on to `unime_st.UniME`.

    Example:
        >>> import mteb
        >>> from sentence_transformers import SentenceTransformer
        >>> from mteb_tasks.scenes import ScenesVQA
        >>> loader = UniMELoader("unime/tiny", model=SentenceTransformer("unime-tiny"))  # doctest: +SKIP
        >>> mteb.evaluate(loader, ScenesVQA(), cache=None)  # doctest: +SKIP
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        model: SentenceTransformer | None = None,
        cache_folder: str | Path | None = None,
        **model_kwargs: Any,
    ) -> None:
        if model is None:
            model = UniME(str(resolve(model_name.removeprefix("unime/"))), device=device, **model_kwargs)
        self.model = model
        self.mteb_model_meta = model_meta(model_name, revision)
        self.store = EmbeddingStore(cache_folder)
        self._corpus: Dataset | None = None
        # UniME's templates put the image where MMEB's token stands; others would read the token as a word.
        processor = getattr(self.model[0], "processor", None)
        self._template = str(getattr(processor, "chat_template", None))
        self._knows_token = IMAGE_TOKEN in self._template

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embed the rows of an mteb data loader, each distinct item once.

        Args:
            inputs: Batches with the columns ``official_text`` or ``text``, and ``image``.
            task_metadata: The task (unused: texts carry their instruction).
            hf_split: Split of the task (unused).
            hf_subset: Subset of the task (unused).
            prompt_type: Query or document side (unused).
            **kwargs: mteb's encode arguments; ``batch_size`` and ``show_progress_bar`` are honoured.

        Returns:
            float32 array ``(num_rows, dim)``, rows in the order of the loader.
        """
        if has_encoded_items(inputs.dataset):
            return self._embed_tables([cast("Dataset", inputs.dataset)], **kwargs)
        return self.embed(_items_of_batches(inputs), **kwargs)

    def embed(
        self,
        windows: Iterable[list[Item]],
        *,
        setting: Setting = NO_SETTING,
        batch_size: int = 32,
        total: int | None = None,
        show_progress_bar: bool = False,
        **_: Any,
    ) -> np.ndarray:
        """Embed a stream of items.

        Args:
            windows: Lists of items; few lists are held at a time.
            setting: How a benchmark prescribes that they are encoded.
            batch_size: Items per forward pass.
            total: About how many of them are new, for the progress bar.
            show_progress_bar: Show a bar over the items that are new.

        Returns:
            float32 array ``(num_items, dim)`` in stream order. An item seen before in the life of this object is
            not encoded again.

        Raises:
            ValueError: If there is nothing to embed.
        """
        setting = self._usable(setting)
        order: list[str] = []
        new = NewEmbeddings(self.store)
        encode_stream(
            self._prescribed(setting), self._fresh(windows, setting, order, new), new, prompt=setting.system,
            window=WINDOW, batch_size=batch_size, total=total, show_progress_bar=show_progress_bar,
        )  # fmt: skip
        if not order:
            raise ValueError("there is nothing to embed: the dataset has no rows")
        return self.store.take(order)

    def _fresh(
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

    def log_estimate(self, name: str, tables: Sequence[Dataset], **kwargs: Any) -> int | None:
        """Log what embedding some tables will take: items, distinct items, tokens and time.

        Args:
            name: Name of the task.
            tables: Tables with encoded items that prescribe the same setting.
            **kwargs: As for `embed`, for the few items that are embedded to find out.

        Returns:
            About how many are still to be embedded; None where messages are off and nobody was told.

        Raises:
            BadImageError: If an image of these cannot be read.
        """
        if not logger.isEnabledFor(logging.INFO) or not any(len(table) for table in tables):
            return None
        before = len(self.store)
        setting = self._usable(setting_of(tables[0]))
        expected = estimate_embedding(
            self._prescribed(setting),
            tables,
            lambda item: _store_key(self._readable(item), setting) in self.store,
            lambda items: self.embed([items], setting=setting, **kwargs),
        )
        logger.info("%s: %s", name, expected)
        return max(0, expected.new - (len(self.store) - before))

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

    def _embed_tables(self, tables: Sequence[Dataset], **kwargs: Any) -> np.ndarray:
        # One stream, for which the model never waits between two tables.
        windows = chain.from_iterable(iter_items(table, _READ_AT_ONCE, self.model.prompts) for table in tables)
        vectors = self.embed(windows, setting=setting_of(tables[0]), **kwargs)
        malloc_trim()  # what threads decoded and computed in; ranking needs memory of another kind
        return vectors

    def _readable(self, item: Item) -> Item:
        """Take MMEB's image token off a text for a model whose chat template does not know it."""
        if self._knows_token or item.text is None or IMAGE_TOKEN not in item.text:
            return item
        return Item(text=clean_text(item.text), image=item.image)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine similarity of all pairs.

        Args:
            embeddings1: ``(n, dim)`` or ``(dim,)``.
            embeddings2: ``(m, dim)`` or ``(dim,)``.

        Returns:
            float32 tensor ``(n, m)``.
        """
        return self.model.similarity(_float32(embeddings1), _float32(embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine similarity of corresponding rows.

        Args:
            embeddings1: ``(n, dim)``.
            embeddings2: ``(n, dim)``.

        Returns:
            float32 tensor ``(n,)``.
        """
        return self.model.similarity_pairwise(_float32(embeddings1), _float32(embeddings2))

    def index(self, corpus: Dataset, **_: Any) -> None:
        """Take the corpus of the next `search`.

        Args:
            corpus: mteb's corpus table.
        """
        self._corpus = corpus

    def search(
        self,
        queries: Dataset,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: dict[str, Any],
        top_ranked: dict[str, list[str]] | None = None,
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> RetrievalOutputType:
        """Rank the indexed corpus for each query.

        Args:
            queries: mteb's query table.
            task_metadata: The task.
            hf_split: Split of the task.
            hf_subset: Subset of the task.
            top_k: Documents to return for each query.
            encode_kwargs: ``batch_size`` and the like.
            top_ranked: Candidates of each query; None searches the whole corpus.
            num_proc: Workers for tasks that are not ours.
            **kwargs: Further arguments of mteb, unused.

        Returns:
            ``{query id: {document id: cosine}}``.

        Raises:
            ValueError: If `index` was not called, or a query has no candidates.
        """
        corpus, self._corpus = self._corpus, None
        if corpus is None:
            raise ValueError("call index(corpus) before search(queries)")
        if not (has_encoded_items(corpus) and has_encoded_items(queries)):
            stock = SearchEncoderWrapper(
                cast("EncoderProtocol", self)
            )  # another project's task: its columns are mteb's business
            common: dict[str, Any] = {"task_metadata": task_metadata, "hf_split": hf_split, "hf_subset": hf_subset}
            common |= {"encode_kwargs": encode_kwargs, "num_proc": num_proc}
            stock.index(corpus, **common)
            return stock.search(queries, top_k=top_k, top_ranked=top_ranked, **common)
        query_ids, document_ids = (table.with_format("arrow")["id"].to_pylist() for table in (queries, corpus))
        try:
            parts = []
            for _, group in groupby([queries, corpus], key=setting_of):
                tables = list(group)
                new = self.log_estimate(task_metadata.name, tables, **encode_kwargs)
                parts.append(self._embed_tables(tables, total=new, **encode_kwargs))
        except BadImageError as error:
            # It names an item by its place among the new ones of a window, which nobody can look up.
            where = _index_of(error, queries, corpus, top_ranked)
            raise BadImageError(f"{task_metadata.name}, {where}: {error}") from error
        vectors = parts[0] if len(parts) == 1 else np.concatenate(parts)
        ranked = rank_candidates(
            vectors[: len(queries)],
            vectors[len(queries) :],
            _candidate_rows(query_ids, document_ids, top_ranked),
            tie_order(document_ids),
            top_k,
        )
        return {
            query: dict(zip(map(document_ids.__getitem__, rows.tolist()), scores.tolist()))
            for query, (rows, scores) in zip(query_ids, ranked)
        }


def wrap(
    model: SentenceTransformer, name: str = "unime/local", revision: str | None = None, **fields: Any
) -> UniMELoader:
    """Make a SentenceTransformer in memory an mteb model that takes images.

    Args:
        model: The model.
        name: ``organisation/model`` under which results are filed.
        revision: Revision under which results are filed. Defaults to `model_digest`, so that mteb's cache does not
            take the scores of one model for those of another.
        **fields: Further fields of mteb's ``ModelMeta``.

    Returns:
        An object for ``mteb.evaluate``. Wrap again after changing the weights: embeddings are remembered.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> wrap(SentenceTransformer("unime-tiny"), "unime/tiny")  # doctest: +SKIP
    """
    revision = revision or model_digest(model)
    loader = UniMELoader(name, revision, model=model)
    loader.mteb_model_meta = model_meta(name, revision, **fields)
    return loader


def model_digest(model: SentenceTransformer) -> str:
    """Digest of what decides the embeddings of a model in memory: weights, modules, prompts, template, image size.

    Args:
        model: The model.

    Returns:
        16 hexadecimal digits.
    """
    first: Any = model[0]
    processor = getattr(first, "processor", None)
    settings = [
        weights_fingerprint(model),
        [f"{type(module).__name__} {getattr(module, 'get_config_dict', dict)()}" for module in model],
        sorted(model.prompts.items()),
        model.default_prompt_name,
        model.truncate_dim,
        model.similarity_fn_name,
        model.max_seq_length,
        getattr(first, "processing_kwargs", None),
        str(processor),
        getattr(processor, "chat_template", None),
    ]
    return digest(repr(settings), length=16)


def _index_of(error: BadImageError, queries: Dataset, corpus: Dataset, top_ranked: dict[str, list[str]] | None) -> str:
    """Which query or document has the image that an error is about; our tasks name queries by their rows."""
    for kind, table in (("query", queries), ("document", corpus)):
        images = table.cast_column("image", Image(decode=False))["image"] if "image" in table.column_names else []
        for name, image in zip(table["id"], images):
            if image and image["path"] and f"image {image['path']}:" in str(error):
                listed = top_ranked or {} if kind == "document" else {}
                query = next((query for query, documents in listed.items() if name in documents), None)
                return f"{kind} {name}" + (f" of query {query}" if query else "")
    return "an image"


def _store_key(item: Item, setting: Setting) -> str:
    pixels = setting.pixels if item.image is not None else None
    prescribed = [part for part in (setting.style, setting.system, pixels) if part is not None]
    return digest(" ".join([item.id, *prescribed])) if prescribed else item.id


def _float32(embeddings: Any) -> torch.Tensor:
    return torch.as_tensor(embeddings).float()


def _candidate_rows(
    query_ids: list[str], document_ids: list[str], top_ranked: dict[str, list[str]] | None
) -> list[np.ndarray] | None:
    if top_ranked is None:
        return None
    rows = {document: row for row, document in enumerate(document_ids)}
    missing = [query for query in query_ids if not top_ranked.get(query)]
    if missing:
        raise ValueError(f"{len(missing)} queries have no candidates, the first is {missing[0]!r}")
    listed = (top_ranked[query] for query in query_ids)
    return [np.fromiter(map(rows.__getitem__, found), dtype=np.int64, count=len(found)) for found in listed]


def _items_of_batches(inputs: DataLoader) -> Iterator[list[Item]]:
    for batch in inputs:
        images = batch.get("image")
        texts = batch.get(OFFICIAL_TEXT, batch.get("text"))
        size = len(images if images is not None else texts)
        yield [
            Item(text=text or None, image=image)
            for text, image in zip(texts or [None] * size, images or [None] * size)
        ]
