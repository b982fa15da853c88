"""Vision cache: visual tokens of a frozen vision tower, computed once per image or video and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from tqdm.auto import tqdm
from transformers.video_utils import VideoMetadata

from unime_st.backbones.video_tokens import VIDEO_PIXELS, compute_video_tokens
from unime_st.backbones.visual_outputs import backbone_of
from unime_st.data.items import Item
from unime_st.data.records import ItemFolder
from unime_st.encoding import pixel_budget, weights_fingerprint
from unime_st.encoding.model_inputs import Features
from unime_st.encoding.replicas import with_processor
from unime_st.encoding.stored_outputs import PLACEHOLDER, StoredOutputs
from unime_st.files import Json, atomic_write, digest, write_json
from unime_st.training.feature_store import FeatureStore
from unime_st.training.feed import Feed, ItemFeatures
from unime_st.training.mini_batches import MiniBatches
from unime_st.training.processes import partial_state
from unime_st.training.visual_tokens import (
    VIDEO_TOKENS,
    VISUAL_TOKENS,
    autocast,
    check_frozen,
    compute_visual_tokens,
    inject_visual_tokens,
    name_of,
)

_TOKEN_BUDGET = 4096
_IMAGE_FEATURES = ("image_grid_thw", "image_sizes", "batch_num_images")
_PROCESSED = "processed"


class VisionCache:
    """Visual tokens of all images and videos of a record folder: training runs no vision tower and decodes nothing.

    ``keys`` are those of :func:`media_keys`. Models, datasets and runs may share ``folder``: each vision tower has a
    subfolder. A ValueError tells of one that is not frozen, see
    :func:`~unime_st.training.visual_tokens.check_frozen`.
    """

    def __init__(
        self, model: BaseModel, records: ItemFolder, keys: np.ndarray, folder: str | Path, dtype: torch.dtype
    ) -> None:
        check_frozen(model)
        self.records, self.keys, self.dtype = records, keys, dtype
        identity = _identity(model, dtype, videos=bool((keys[1] != b"").any()))
        self.store = FeatureStore(Path(folder) / digest(json.dumps(identity, sort_keys=True), length=16))
        if partial_state().is_main_process:
            write_json(self.store.folder / "made_by.json", identity)
        first: Any = model[0]
        self._images = StoredOutputs(first.processor.image_processor)
        self._videos = StoredOutputs(getattr(first.processor, "video_processor", None))
        self._twin = with_processor(cast(SentenceTransformer, model), self._with_stored_outputs)
        model.register_forward_pre_hook(inject_visual_tokens)

    def _with_stored_outputs(self, processor: Any) -> Any:
        processor.image_processor = self._images
        if getattr(processor, "video_processor", None) is not None:
            processor.video_processor = self._videos
        if hasattr(processor, "set_image_rule"):  # scaling the placeholder to a large square would take time
            processor.set_image_rule(None, "native", None)
        return processor

    def fill(self, model: BaseModel, costs: np.ndarray, pixels: np.ndarray, workers: int = 0) -> None:
        """Compute the visual tokens that are missing, each process its share.

        Args:
            model: The model.
            costs: Tokens of each item, of shape (items,).
            pixels: Pixels of its decoded image, of shape (items,).
            workers: Processes that decode ahead of the model, as for :class:`~unime_st.training.feed.Feed`.

        Raises:
            ItemError: If an image or a video cannot be decoded; the message names its row.
            ValueError: If the processes do not see the same folder.
        """
        split = MiniBatches(costs, budget=_TOKEN_BUDGET, pixels=pixels, max_pixels=pixel_budget(model.device))
        was_training = model.training
        model.eval()
        if len(own := self._missing(self.keys[0])):
            feed = Feed(ItemFeatures(self.records, model.preprocess, _image_alone), workers)
            self._add_images(model, feed, [own[group].tolist() for group in split(own)])
        if len(own := self._missing(self.keys[1])):
            feed = Feed(ItemFeatures(self.records, self._video_features, _video_alone), workers)
            self._add_videos(model, feed, own.tolist())
        model.train(was_training)
        partial_state().wait_for_everyone()
        self.store.refresh()
        if self.store.missing(self.keys[self.keys != b""]).any():
            raise ValueError(f"vision_cache: not all processes see the same {self.store.folder}; share that folder.")

    def _missing(self, keys: np.ndarray) -> np.ndarray:
        """Positions of the first items with each key of this process that the store lacks."""
        keys, first = np.unique(keys, return_index=True)
        keys, first = keys[keys != b""], first[keys != b""]
        # Shares are those of all keys, not of the missing ones: another run may be adding to the folder.
        share = slice(partial_state().process_index, None, partial_state().num_processes)
        return first[share][self.store.missing(keys[share])]

    def _add_images(self, model: BaseModel, feed: Feed, groups: list[list[int]]) -> None:
        mini_batches = zip(groups, feed.stream(groups, model.device))
        for group, features in tqdm(mini_batches, total=len(groups), desc="visual tokens", unit="batch"):
            layers = compute_visual_tokens(model, features, self.dtype)
            for index, position in enumerate(group):
                tensors = {name: features[name][index : index + 1] for name in _IMAGE_FEATURES if name in features}
                if "image_sizes" in features:  # LLaVA's processors count tokens by the size of a crop
                    tensors["crop"] = torch.tensor(features["pixel_values"].shape[-2:])
                tensors["tokens"] = torch.stack([layer[index] for layer in layers])
                self.store.add(self.keys[0, position].decode(), tensors)
        self.store.flush()  # the tensors of images and of videos have other names

    def _add_videos(self, model: BaseModel, feed: Feed, positions: list[int]) -> None:
        stream = zip(positions, feed.stream([[position] for position in positions], model.device))
        for position, features in tqdm(stream, total=len(positions), desc="visual tokens", unit="video"):
            with torch.no_grad(), autocast(model, self.dtype):
                layers = compute_video_tokens(backbone_of(model), features)
            self.store.add(self.keys[1, position].decode(), {**features[_PROCESSED], "tokens": torch.stack(layers)})
        self.store.flush()

    def _video_features(self, inputs: list[object]) -> Features:
        """Features of a video, and as tensors what its processor made of it."""
        with self._videos.recording() as recorded:
            features = self._twin.preprocess(inputs)
        made = dict(recorded[0])
        tensors = {"shape": torch.tensor(made.pop(VIDEO_PIXELS).shape)}
        for metadata in made.pop("video_metadata", ()):
            text = json.dumps(asdict(metadata), default=lambda value: value.tolist())
            tensors["metadata"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return {**features, _PROCESSED: {**tensors, **made}}

    @staticmethod
    def open_item(item: Item) -> Item:
        """Leave an item undecoded for :meth:`preprocess`."""
        return item

    def preprocess(self, items: list[Item], **options: str | None) -> Features:
        """Make the features of ``model.preprocess`` with these options, with stored visual tokens instead of pixels."""
        inputs: list[dict[str, object]] = []
        images: list[Features] = []
        videos: list[Features] = []
        for item in items:
            inputs.append({} if item.image is None else {"image": PLACEHOLDER})
            inputs[-1].update({} if item.video is None else {"video": [PLACEHOLDER]})
            inputs[-1].update({} if item.text is None else {"text": item.text})
            if item.image is None and item.video is None:
                continue
            image_key, video_key = self.keys[:, self.records.items.position(item.id)]
            images += [] if item.image is None else [self.store.read(image_key.decode())]
            videos += [] if item.video is None else [self.store.read(video_key.decode())]
        played = (list(map(_processed_image, images)), list(map(_processed_video, videos)))
        with self._images.playing(played[0]), self._videos.playing(played[1]):
            features = self._twin.preprocess(inputs, **options)
        for stored, pixels, tokens in ((images, "pixel_values", VISUAL_TOKENS), (videos, VIDEO_PIXELS, VIDEO_TOKENS)):
            features.pop(pixels, None)
            if stored:  # as a list the tokens are not split by rows with the batch
                features[tokens] = list(torch.cat([one["tokens"] for one in stored], dim=1))
        return features

    def __str__(self) -> str:
        images, videos = (len(np.unique(keys[keys != b""])) for keys in self.keys)
        counted = f"{images:,} images" + (f", {videos:,} videos" if videos else "")
        return f"{counted}; the folder of this vision tower has {self.store.nbytes / 2**30:.2f} GiB"


def _image_alone(item: Item) -> object:
    return {"image": item.to_input()["image"]}


def _video_alone(item: Item) -> object:
    return {"video": item.to_input()["video"]}


def _processed_image(image: Features) -> Features:
    """What the image processor made of a stored image: its grid or size, and the shape of its pixels."""
    found = {name: image[name] for name in _IMAGE_FEATURES if name in image}
    side = image["crop"].tolist() if "crop" in image else [1, 1]
    return {**found, "pixel_values": torch.zeros(()).expand(1, 1, 1, *side)}


def _processed_video(video: Features) -> Features:
    """What the video processor made of a stored video, but for the values of its pixels."""
    found = {name: value for name, value in video.items() if name not in ("tokens", "shape", "metadata")}
    if "metadata" in video:
        found["video_metadata"] = [VideoMetadata(**json.loads(bytes(video["metadata"].tolist())))]
    return {**found, VIDEO_PIXELS: torch.zeros(()).expand(1, *video["shape"].tolist()[1:])}


def media_keys(records: ItemFolder, positions: Sequence[int] | np.ndarray, path: Path | None = None) -> np.ndarray:
    """Digests of the images and of the videos of the items in use, without decoding them.

    Args:
        records: The record folder.
        positions: Positions of the items in use.
        path: ``.npy`` file that keeps the keys for a resumed run. Defaults to None.

    Returns:
        np.ndarray: Bytes of shape (2, items): of images, then of videos; empty where an item has none.
    """
    if path is not None and path.is_file():
        return np.load(path, allow_pickle=False)
    keys = np.zeros((2, len(records.items)), dtype="S32")
    for position in tqdm(np.unique(positions).tolist(), desc="reading images", unit="item"):
        item = records.items.at(position)
        if item.image is not None:
            keys[0, position] = digest(item.image.read())
        if item.video is not None:
            keys[1, position] = digest(b"video", item.video.digest())
    if path is not None:
        with atomic_write(path, sync=False) as temporary, temporary.open("wb") as file:
            np.save(file, keys, allow_pickle=False)
    return keys


def max_cache_bytes(model: BaseModel, records: ItemFolder, positions: np.ndarray, costs: np.ndarray) -> int:
    """Upper bound of the disk space of the visual tokens, in bytes.

    It counts the texts of items with an image or a video too, and an image or a video once for each item.
    """
    base = backbone_of(model)
    weight = base.get_input_embeddings().weight
    layers = 1 + len(getattr(base.config.vision_config, "deepstack_visual_indexes", ()))
    items = ((position, records.items.at(position)) for position in np.unique(positions).tolist())
    tokens = sum(int(costs[position]) for position, item in items if item.image is not None or item.video is not None)
    return tokens * layers * weight.shape[1] * weight.element_size()


def _identity(model: BaseModel, dtype: torch.dtype, *, videos: bool) -> Json:
    """Everything that visual tokens depend on. The language model is left out: stages share a folder."""
    base, processor, first = backbone_of(model), model.processor, model[0]
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
    if videos:
        processing = processor.video_processor
        content["video_processor"] = [type(processing).__name__, processing.to_dict(), processing.limits]
    return json.loads(json.dumps(content, default=str))
