"""mteb tasks on the drawn scenes: every kind of MMEB task, and SugarCrepe's seven categories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mteb_tasks.local_data import LOCAL_PREFIX
from mteb_tasks.metadata import UniMETaskMetadata, task_metadata
from mteb_tasks.preference_task import CaptionPreferenceTask
from mteb_tasks.retrieval_task import ItemRetrievalTask
from mteb_tasks.task_base import UniMETask
from unime_st.data.scenes import FOIL_CATEGORIES, Foil, RetrievalData, foils, retrieval_data

SCENES_REVISION = "1"
"""Part of the result key; raise it when the drawings or texts of the test split change."""


def _metadata(name: str, description: str, category: str, **fields: object) -> UniMETaskMetadata:
    return task_metadata(
        name=name,
        description=description,
        category=category,
        dataset={"path": "unime-st/scenes", "revision": SCENES_REVISION},
        **fields,
    )


class _DrawnTask(UniMETask):
    """Mixin of the tasks on scenes: another number of scenes, or other scenes, have a revision of their own."""

    scores_follow_revision = True
    size: int
    data_seed: int

    def set_sample(self, size: int, data_seed: int, official: int) -> None:
        """Set which scenes are drawn.

        Args:
            size: Number of queries or pairs.
            data_seed: Seed.
            official: Number of the official task, which has the seed 0.
        """
        self.size, self.data_seed = size, data_seed
        if (size, data_seed) != (official, 0):
            revision = f"{LOCAL_PREFIX}{SCENES_REVISION}-size-{size}-seed-{data_seed}"
            dataset = {**self.metadata.dataset, "revision": revision}
            self.metadata = self.metadata.model_copy(update={"dataset": dataset})


class _ScenesRetrieval(_DrawnTask, ItemRetrievalTask):
    """Scenes as a retrieval task.

    Args:
        size: Number of queries. Defaults to that of the official task: 300, and 1,600 for the tasks on near-twins.
        data_seed: Which held-out scenes are drawn.
        **kwargs: mteb's task arguments.
    """

    scene_task: ClassVar[str]
    official_size: ClassVar[int] = 300

    def __init__(self, *, size: int | None = None, data_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.set_sample(self.official_size if size is None else size, data_seed, self.official_size)

    def retrieval_data(self, subset: str, split: str) -> RetrievalData:
        """Draw the scenes of the split."""
        return retrieval_data(self.scene_task, split=split, size=self.size, seed=self.data_seed)


class ScenesShortT2IRetrieval(_ScenesRetrieval):
    """Find the image of a short caption."""

    scene_task = "short_t2i"
    metadata = _metadata("ScenesShortT2IRetrieval", "Find the drawn scene that a short caption describes.", "t2i")


class ScenesShortI2TRetrieval(_ScenesRetrieval):
    """Find the short caption of an image."""

    scene_task = "short_i2t"
    metadata = _metadata("ScenesShortI2TRetrieval", "Find the short caption of a drawn scene.", "i2t")


class ScenesLongT2IRetrieval(_ScenesRetrieval):
    """Find the image of a long caption."""

    scene_task = "long_t2i"
    metadata = _metadata("ScenesLongT2IRetrieval", "Find the drawn scene that a long caption describes.", "t2i")


class ScenesLongI2TRetrieval(_ScenesRetrieval):
    """Find the long caption of an image."""

    scene_task = "long_i2t"
    metadata = _metadata("ScenesLongI2TRetrieval", "Find the long caption of a drawn scene.", "i2t")


class ScenesVQA(_ScenesRetrieval):
    """Answer a question about an image."""

    scene_task = "vqa"
    metadata = _metadata(
        "ScenesVQA",
        "Answer a question about a drawn scene by retrieving the answer.",
        "it2t",
        task_subtypes=["Question answering"],
    )


class ScenesGrounding(_ScenesRetrieval):
    """Find the crop that shows the object an expression refers to."""

    scene_task = "grounding"
    metadata = _metadata(
        "ScenesGrounding",
        "Find the crop of a drawn scene that shows the object an expression refers to.",
        "it2i",
        task_subtypes=["Object recognition"],
    )


class ScenesComposedRetrieval(_ScenesRetrieval):
    """Find the image that differs from another as a text says."""

    scene_task = "composed"
    metadata = _metadata(
        "ScenesComposedRetrieval", "Find the drawn scene that differs from another one as a text says.", "it2i"
    )


class ScenesClassification(_ScenesRetrieval):
    """Find the class of an image."""

    scene_task = "classification"
    metadata = _metadata(
        "ScenesClassification",
        "Classify a drawn scene by retrieving its class name.",
        "i2t",
        task_subtypes=["Scene recognition"],
    )


class _TwinsRetrieval(_ScenesRetrieval):
    """Families of near-twins; a gallery of twice as many documents as queries, several of which may be right."""

    official_size = 1600


class ScenesTwinsT2IRetrieval(_TwinsRetrieval):
    """Find the images of a caption among near-twins."""

    scene_task = "twins_t2i"
    metadata = _metadata(
        "ScenesTwinsT2IRetrieval",
        "Find the drawn scenes of which a caption is true, in a gallery of their near-twins.",
        "t2i",
        main_score="ndcg_at_10",
    )


class ScenesTwinsI2TRetrieval(_TwinsRetrieval):
    """Find the captions of an image among those of near-twins."""

    scene_task = "twins_i2t"
    metadata = _metadata(
        "ScenesTwinsI2TRetrieval",
        "Find the captions that are true of a drawn scene, in a gallery of captions of its near-twins.",
        "i2t",
        main_score="ndcg_at_10",
    )


class ScenesCompositional(_DrawnTask, CaptionPreferenceTask):
    """Tell a caption from a foil that differs in one object, attribute or relation.

    Args:
        size: Number of pairs of each category.
        data_seed: Which held-out scenes are drawn.
        **kwargs: mteb's task arguments.
    """

    metadata = _metadata(
        "ScenesCompositional",
        "Tell the caption of a drawn scene from a foil, in the seven categories of SugarCrepe.",
        "i2t",
        type="Compositionality",
        eval_langs={category: ["eng-Latn"] for category in FOIL_CATEGORIES},
        main_score="text_acc",
        task_subtypes=["Caption Pairing"],
    )

    def __init__(self, *, size: int = 150, data_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.set_sample(size, data_seed, 150)

    def foils(self, category: str, split: str) -> Sequence[Foil]:
        """Draw the pairs of one category."""
        return foils(category, split=split, size=self.size, seed=self.data_seed)


SCENES_TASKS = (
    ScenesShortT2IRetrieval,
    ScenesShortI2TRetrieval,
    ScenesLongT2IRetrieval,
    ScenesLongI2TRetrieval,
    ScenesVQA,
    ScenesGrounding,
    ScenesComposedRetrieval,
    ScenesClassification,
    ScenesTwinsT2IRetrieval,
    ScenesTwinsI2TRetrieval,
    ScenesCompositional,
)
"""Every scenes task."""
