"""mteb model object for every alias, local folder and SentenceTransformer in memory."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from datasets import Image
from mteb.models.search_wrappers import SearchEncoderWrapper
from sentence_transformers import SentenceTransformer

from mteb_tasks.columns import Setting, has_encoded_items, setting_of
from mteb_tasks.foreign_rows import iter_rows, prompt_of
from mteb_tasks.item_embedder import ItemEmbedder
from mteb_tasks.metadata import modalities_of, model_meta
from mteb_tasks.ranking import rank_candidates, tie_order
from mteb_tasks.vector_format import VectorFormat
from unime_st.data.images import BadImageError
from unime_st.encoding import model_fingerprint
from unime_st.encoding.model_identity import model_state
from unime_st.files import digest
from unime_st.losses.quantization import Precision
from unime_st.model import UniME
from unime_st.registry import resolve

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.models.models_protocols import EncoderProtocol
    from mteb.types import EncodeKwargs, PromptType, RetrievalOutputType
    from torch.utils.data import DataLoader

Vectors = np.ndarray | torch.Tensor


class UniMELoader(ItemEmbedder):
    """Run a SentenceTransformer on mteb's tasks.

    Reads the exact text of our tasks where they carry it, encodes each distinct item once, keeps images undecoded
    until their mini-batch, and ranks by itself (it is an encoder and a search model), which spares mteb's row-wise
    conversion of every corpus and its loop over queries. In tasks of others it follows mteb's rules for prompts.

    Args:
        model_name: ``organisation/alias``, an alias or a folder; resolved by `unime_st.registry`. Ignored for
            loading when `model` is given.
        revision: Revision stored with the results.
        device: Device to load the model on; None lets sentence-transformers choose.
        model: A model already in memory.
        cache_folder: As for `ItemEmbedder`.
        truncate_dim: As of `VectorFormat`; results are filed as an experiment.
        precision: The same.
        **model_kwargs: Passed on to `unime_st.UniME`.

    Example:
        >>> import mteb
        >>> from sentence_transformers import SentenceTransformer
        >>> from mteb_tasks.scenes import ScenesVQA
        >>> loader = UniMELoader("unime/tiny", model=SentenceTransformer("unime-tiny", device="cpu"))
        >>> result = mteb.evaluate(loader, ScenesVQA(size=10), cache=None, show_progress_bar=False)
        >>> result.task_results[0].task_name
        'ScenesVQA'
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        model: SentenceTransformer | None = None,
        cache_folder: str | Path | None = None,
        truncate_dim: int | None = None,
        precision: Precision | None = None,
        **model_kwargs: Any,
    ) -> None:
        vector_format = VectorFormat(truncate_dim, precision)
        if model is None:
            model = UniME(str(resolve(model_name.removeprefix("unime/"))), device=device, **model_kwargs)
        super().__init__(model, cache_folder, vector_format)
        fields: dict[str, Any] = {"modalities": modalities_of(model)}
        fields["experiment_kwargs"] = vector_format.experiment or None
        self.mteb_model_meta = model_meta(model_name, revision, **fields)
        self._corpus: Dataset | None = None
        self._state: object = None

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Metadata under which mteb files results. The revision of a model that was wrapped follows its changes."""
        self._follow_model()
        return self._meta

    @mteb_model_meta.setter
    def mteb_model_meta(self, meta: ModelMeta) -> None:
        self._meta, self._follows = meta, False

    def follow_model(self, meta: ModelMeta) -> None:
        """Set metadata whose revision is the digest of the model from now on, see `model_digest`."""
        self._meta, self._follows, self._state = meta, True, None
        self._follow_model()

    def _follow_model(self) -> None:
        """Forget the embeddings of a model in memory that has changed since they were computed."""
        if not self._follows or (state := _state_of(self.model)) == self._state:
            return
        self._state, revision = state, model_digest(self.model)
        if revision != self._meta.revision:
            self.forget()
            self._meta = self._meta.model_copy(update={"revision": revision})

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
        """Embed the rows of an mteb data loader; see `mteb.models.EncoderProtocol.encode`.

        Returns:
            float32 array ``(num_rows, dim)``, rows in the order of the loader.
        """
        self._follow_model()
        if has_encoded_items(inputs.dataset):
            return self.embed_tables([cast("Dataset", inputs.dataset)], **kwargs)
        prompt = prompt_of(self.model, task_metadata, prompt_type)
        return self.embed(iter_rows(inputs), setting=Setting(system=prompt), **kwargs)

    def similarity(self, embeddings1: Vectors, embeddings2: Vectors) -> torch.Tensor:
        """Similarity of all pairs: float32 ``(n, m)``; see `mteb.models.EncoderProtocol.similarity`."""
        return self.model.similarity(_float32(embeddings1), _float32(embeddings2))

    def similarity_pairwise(self, embeddings1: Vectors, embeddings2: Vectors) -> torch.Tensor:
        """Similarity of corresponding rows: float32 ``(n,)``; see `mteb.models.EncoderProtocol.similarity_pairwise`."""
        return self.model.similarity_pairwise(_float32(embeddings1), _float32(embeddings2))

    def index(self, corpus: Dataset, **_: object) -> None:
        """Take the corpus of the next `search`; see `mteb.models.SearchProtocol.index`."""
        self._corpus = corpus

    def search(
        self,
        queries: Dataset,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: EncodeKwargs,
        top_ranked: dict[str, list[str]] | None = None,
        num_proc: int | None = None,
        **kwargs: object,
    ) -> RetrievalOutputType:
        """Rank the indexed corpus for each query; see `mteb.models.SearchProtocol.search`.

        Returns:
            ``{query id: {document id: cosine}}``.

        Raises:
            ValueError: If `index` was not called, or a query has no candidates.
        """
        self._follow_model()
        corpus, self._corpus = self._corpus, None
        if corpus is None:
            raise ValueError("call index(corpus) before search(queries)")
        if not (has_encoded_items(corpus) and has_encoded_items(queries)):
            stock = SearchEncoderWrapper(cast("EncoderProtocol", self))  # a task of others: mteb knows its columns
            common: dict[str, Any] = {"task_metadata": task_metadata, "hf_split": hf_split, "hf_subset": hf_subset}
            common |= {"encode_kwargs": encode_kwargs, "num_proc": num_proc}
            stock.index(corpus, **common)
            return stock.search(queries, top_k=top_k, top_ranked=top_ranked, **common)
        query_ids, document_ids = (table.with_format("arrow")["id"].to_pylist() for table in (queries, corpus))
        vectors = self._embed_sides(task_metadata.name, queries, corpus, top_ranked, **encode_kwargs)
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

    def _embed_sides(
        self, name: str, queries: Dataset, corpus: Dataset, top_ranked: dict[str, list[str]] | None, **kwargs: Any
    ) -> np.ndarray:
        """Embed queries, then documents; in one stream where both prescribe the same setting."""
        parts = []
        try:
            for _, group in groupby([queries, corpus], key=setting_of):
                tables = list(group)
                new = self.log_estimate(name, tables, **kwargs)
                parts.append(self.embed_tables(tables, total=new, **kwargs))
        except BadImageError as error:
            # It names an item by its index among the new ones of a window, which nobody can look up.
            where = _location_of(error, queries, corpus, top_ranked)
            raise BadImageError(f"{name}, {where}: {error}") from error
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def wrap(
    model: SentenceTransformer,
    name: str = "unime/local",
    revision: str | None = None,
    *,
    truncate_dim: int | None = None,
    precision: Precision | None = None,
    **fields: Any,
) -> UniMELoader:
    """Make a SentenceTransformer in memory an mteb model that takes images.

    Args:
        model: The model.
        name: ``organisation/model`` under which results are filed.
        revision: Revision under which results are filed. Defaults to `model_digest`, so that mteb's cache does not
            take the scores of one model for those of another, or of this one before its weights, adapters or prompts
            were changed.
        truncate_dim: Leading dimensions of the embeddings to evaluate, normalized again. Defaults to None, all. This and
            the precision make an experiment of mteb, whose results are kept apart.
        precision: ``"int8"`` or ``"binary"``, see `VectorFormat`. Defaults to None, float32.
        **fields: Further fields of mteb's ``ModelMeta``.

    Returns:
        An object for ``mteb.evaluate``.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> wrap(SentenceTransformer("unime-tiny", device="cpu"), "unime/tiny", "1").mteb_model_meta.name
        'unime/tiny'
    """
    loader = UniMELoader(name, revision, model=model, truncate_dim=truncate_dim, precision=precision)
    experiment = {**(fields.pop("experiment_kwargs", None) or {}), **loader.vector_format.experiment}
    fields = {"modalities": modalities_of(model), "experiment_kwargs": experiment or None, **fields}
    meta = model_meta(name, revision, **fields)
    if revision is None:
        loader.follow_model(meta)
    else:
        loader.mteb_model_meta = meta
    return loader


def model_digest(model: SentenceTransformer) -> str:
    """Digest of what decides the scores of a model in memory: its fingerprint, prompts, truncation and similarity.

    Args:
        model: The model.

    Returns:
        16 hexadecimal digits.
    """
    return digest(repr([model_fingerprint(model), *_settings_of(model)]), length=16)


def _settings_of(model: SentenceTransformer) -> list[object]:
    declared = [sorted(model.prompts.items()), model.default_prompt_name, model.truncate_dim, model.similarity_fn_name]
    return [*declared, getattr(model[0], "processing_kwargs", None)]


def _state_of(model: SentenceTransformer) -> object:
    return model_state(model), repr(_settings_of(model))


def _location_of(
    error: BadImageError, queries: Dataset, corpus: Dataset, top_ranked: dict[str, list[str]] | None
) -> str:
    """Which query or document has the image that an error is about; our tasks name queries by their rows."""
    for kind, table in (("query", queries), ("document", corpus)):
        images = table.cast_column("image", Image(decode=False))["image"] if "image" in table.column_names else []
        for name, image in zip(table["id"], images):
            if image and image["path"] and f"image {image['path']}:" in str(error):
                listed = top_ranked or {} if kind == "document" else {}
                query = next((query for query, documents in listed.items() if name in documents), None)
                return f"{kind} {name}" + (f" of query {query}" if query else "")
    return "an image"


def _float32(embeddings: Vectors) -> torch.Tensor:
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
