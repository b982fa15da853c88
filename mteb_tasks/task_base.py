"""Base of all tasks of this package: which models they take, where predictions go, what happens to loaded data."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mteb.abstasks.aggregated_task import AbsTaskAggregate

from mteb_tasks.run_context import current_run

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.models_protocols import MTEBModels
    from mteb.types import HFSubset, ScoresDict

_LOADERS: weakref.WeakKeyDictionary[MTEBModels, MTEBModels] = weakref.WeakKeyDictionary()
"""Our loader for each of mteb's wrappers that was replaced: mteb evaluates one subset after the other."""


class UniMETask:
    """Mixin of the tasks of this package; stands before mteb's task class among the bases."""

    metadata: TaskMetadata
    dataset: Any
    data_loaded: bool
    follows_environment: ClassVar[bool] = False
    """Whether environment variables name the folder of the data, or the protocol, when the task is made."""
    scores_follow_revision: ClassVar[bool] = False
    """Whether stored scores of another revision are those of other data; otherwise the names of subsets tell."""

    def evaluate(
        self,
        model: MTEBModels,
        split: str = "test",
        subsets_to_run: list[str] | None = None,
        *,
        prediction_folder: Path | None = None,
        **kwargs: Any,
    ) -> Mapping[HFSubset, ScoresDict]:
        """See `mteb.AbsTask.evaluate`.

        A text-only model is refused or, if its SentenceTransformer takes images, run with our loader. In ``mteb run``
        predictions are kept beside the results unless ``--prediction-folder`` says otherwise.
        """
        model = with_images(model, self.metadata)
        run = current_run()
        if prediction_folder is None and run is not None:
            prediction_folder = run.prediction_folder(model.mteb_model_meta)
        stock: Any = super()
        return stock.evaluate(model, split, subsets_to_run, prediction_folder=prediction_folder, **kwargs)

    def unload_data(self) -> None:
        """Drop the data and keep the metadata.

        mteb takes metadata of an object for those of filtered data and drops them, too: the second model would be
        filed under the data of the class, and a task that has metadata as an object only could not be evaluated.
        """
        self.dataset, self.data_loaded = None, False


def is_ours(task: object) -> bool:
    """Whether a task object is one of this package, or an aggregate of nothing but such tasks."""
    if isinstance(task, AbsTaskAggregate):
        return bool(task.metadata.tasks) and all(map(is_ours, task.metadata.tasks))
    return isinstance(task, UniMETask)


def follow_environment(task: object) -> None:
    """Make a task anew, in place, if its data have changed, or another folder or profile is named now.

    mteb makes the tasks of a benchmark once in a process, perhaps before the variables were set. The names of the
    subsets carry the digest of local data and the profile.

    Args:
        task: Task object.
    """
    if not getattr(task, "follows_environment", False):
        return
    known: Any = task
    fresh: Any = type(task)()
    if known.metadata.eval_langs != fresh.metadata.eval_langs:
        if known.data_loaded:
            known.unload_data()
        vars(known).update(vars(fresh))


def check_modalities(name: str, modalities: list[str], metadata: TaskMetadata) -> None:
    """Refuse a model on a task with images or videos that it does not take: mteb would score it on the rest alone.

    Args:
        name: The model as the message calls it.
        modalities: What the model takes.
        metadata: The task's.

    Raises:
        ValueError: If the task has images or videos and the model takes none.
    """
    for medium in ("image", "video"):
        if medium in metadata.modalities and medium not in modalities:
            raise ValueError(
                f"{metadata.name} has {medium}s, and {name} takes only {', '.join(modalities) or 'text'}: evaluate a "
                "multimodal model, or one of mteb's text tasks"
            )


def with_images(model: MTEBModels, metadata: TaskMetadata) -> MTEBModels:
    """Replace mteb's text-only wrapper of a sentence-transformers model, which would drop the images.

    Args:
        model: What mteb hands to a task.
        metadata: The task's.

    Returns:
        The model itself where it is not such a wrapper, else our loader around the wrapped SentenceTransformer, under
        the name and revision that mteb knows.

    Raises:
        ValueError: If the wrapped model takes no images, or is a CrossEncoder.
    """
    wrappers = "mteb.models.sentence_transformer_wrapper"
    declared = list(getattr(getattr(model, "mteb_model_meta", None), "modalities", None) or [])
    is_wrapper = any(base.__module__ == wrappers for base in type(model).__mro__)
    media = {"image", "video"} & set(metadata.modalities)
    if not is_wrapper or media <= set(declared):
        return model
    from sentence_transformers import SentenceTransformer

    inner = getattr(model, "model", None)
    meta = model.mteb_model_meta
    if not isinstance(inner, SentenceTransformer):
        advice = "evaluate rerankers in two stages, with mteb_tasks.TwoStage"
        raise ValueError(f"{metadata.name} has images, and mteb hands {type(inner).__name__} the texts only: {advice}")
    check_modalities(
        f"{meta.name} ({type(inner).__name__})", [str(modality) for modality in inner.modalities], metadata
    )
    if model not in _LOADERS:
        from mteb_tasks.loader import UniMELoader
        from mteb_tasks.metadata import modalities_of

        loader = UniMELoader("unime/local", meta.revision, model=inner)  # mteb's own name may lack an organization
        loader.mteb_model_meta = meta.model_copy(update={"modalities": modalities_of(inner)})
        _LOADERS[model] = loader
    return _LOADERS[model]
