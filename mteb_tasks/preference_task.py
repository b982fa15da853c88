"""Base of the compositional tasks: accuracy of an image preferring its caption to a foil, in categories.

Tasks are registered whenever mteb is imported, so torch is imported only where it is used.
"""

from __future__ import annotations

import logging
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from mteb.abstasks.image.image_text_pair_classification import AbsTaskImageTextPairClassification
from mteb.models.models_protocols import EncoderProtocol
from mteb.timing import TimingStack
from mteb.types import PromptType

from mteb_tasks.columns import PROMPT_NAME, Modality, iter_items, to_dataset
from mteb_tasks.task_base import UniMETask, with_images
from unime_st.data.items import Item

if TYPE_CHECKING:
    from mteb.models.models_protocols import MTEBModels
    from mteb.types import EncodeKwargs, HFSubset, ScoresDict

    from mteb_tasks.item_embedder import ItemEmbedder
    from mteb_tasks.two_stage import TwoStage
    from unime_st.data.scenes import Foil
    from unime_st.judging import Group

logger = logging.getLogger(__name__)

GROUPS = ("replace", "swap", "add")
"""SugarCrepe's groups; a category is named ``<group>_<what>``."""


class CaptionPreferenceTask(UniMETask, AbsTaskImageTextPairClassification):
    """Share of images strictly closer to their caption than to the foil, one subset per category.

    Differs from mteb's base class where that would change the result: a tie counts as wrong (a constant model scores
    0, not 1), and each distinct image and text is encoded once, in batches. Rerankers are scored pairwise.
    """

    images_column_names = "image"
    texts_column_names = ("caption", "negative_caption")
    image_prompt: str | None = None
    """Name of the prompt that our models put to the images."""
    _support_search = True
    _logged_for: Callable[[], object] = staticmethod(lambda: None)
    """Weak reference to the model whose estimate is in the log."""

    @abstractmethod
    def foils(self, category: str, split: str) -> Sequence[Foil]:
        """Read one category.

        Args:
            category: Name of the subset.
            split: Name of the split.

        Returns:
            Image, caption and foil of each pair.
        """

    def load_data(self, num_proc: int | None = None, *, timer: TimingStack | None = None, **kwargs: object) -> None:
        """Load all categories; see `mteb.AbsTask.load_data`. A second call does nothing."""
        if self.data_loaded:
            return
        with (timer or TimingStack())("Data loading"):
            self.dataset = {
                category: {
                    split: _pair_table(self.foils(category, split), self.image_prompt) for split in self.eval_splits
                }
                for category in self.hf_subsets
            }
        self.data_loaded = True

    def evaluate(
        self, model: MTEBModels, split: str = "test", subsets_to_run: list[str] | None = None, **kwargs: Any
    ) -> Mapping[HFSubset, ScoresDict]:
        """Evaluate all categories; see `mteb.AbsTask.evaluate`. The cost of models of this package is logged first."""
        from mteb_tasks.item_embedder import ItemEmbedder
        from mteb_tasks.two_stage import TwoStage

        model = with_images(model, self.metadata)
        if isinstance(model, (ItemEmbedder, TwoStage)) and self._logged_for() is not model:
            self._logged_for = weakref.ref(model)  # mteb asks for one category after the other
            self.load_data()
            self._log_estimate(model, split, **kwargs.get("encode_kwargs", {}))
        return super().evaluate(model, split, subsets_to_run, **kwargs)

    def _log_estimate(self, model: ItemEmbedder | TwoStage, split: str, **encode_kwargs: Any) -> None:
        tables = [self.dataset[category][split] for category in self.hf_subsets]
        if hasattr(model, "log_estimate"):
            texts = {text for table in tables for name in self.texts_column_names for text in table[name]}
            captions = to_dataset({text: Item(text=text) for text in sorted(texts)}, ["text"])
            model.log_estimate(self.metadata.name, [*tables, captions], **encode_kwargs)
        elif logger.isEnabledFor(logging.INFO):
            from mteb_tasks.embedding_estimate import timed_sample

            count = sum(map(len, tables))
            sample = [group for table in tables for group in _groups(model, table.select(range(min(2, len(table)))))]
            _, time = timed_sample(model.score_groups, sample, count)
            logger.info("%s: %s pairs of image and text to judge: %s", self.metadata.name, f"{2 * count:,}", time)

    def _evaluate_subset(  # type: ignore[override]  # main score is the accuracy per category
        self,
        model: MTEBModels,
        data_split: Dataset,
        *,
        encode_kwargs: EncodeKwargs,
        hf_split: str,
        hf_subset: str,
        prediction_folder: Path | None = None,
        num_proc: int | None = None,
        timer: TimingStack,
        **kwargs: object,
    ) -> dict[str, float]:
        from mteb_tasks.two_stage import TwoStage

        with timer("Encoding and scoring", split=hf_split, subset=hf_subset):
            if isinstance(model, TwoStage):
                scores = np.stack(model.score_groups(_groups(model, data_split)))
            elif isinstance(model, EncoderProtocol):
                context = {"task_metadata": self.metadata, "hf_split": hf_split, "hf_subset": hf_subset}
                scores = _embedded(model, data_split, encode_kwargs, context)
            else:
                raise TypeError(f"{type(model).__name__} neither encodes nor scores pairs of image and text")
        if prediction_folder is not None:
            rows = {str(i): dict(zip(self.texts_column_names, map(float, pair))) for i, pair in enumerate(scores)}
            self._save_task_predictions(rows, model, prediction_folder, hf_split=hf_split, hf_subset=hf_subset)
        correct = scores[:, 0] > scores[:, 1]
        return {"text_acc": float(correct.mean()), "tie_rate": float((scores[:, 0] == scores[:, 1]).mean())}


