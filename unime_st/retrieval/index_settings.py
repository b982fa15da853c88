"""Settings of a search index: what determines its vectors, and the folder that stores them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from weakref import WeakKeyDictionary

import pyarrow as pa
from sentence_transformers import SentenceTransformer

from unime_st.data.manifest import is_complete, read_manifest
from unime_st.data.records import ItemFolder
from unime_st.encoding import model_fingerprint
from unime_st.encoding.encode import resolve_prompt
from unime_st.encoding.model_identity import model_state
from unime_st.paths import alias_of
from unime_st.retrieval.faiss_engine import Kind
from unime_st.retrieval.index_items import unfinished_build

ROW_SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("item", pa.string(), nullable=False)])
"""One row per indexed item, in the order of the vectors: its id, and the content hash of the item."""

FAISS_FILE = "index.faiss"
_DOCUMENT, _QUERY = ("document", "passage", "corpus"), ("query",)  # names of prompts, as in Sentence Transformers


@dataclass(frozen=True)
class IndexSettings:
    """What determines the vectors of an index.

    Args:
        kind: Kind of index, see :data:`~unime_st.retrieval.faiss_engine.Kind`.
        model: Fingerprint of the embedding model: weights, adapters, template, image rule and size, data type.
        model_name: Name by which the model was loaded, to load it again.
        model_prompts: Instructions that the model itself declares for documents and for queries.
        prompt: Instruction of the indexed items.
        query_prompt: Instruction of the queries.
        dim: Dimension of the vectors.
        truncate_dim: Number of leading dimensions that were kept; None if all.
        normalized: Whether vectors are scaled to unit length for cosine similarity.
        recall: Recall@10 on a sample, see :func:`~unime_st.retrieval.faiss_engine.sample_recall`; 1 for "flat".
    """

    kind: Kind
    model: str
    model_name: str
    model_prompts: tuple[str | None, ...]
    prompt: str | None
    query_prompt: str | None
    dim: int
    truncate_dim: int | None
    normalized: bool
    recall: float

    def check_model(self, model: SentenceTransformer) -> None:
        """Raise ValueError if the weights, settings or prompts of a model are others."""
        if (found := model_fingerprint(model)) != self.model:
            raise ValueError(
                f"the index was built with another model, or with other weights or settings of {name_of(model)!r} "
                f"(fingerprint {self.model}, now {found}): build it again, or load it with its own model "
                f"({self.model_name!r})"
            )
        if (declared := declared_prompts(model)) != self.model_prompts:
            raise ValueError(
                f"the index was built when the model declared the prompts {self.model_prompts} for documents and "
                f"queries, now they are {declared}: build it again, or restore model.prompts"
            )


class CheckedModels:
    """Models that were found to be the one of an index: all weights are read once, not at every search."""

    def __init__(self, settings: IndexSettings) -> None:
        self._settings = settings
        self._states: WeakKeyDictionary[SentenceTransformer, object] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._settings,)  # copies of the models are other ones

    def check(self, model: SentenceTransformer) -> None:
        """Raise ValueError if the weights, settings or prompts of a model are not those of the index."""
        state = (model_state(model), declared_prompts(model))
        if self._states.get(model) != state:
            self._settings.check_model(model)
            self._states[model] = state


def declared_prompts(model: SentenceTransformer) -> tuple[str | None, ...]:
    """Prompts that ``encode_document`` and ``encode_query`` would use, else the default prompt."""
    found = []
    for names in (_DOCUMENT, _QUERY):
        name = next((name for name in names if name in model.prompts), None)
        found.append(resolve_prompt(model, None) if name is None else model.prompts[name] or None)
    return tuple(found)


def name_of(model: SentenceTransformer) -> str:
    """Alias, hub name or folder of a model; an alias where there is one, which is valid on other machines, too."""
    name = str(getattr(getattr(model[0], "config", None), "name_or_path", ""))
    return alias_of(name) or name


class IndexFolder(ItemFolder):
    """Folder of a saved index: rows of ids, items and manifest."""

    content = "a search index"
    row_columns = tuple(ROW_SCHEMA.names)


def read_settings(folder: str | Path) -> IndexSettings:
    """Settings of a saved index.

    Raises:
        FileNotFoundError: If the folder has no finished index.
        ValueError: If it is not an index, was written by a newer version, or its manifest is damaged.
    """
    if not is_complete(folder) and unfinished_build(folder).is_dir():
        raise FileNotFoundError(f"{folder}: the build of this index was interrupted; the same call goes on with it")
    manifest = read_manifest(folder)
    if manifest.get("stage") != "index":
        raise ValueError(f"{folder}: holds the stage {manifest.get('stage')!r}, not an index")
    try:
        entries = {field.name: manifest["settings"][field.name] for field in fields(IndexSettings)}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: manifest.json lacks {error}: build the index again") from error
    return IndexSettings(**{**entries, "model_prompts": tuple(entries["model_prompts"])})
