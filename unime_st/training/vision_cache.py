"""Vision cache: visual tokens of a frozen vision tower, computed once per image and kept on disk for other runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from tqdm.auto import tqdm

from unime_st.data.items import Item
from unime_st.data.records import ItemFolder
from unime_st.encoding import pixel_budget, weights_fingerprint
from unime_st.encoding.model_inputs import Features
from unime_st.encoding.replicas import with_processor
from unime_st.encoding.stored_outputs import PLACEHOLDER, StoredOutputs
from unime_st.files import Json, atomic_write, digest, write_json
from unime_st.training.feature_store import FeatureStore
from unime_st.training.feed import Feed
from unime_st.training.mini_batches import MiniBatches
from unime_st.training.processes import partial_state
from unime_st.training.visual_tokens import (
    VISUAL_TOKENS,
    backbone,
    check_frozen,
    compute_visual_tokens,
    inject_visual_tokens,
    name_of,
)

_TOKEN_BUDGET = 4096
_IMAGE_FEATURES = ("image_grid_thw", "image_sizes", "batch_num_images")


class VisionCache:
    """Visual tokens of all images of a record folder: training needs no decoding, no pixels and no vision tower.

    Videos are not kept: they are decoded and pass the vision tower in every step.

    ``keys`` are those of :func:`image_keys`. Models, datasets and runs may share ``folder``: each vision tower has a
    subfolder. A ValueError tells of one that is not frozen, see
    :func:`~unime_st.training.visual_tokens.check_frozen`.
    """

    def __init__(
        self, model: BaseModel, records: ItemFolder, keys: np.ndarray, folder: str | Path, dtype: torch.dtype
    ) -> None:
        check_frozen(model)
        self.records, self.keys, self.dtype = records, keys, dtype
        identity = _identity(model, dtype)
        self.store = FeatureStore(Path(folder) / digest(json.dumps(identity, sort_keys=True), length=16))
        if partial_state().is_main_process:
            write_json(self.store.folder / "made_by.json", identity)
        first: Any = model[0]
        self._images = StoredOutputs(first.processor.image_processor)
        self._twin = with_processor(cast(SentenceTransformer, model), self._with_stored_images)
        model.register_forward_pre_hook(inject_visual_tokens)

    def _with_stored_images(self, processor: Any) -> Any:
        processor.image_processor = self._images
        if hasattr(processor, "set_image_rule"):  # scaling the placeholder to a large square would take time
            processor.set_image_rule(None, "native", None)
        return processor

    def fill(self, model: BaseModel, feed: Feed, costs: np.ndarray, pixels: np.ndarray) -> None:
        """Compute the visual tokens that are missing, each process its share.

        ``costs`` and ``pixels`` are the tokens of each item and the pixels of its decoded image, of shape (items,).

        Raises:
            BadImageError: If an image cannot be decoded.
            ValueError: If the processes do not see the same folder.
        """
        keys, first = np.unique(self.keys, return_index=True)
        keys, first = keys[keys != b""], first[keys != b""]
        state = partial_state()
        # Shares are those of all images, not of the missing ones: another run may be adding to the folder.
        share = slice(state.process_index, None, state.num_processes)
        own = first[share][self.store.missing(keys[share])]
        if len(own):
            split = MiniBatches(costs, budget=_TOKEN_BUDGET, pixels=pixels, max_pixels=pixel_budget(model.device))
            groups = [own[group].tolist() for group in split(own)]
            self._compute(model, feed, groups)
        state.wait_for_everyone()
        self.store.refresh()
        if self.store.missing(keys).any():
            raise ValueError(f"vision_cache: not all processes see the same {self.store.folder}; share that folder.")

    def _compute(self, model: BaseModel, feed: Feed, groups: list[list[int]]) -> None:
        was_training = model.training
        model.eval()
        mini_batches = zip(groups, feed.stream(groups, model.device))
        for group, features in tqdm(mini_batches, total=len(groups), desc="visual tokens", unit="batch"):
            layers = compute_visual_tokens(model, features, self.dtype)
            for index, position in enumerate(group):
                tensors = {name: features[name][index : index + 1] for name in _IMAGE_FEATURES if name in features}
                if "image_sizes" in features:  # LLaVA's processors count tokens by the size of a crop
                    tensors["crop"] = torch.tensor(features["pixel_values"].shape[-2:])
                tensors["tokens"] = torch.stack([layer[index] for layer in layers])
                self.store.add(self.keys[position].decode(), tensors)
        self.store.flush()
        model.train(was_training)

    @staticmethod
    def open_item(item: Item) -> Item:
        """Leave an item undecoded for :meth:`preprocess`."""
        return item

    def preprocess(self, items: list[Item]) -> Features:
        """Make the features that ``model.preprocess`` makes, with stored visual tokens instead of pixels."""
        inputs: list[dict[str, object]] = []
        images: list[Features] = []
        for item in items:
            inputs.append({} if item.image is None else {"image": PLACEHOLDER})
            inputs[-1].update({} if item.video is None else {"video": item.video.open()})
            inputs[-1].update({} if item.text is None else {"text": item.text})
            if item.image is not None:
                key = self.keys[self.records.items.position(item.id)]
                images.append(self.store.read(key.decode()))
        with self._images.playing(list(map(_processed, images))):
            features = self._twin.preprocess(inputs)
        features.pop("pixel_values", None)
        if images:
            tokens = torch.cat([image["tokens"] for image in images], dim=1)
            features[VISUAL_TOKENS] = list(tokens)  # as a list it is not split by rows with the batch
        return features

    def __str__(self) -> str:
        images = len(np.unique(self.keys[self.keys != b""]))
        return f"{images:,} images; the folder of this vision tower has {self.store.nbytes / 2**30:.2f} GiB"


def _processed(image: Features) -> Features:
    """What the image processor made of a stored image: its grid or size, and the shape of its pixels."""
    found = {name: image[name] for name in _IMAGE_FEATURES if name in image}
    side = image["crop"].tolist() if "crop" in image else [1, 1]
    return {**found, "pixel_values": torch.zeros(()).expand(1, 1, 1, *side)}


def image_keys(records: ItemFolder, positions: np.ndarray, path: Path | None = None) -> np.ndarray:
    """Digests of the images of the items in use, bytes of shape (items,), empty for the others. Files are not decoded.

    A ``.npy`` file, if given, keeps the keys for a resumed run.
    """
    if path is not None and path.is_file():
        return np.load(path, allow_pickle=False)
    keys = np.zeros(len(records.items), dtype="S32")
    for position in tqdm(np.unique(positions).tolist(), desc="reading images", unit="item"):
        image = records.items.at(position).image
        if image is not None:
            keys[position] = digest(image.read())
    if path is not None:
        with atomic_write(path, sync=False) as temporary, temporary.open("wb") as file:
            np.save(file, keys, allow_pickle=False)
    return keys


def max_cache_bytes(model: BaseModel, records: ItemFolder, positions: np.ndarray, costs: np.ndarray) -> int:
    """Upper bound of the disk space of the visual tokens, in bytes.

    It counts the texts of items with an image too, and an image once for each item.
    """
    base = backbone(model)
    weight = base.get_input_embeddings().weight
    layers = 1 + len(getattr(base.config.vision_config, "deepstack_visual_indexes", ()))
    tokens = sum(int(costs[p]) for p in np.unique(positions).tolist() if records.items.at(p).image is not None)
    return tokens * layers * weight.shape[1] * weight.element_size()


def _identity(model: BaseModel, dtype: torch.dtype) -> Json:
    """Everything that the visual tokens of an image depend on. The language model is left out: stages share a folder."""
    base, processor, first = backbone(model), model.processor, model[0]
    config = {
        name: value for name, value in base.config.to_dict().items() if name.startswith(("vision", "image", "multi"))
    }
    options = (getattr(first, "processing_kwargs", None) or {}).get("image")
    rule = [getattr(processor, name, None) for name in ("image_rule", "image_size", "image_backend")]
    images = processor.image_processor
    content = {
        "family": base.config.model_type.removeprefix("unime_"),
        "weights": weights_fingerprint(base, leave_out=name_of(base, base.get_decoder())),
        "config": config,
        "image_processor": [type(images).__name__, images.to_dict(), rule, options],
        "computed_in": str(dtype),
        "transformers": transformers.__version__,
    }
    return json.loads(json.dumps(content, default=str))
