"""mteb metadata of our tasks and models, with every field that mteb's own tests ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.model_meta import ScoringFunction
from mteb.models.models_protocols import MTEBModels
from sentence_transformers import CrossEncoder, SentenceTransformer

from mteb_tasks.local_data import LOCAL_PREFIX
from unime_st.backbones.video_frames import accepts_video
from unime_st.paths import home

UNIME_V2_BIBTEX = r"""
@article{gu2025unimev2,
  author = {Gu, Tiancheng and Yang, Kaicheng and Zhang, Kaichen and An, Xiang and Feng, Ziyong and Zhang, Yueyi and Cai, Weidong and Deng, Jiankang and Bing, Lidong},
  journal = {arXiv preprint arXiv:2510.13515},
  title = {UniME-V2: MLLM-as-a-Judge for Universal Multimodal Embedding Learning},
  year = {2025},
}
"""


class UniMETaskMetadata(TaskMetadata):
    """mteb's metadata with the statistics file next to our tasks (mteb's own path points into its installed wheel).

    Statistics of data in a folder of the user's are kept in ``$UNIME_HOME``: they are not those of the official data,
    and an installed package is nothing to write to.

    Example:
        >>> dataset = {"path": "a/b", "revision": "1"}
        >>> task_metadata(name="Demo", description="d", category="t2i", dataset=dataset).descriptive_stat_path.name
        'Demo.json'
    """

    @property
    def descriptive_stat_path(self) -> Path:
        """Where the statistics of this task are stored."""
        revision = str(self.dataset["revision"])
        if revision.startswith(LOCAL_PREFIX):
            return home() / "descriptive_stats" / f"{self.name}-{revision}.json"
        return Path(__file__).parent / "descriptive_stats" / f"{self.name}.json"


def task_metadata(*, name: str, description: str, category: str, **fields: object) -> UniMETaskMetadata:
    """Fill the metadata of a task.

    Args:
        name: Name of the task.
        description: One or two sentences for mteb's documentation.
        category: mteb's modality code, for instance ``"it2t"``.
        **fields: Fields that differ from the defaults of this project.

    Returns:
        Metadata with no field left empty.

    Example:
        >>> dataset = {"path": "a/b", "revision": "1"}
        >>> task_metadata(name="Demo", description="d", category="t2i", dataset=dataset).modalities
        ['text', 'image']
    """
    modalities = [word for letter, word in (("t", "text"), ("i", "image"), ("v", "video")) if letter in category]
    known: dict[str, Any] = {
        "type": "Any2AnyRetrieval",
        "modalities": modalities,
        "reference": "https://arxiv.org/abs/2510.13515",
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
        "main_score": "hit_rate_at_1",
        "date": ("2025-01-01", "2026-01-01"),
        "domains": ["Constructed"],
        "task_subtypes": ["Image Text Retrieval"],
        "license": "apache-2.0",
        "annotations_creators": "derived",
        "dialect": [],
        "sample_creation": "created",
        "bibtex_citation": UNIME_V2_BIBTEX,
    }
    return UniMETaskMetadata(**{**known, "name": name, "description": description, "category": category, **fields})


def modalities_of(model: SentenceTransformer | CrossEncoder) -> list[str]:
    """Modalities that our loader gives a model: text and image, and video for families with a video slot.

    Args:
        model: The model.
    """
    return ["text", "image", *(["video"] if accepts_video(getattr(model[0], "processor", None)) else [])]


class UniMEModelMeta(ModelMeta):
    """Metadata of our models, which run without mteb's packages for videos.

    Our video tasks store frames, and most tasks have no videos. On mteb's own video tasks `datasets` asks for torchcodec.
    """

    def _resolve_extras_groups(self) -> list[str]:
        return [group for group in super()._resolve_extras_groups() if group != "video"]


def model_meta(
    name: str, revision: str | None, *, loader: Callable[..., MTEBModels] | None = None, **fields: object
) -> ModelMeta:
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
    known: dict[str, object] = {
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
    return UniMEModelMeta(**{**empty, **known, **fields})
