"""What mteb is told about a model of ours."""

from __future__ import annotations

from typing import Any

from mteb.models import ModelMeta
from mteb.models.model_meta import ScoringFunction


def model_meta(name: str, revision: str | None, *, loader: Any = None, **fields: Any) -> ModelMeta:
    """Describe one of our embedding models to mteb.

    Args:
        name: ``organisation/model``; mteb names result folders after it.
        revision: Part of mteb's result key: two different models must not share it.
        loader: What mteb calls to load the model; None for a model already in memory.
        **fields: Further fields of mteb's ``ModelMeta``.

    Returns:
        Metadata that declares text and image input (a plain SentenceTransformer would be declared text only and
        refused by every image task) and cosine similarity.

    Example:
        >>> model_meta("unime/local", "1").modalities
        ['text', 'image']
    """
    known: dict[str, Any] = {
        "loader": loader,
        "name": name,
        "revision": revision,
        "modalities": ["text", "image"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "framework": ["Sentence Transformers"],
        "use_instructions": True,
        "languages": ["eng-Latn"],
    }
    empty = ModelMeta.create_empty().model_dump()
    return ModelMeta(**{**empty, **known, **fields})