def group_means(scores: dict[str, float]) -> dict[str, float]:
    """Average categories into SugarCrepe's groups, unweighted as in the papers.

    Args:
        scores: Accuracy of each category, for instance ``{"replace_obj": 0.9, ...}``.

    Returns:
        Mean of each group that has a category, and ``"mean"`` of the groups.

    Example:
        >>> group_means({"swap_obj": 0.5, "swap_att": 0.7, "add_obj": 0.8})
        {'swap': 0.6, 'add': 0.8, 'mean': 0.7}
    """
    groups = {group: [value for name, value in scores.items() if name.startswith(f"{group}_")] for group in GROUPS}
    means = {group: float(np.mean(values)) for group, values in groups.items() if values}
    return {**means, "mean": float(np.mean(list(means.values())))} if means else {}


def _pair_table(foils: Sequence[Foil], prompt_name: str | None) -> Dataset:
    items = {str(row): foil.image for row, foil in enumerate(foils)}
    images = to_dataset(items, ["image"], prompt_name=prompt_name)
    columns = {"caption": [foil.caption for foil in foils], "negative_caption": [foil.foil for foil in foils]}
    for name, values in columns.items():
        images = images.add_column(name, values)
    return images


def _items(
    data: Dataset, prompts: Mapping[str, str | None] | None = None
) -> tuple[list[Item], list[Item], list[Item]]:
    images = [item for window in iter_items(data, prompts=prompts) for item in window]
    captions, foils = ([Item(text=text) for text in data[name]] for name in ("caption", "negative_caption"))
    return images, captions, foils


def _groups(model: TwoStage, data: Dataset) -> list[Group]:
    from unime_st.judging import Group

    return [Group(image, list(texts)) for image, *texts in zip(*_items(data, model.prompts))]


def _embedded(
    model: EncoderProtocol, data: Dataset, encode_kwargs: EncodeKwargs, context: dict[str, object]
) -> np.ndarray:
    """Cosine of each image with caption and foil: float32 ``(num_pairs, 2)``."""
    images, captions, foils = _items(data)
    context = {**context, **encode_kwargs}
    prompt_name = data[PROMPT_NAME][0] if PROMPT_NAME in data.column_names else None
    image_of = _unit_vectors(model, images, "image", prompt_name, prompt_type=PromptType.query, **context)
    text_of = _unit_vectors(model, captions + foils, "text", None, prompt_type=PromptType.document, **context)
    left = np.stack([image_of[item.id] for item in images])
    right = (np.stack([text_of[item.id] for item in texts]) for texts in (captions, foils))
    return np.stack([(left * texts).sum(axis=1) for texts in right], axis=1)


def _unit_vectors(
    model: EncoderProtocol, items: Sequence[Item], modality: Modality, prompt_name: str | None, **context: Any
) -> dict[str, np.ndarray]:
    """Embed each distinct item once: item id to unit vector."""
    import torch
    from torch.utils.data import DataLoader

    distinct = {item.id: item for item in items}
    loader: DataLoader = DataLoader(
        to_dataset(distinct, [modality], prompt_name=prompt_name),  # type: ignore[arg-type]
        batch_size=int(context.get("batch_size", 32)),
        collate_fn=_columns_of,
    )
    # Foreign models may return tensors of any type on any device.
    vectors = torch.as_tensor(model.encode(loader, **context)).float().cpu().numpy()
    return dict(zip(distinct, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)))


def _columns_of(rows: Sequence[dict[str, object]]) -> dict[str, list[object]]:
    return {name: [row[name] for row in rows] for name in rows[0]}
