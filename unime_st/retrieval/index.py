"""Search index on faiss: build, add, remove, search, save and load (memory-mapped, without pickle)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer

from unime_st.data.items import Item
from unime_st.data.manifest import is_complete, write_manifest
from unime_st.data.parquet_shards import ItemWriter, ShardWriter
from unime_st.data.records import RecordSet
from unime_st.encoding import encode_items, model_fingerprint
from unime_st.encoding.model_inputs import ModelInput, as_item, raise_if_single
from unime_st.files import atomic_folder, folder_lock
from unime_st.options import check_count
from unime_st.retrieval.faiss_engine import (
    GPU_LIMIT,
    Kind,
    check_kind,
    make_engine,
    map_engine,
    on_gpu,
    sample_recall,
    search_engine,
)
from unime_st.retrieval.index_items import (
    EncodingOptions,
    IndexedItems,
    check_output,
    encode_named,
    encode_records,
    with_ids,
    work_folder,
)
from unime_st.retrieval.index_settings import (
    FAISS_FILE,
    ROW_SCHEMA,
    CheckedModels,
    IndexFolder,
    IndexSettings,
    declared_prompts,
    name_of,
    read_settings,
)
from unime_st.retrieval.item_vectors import needs_normalization

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """One result of a search.

    Args:
        id: Id of the item in the index.
        score: Score by which results are sorted: the similarity, or the score of the reranker.
        similarity: Similarity of query and item by the function of the model.
        item: The item.
    """

    id: str
    score: float
    similarity: float
    item: Item


class Index:
    """Index of items by the vectors of an embedding model.

    Made by :meth:`build` and :meth:`load`. Removed items are left out of searches; their vectors are dropped when the
    index is built again.

    Attributes:
        settings: What determines the vectors.
        model: The embedding model.

    Example:
        >>> import tempfile
        >>> from unime_st import UniME
        >>> from unime_st.retrieval import Index
        >>> model = UniME("unime-tiny", device="cpu")
        >>> index = Index.build(["a red circle", "a blue star"], model, ids=["circle", "star"])
        >>> index.search(["a blue star"], k=1)[0][0].id
        'star'
        >>> folder = tempfile.mkdtemp() + "/index"
        >>> index.save(folder)
        >>> len(Index.load(folder, model))
        2
    """

    def __init__(
        self,
        engine: faiss.Index,
        settings: IndexSettings,
        ids: list[str],
        items: IndexedItems,
        model: SentenceTransformer,
        image_root: str | Path | None,
    ) -> None:
        self.settings, self.model = settings, model
        self._engine, self._ids, self._items, self._image_root, self._mapped = engine, ids, items, image_root, False
        self._removed: set[int] = set()
        self._gpu: faiss.Index | None = None
        self._checked = CheckedModels(settings)

    @classmethod
    def build(
        cls,
        items: Iterable[ModelInput] | RecordSet,
        model: SentenceTransformer,
        *,
        ids: Iterable[str] | None = None,
        kind: Kind = "flat",
        prompt: str | None = None,
        query_prompt: str | None = None,
        truncate_dim: int | None = None,
        batch_size: int = 64,
        folder: str | Path | None = None,
        image_root: str | Path | None = "/",
        vectors: str | Path | None = None,
        overwrite: bool = False,
        show_progress_bar: bool = False,
    ) -> Index:
        """Encode items and index their vectors.

        Args:
            items: Sequence or iterator of items, or of any inputs of ``encode`` (texts, images, dicts); or pair records,
                whose distinct positives are indexed. Unreadable items are left out with a warning.
            model: The embedding model.
            ids: Unique id of each item. Defaults to None, their positions; for records the ids of their items.
            kind: Kind of index: "flat" is exact; "hnsw" and "ivf" are approximate and faster; "sq8" stores 8 bits per
                dimension, "binary" 1 bit. Defaults to "flat".
            prompt: Instruction of the items. Defaults to None: the model's prompt "document", or its default prompt.
            query_prompt: Instruction of queries. Defaults to None: the model's prompt "query", or its default prompt.
            truncate_dim: Number of leading dimensions to keep. Defaults to None, the setting of the model.
            batch_size: As for :func:`~unime_st.encoding.encode_items`. Defaults to 64.
            folder: Folder to save to. An interrupted build with a folder resumes when called with the same items.
                Defaults to None, in memory.
            image_root: Image files below this folder are stored as paths relative to it, other images as bytes; None
                stores all images as bytes. Defaults to "/", all files as paths.
            vectors: Folder of vectors that is shared with :func:`~unime_st.retrieval.mine` (float16), so that nothing
                is encoded twice. Needs records. Defaults to None.
            overwrite: Replace an existing index in ``folder``. Defaults to False.
            show_progress_bar: Show a progress bar. Defaults to False.

        Returns:
            Index: The index; with ``folder``, loaded from it.

        Raises:
            ValueError: If an option is invalid, an id occurs twice, or no item could be encoded.
            FileExistsError: If ``folder`` exists and ``overwrite`` is False.
            StageConflictError: If ``vectors`` are those of other records, another model or another prompt.

        Example:
            >>> from unime_st import UniME
            >>> from unime_st.retrieval import Index
            >>> texts = (f"a {color} star" for color in ("red", "green", "blue"))
            >>> index = Index.build(texts, UniME("unime-tiny", device="cpu"), kind="sq8", query_prompt="find ")
            >>> index.ids, index.settings.dim
            (['0', '1', '2'], 128)
        """
        check_kind(kind)
        raise_if_single(items)
        check_output(folder, overwrite=overwrite)
        normalized, fingerprint = needs_normalization(model), model_fingerprint(model)
        declared = declared_prompts(model)
        document = declared[0] if prompt is None else prompt or None
        query = declared[1] if query_prompt is None else query_prompt or None
        dims = model.truncate_dim if truncate_dim is None else truncate_dim
        if isinstance(items, RecordSet):
            image_root = items.manifest.get("image_root")
        with work_folder(folder) as work:
            if isinstance(items, RecordSet) and vectors is not None:
                identity = {"model": fingerprint, "prompt": document, "dim": int(model.get_embedding_dimension() or 0)}
                names, stored, found = encode_records(items, model, identity, vectors, batch_size)
                found = np.ascontiguousarray(found[:, :dims])
            elif vectors is not None:
                raise ValueError("vectors are those of a record folder: pass its RecordSet as items")
            else:
                if isinstance(items, RecordSet):
                    ids = items.positive_ids
                    items = map(items.item, ids)
                options = EncodingOptions(document, dims, batch_size, show_progress_bar)
                names, stored, found = encode_named(with_ids(items, ids), model, work, image_root, options)
            if not names:
                shutil.rmtree(work, ignore_errors=True)  # nothing to resume with
                raise ValueError("no item could be encoded, so there is nothing to index")
            if normalized or dims is not None:
                faiss.normalize_L2(found)
            engine = make_engine(kind, found)
            recall = 1.0 if kind == "flat" else sample_recall(engine, found)
            logger.info("%s index: recall@10 %.3f on a sample", kind, recall)
            settings = IndexSettings(
                kind, fingerprint, name_of(model), declared, document, query, found.shape[1], dims, normalized, recall
            )
            index = cls(engine, settings, names, stored, model, image_root)
            if folder is None:
                stored.load_all()
                return index
            index.save(folder, overwrite=overwrite)
        return cls.load(folder, model)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_gpu": None}  # copied again from the CPU when needed

    def __len__(self) -> int:
        return len(self._ids) - len(self._removed)

    @property
    def ids(self) -> list[str]:
        """Ids of the indexed items, in the order in which they were added."""
        return [name for position, name in enumerate(self._ids) if position not in self._removed]

    def add(self, items: Iterable[ModelInput], ids: Iterable[str], *, batch_size: int = 64) -> None:
        """Encode items with the prompt of the index and add them.

        Args:
            items: Items, or any inputs of ``encode``.
            ids: Id of each item, not in use yet.
            batch_size: As for :func:`~unime_st.encoding.encode_items`. Defaults to 64.

        Raises:
            ValueError: If an id is in use, or the model has changed.
            BadImageError: If an image cannot be read; nothing is added then.

        Example:
            >>> from unime_st import UniME
            >>> from unime_st.retrieval import Index
            >>> index = Index.build(["a red circle"], UniME("unime-tiny", device="cpu"), ids=["circle"])
            >>> index.add(["a blue star"], ["star"])
            >>> index.remove(["circle"])
            >>> index.ids
            ['star']
        """
        self.check_model(self.model)
        named = list(with_ids(items, ids, self.ids))
        if not named:
            return
        vectors = self._encode([item for _, item in named], self.settings.prompt, batch_size)
        if self._mapped:  # read-only; its file may have been replaced meanwhile
            self._engine, self._mapped = faiss.deserialize_index(faiss.serialize_index(self._engine)), False
        self._engine.add(vectors)
        self._gpu = None
        self._ids += [name for name, _ in named]
        self._items.extra += [item for _, item in named]

    def remove(self, ids: Iterable[str]) -> None:
        """Remove items.

        Args:
            ids: Ids of the items.

        Raises:
            KeyError: If an id is not in the index; nothing is removed then.
        """
        positions = {name: position for position, name in enumerate(self._ids) if position not in self._removed}
        wanted = list(ids)
        if missing := [name for name in wanted if name not in positions]:
            raise KeyError(f"id {missing[0]!r} is not in the index")
        self._removed |= {positions[name] for name in wanted}

    def search(
        self,
        queries: Sequence[ModelInput],
        k: int = 10,
        reranker: CrossEncoder | None = None,
        *,
        query_prompt: str | None = None,
        batch_size: int = 64,
    ) -> list[list[Hit]]:
        """Find the items that are most similar to each query.

        Args:
            queries: Items, or any inputs of ``encode``.
            k: Number of results per query; all items, with a warning, if there are fewer. Defaults to 10.
            reranker: Reranks the k results of each query, such as a :class:`~unime_st.UniMEReranker`. Defaults to None.
            query_prompt: Instruction of these queries. Defaults to None, the query prompt of the index.
            batch_size: As for :func:`~unime_st.encoding.encode_items`. Defaults to 64.

        Returns:
            list[list[Hit]]: Results of each query, best first.

        Raises:
            TypeError: If ``queries`` is a single query.
            ValueError: If ``k`` is below 1, or the model has changed since the index was built.
            BadImageError: If the image of a query cannot be read.
        """
        check_count("k", k)
        raise_if_single(queries)
        if k > len(self):
            logger.warning("k is %d, but the index has %d items: all are returned", k, len(self))
        parsed = [as_item(query) for query in queries]
        if not parsed or not len(self):
            return [[] for _ in parsed]
        self.check_model(self.model)
        prompt = self.settings.query_prompt if query_prompt is None else query_prompt
        vectors, k = self._encode(parsed, prompt, batch_size), min(k, len(self))
        if self._gpu is None:
            self._gpu = on_gpu(self._engine, self.settings.kind)
        engine = self._engine if self._removed or k > GPU_LIMIT else self._gpu
        scores, positions = search_engine(engine, vectors, k, self._removed)
        found = []
        for query, own_scores, own_positions in zip(parsed, scores.tolist(), positions.tolist(), strict=True):
            hits = [
                Hit(self._ids[position], score, score, self._items[position])
                for score, position in zip(own_scores, own_positions, strict=True)
                if position >= 0
            ]
            found.append(hits if reranker is None else _reranked(query, hits, reranker))
        return found

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the index: ``index.faiss``, Parquet files of ids and items, and ``manifest.json``.

        The folder appears when it is complete.

        Args:
            folder: Output folder.
            overwrite: Replace an existing folder. Defaults to False.

        Raises:
            FileExistsError: If the folder exists and ``overwrite`` is False.
        """
        if overwrite and Path(folder).exists() and not is_complete(folder):
            raise FileExistsError(f"{folder}: not an index, so it is not overwritten; remove it yourself")
        with folder_lock(folder, wait=False), atomic_folder(folder, overwrite=overwrite) as part:
            items = ItemWriter(part, self._image_root)
            with items.shards, ShardWriter(part, "rows", ROW_SCHEMA) as rows:
                for position, name in enumerate(self._ids):
                    rows.add({"id": name, "item": items.add(self._items[position])})
            faiss.write_index(self._engine, str(part / FAISS_FILE))
            facts = {
                "rows": len(self._ids),
                "removed": sorted(self._removed),
                "image_root": None if items.root is None else str(items.root),
                "faiss": faiss.__version__,
            }
            write_manifest(part, {"stage": "index", "settings": asdict(self.settings), **facts})

    @classmethod
    def load(cls, folder: str | Path, model: SentenceTransformer | str | None = None) -> Index:
        """Open a saved index; vectors are memory-mapped, items are read when they are found.

        Args:
            folder: Folder of the index.
            model: The embedding model of the index, or its name. Defaults to None, the name that is stored with it.

        Returns:
            Index: The index.

        Raises:
            FileNotFoundError: If the folder has no finished index.
            ValueError: If the folder is damaged, was written by a newer version, or belongs to another model.
        """
        settings, stored = read_settings(folder), IndexFolder(folder)
        engine, rows = map_engine(stored.folder / FAISS_FILE), stored.rows
        items = IndexedItems(stored.items, stored.items.positions(rows.column("item").to_pylist()))
        name = settings.model_name if model is None else model
        loaded = SentenceTransformer(name) if isinstance(name, str) else name
        index = cls(engine, settings, rows.column("id").to_pylist(), items, loaded, stored.manifest.get("image_root"))
        index._removed, index._mapped = set(stored.manifest["removed"]), True
        index.check_model(loaded)
        return index

    def check_model(self, model: SentenceTransformer) -> None:
        """Raise ValueError if the weights, settings or prompts of a model are not those of this index."""
        self._checked.check(model)

    def _encode(self, items: list[Item], prompt: str | None, batch_size: int) -> np.ndarray:
        vectors = encode_items(
            self.model,
            items,
            prompt=prompt or "",
            batch_size=batch_size,
            truncate_dim=self.settings.truncate_dim,
            normalize_embeddings=self.settings.normalized,
        )
        if vectors.shape[1] != self.settings.dim:
            raise ValueError(
                f"vectors have dimension {vectors.shape[1]}, the index has {self.settings.dim}: restore model.truncate_dim"
            )
        return vectors


def _reranked(query: Item, hits: list[Hit], reranker: CrossEncoder) -> list[Hit]:
    inputs: list[Any] = [query, *(hit.item for hit in hits)]
    if not hasattr(reranker, "listwise_scores"):  # a UniMEReranker takes items, and ranks unreadable ones last
        inputs = [item.text if item.modality == "text" else item.to_input() for item in inputs]
    ranked = reranker.rank(inputs[0], inputs[1:])
    return [replace(hits[int(entry["corpus_id"])], score=float(entry["score"])) for entry in ranked]
