"""Visual tokens of images, computed once and kept on disk, instead of a frozen vision tower in every step."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import transformers
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from torch import nn
from tqdm.auto import tqdm
from transformers import BatchFeature

from unime_st.data.items import Item
from unime_st.data.manifest import write_json
from unime_st.data.records import ItemFolder
from unime_st.encoding import pixel_budget, weights_fingerprint
from unime_st.encoding.replicas import with_processor
from unime_st.training.distinct_items import MiniBatches
from unime_st.training.feature_store import FeatureStore
from unime_st.training.feed import Features, Feed
from unime_st.training.processes import processes
from unime_st.training.spill import Spill

VISUAL_TOKENS = "visual_tokens"
"""Feature with the stored tokens of a mini-batch: those that enter the language model, then those of inner layers."""

_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "llava_onevision")
_TOKENS_AT_ONCE = 4096
_OF_A_IMAGE = ("image_grid_thw", "image_sizes", "batch_num_images")
_STAND_IN = Image.new("RGB", (1, 1))


class VisionCache:
    """Feeds a model with stored visual tokens: no decoding, no pixels, no vision tower.

    Args:
        model: The model to train, with its adapter.
        records: The items.
        keys: Of :func:`image_keys`.
        folder: Where tokens are kept, for any number of models, data sets and runs.
        dtype: What training computes in.

    Raises:
        ValueError: See :func:`check_frozen`.
    """

    def __init__(
        self, model: BaseModel, records: ItemFolder, keys: np.ndarray, folder: str | Path, dtype: torch.dtype
    ) -> None:
        check_frozen(model)
        self.records, self.keys, self.dtype = records, keys, dtype
        identity = _identity(model, dtype)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.store = FeatureStore(Path(folder) / digest)
        if processes().is_main_process:
            write_json(self.store.folder / "made_by.json", identity)
        first: Any = model[0]
        self._images = _StoredImages(first.processor.image_processor)
        self._twin: Any = with_processor(cast(SentenceTransformer, model), self._with_stored_images)
        model.register_forward_pre_hook(_put_in)

    def _with_stored_images(self, processor: Any) -> Any:
        processor.image_processor = self._images
        if hasattr(processor, "set_image_rule"):  # the stand-in needs no rule, and a large square takes time
            processor.set_image_rule(None, "native", None)
        return processor

    def fill(self, model: BaseModel, feed: Feed, costs: np.ndarray, pixels: np.ndarray) -> None:
        """Compute what is missing, every process its share.

        Args:
            model: The model.
            feed: Decodes and processes items.
            costs: Tokens of every item.
            pixels: Pixels that decoding it makes.

        Raises:
            BadImageError: If an image cannot be decoded.
            ValueError: If the processes do not see the same folder.
        """
        keys, first = np.unique(self.keys, return_index=True)
        keys, first = keys[keys != b""], first[keys != b""]
        state = processes()
        # Dealt out before looking what is there: somebody else may be adding to it.
        share = slice(state.process_index, None, state.num_processes)
        own = first[share][self.store.missing(keys[share])]
        if len(own):
            cut = MiniBatches(costs, budget=_TOKENS_AT_ONCE, pixels=pixels, most_pixels=pixel_budget(model.device))
            groups = [own[group].tolist() for group in cut(own)]
            with torch.no_grad(), _autocast(model, self.dtype):
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
            layers = _visual_layers(model, features)
            for index, position in enumerate(group):
                tensors = {name: features[name][index : index + 1] for name in _OF_A_IMAGE if name in features}
                if "image_sizes" in features:  # these processors count tokens by the side of a crop
                    tensors["crop"] = torch.tensor(features["pixel_values"].shape[-2:])
                tensors["tokens"] = torch.stack([layer[index] for layer in layers])
                self.store.add(self.keys[position].decode(), tensors)
        self.store.flush()
        model.train(was_training)

    @staticmethod
    def open_item(item: Item) -> Item:
        """Make of an item what :meth:`preprocess` takes: itself, undecoded."""
        return item

    def preprocess(self, items: list[Item]) -> Features:
        """Make features of items as ``model.preprocess`` does, with stored tokens in the place of pixels.

        Args:
            items: Items, undecoded.

        Returns:
            dict: Input of the model.
        """
        inputs: list[dict[str, Any]] = []
        self._images.stored = []
        for item in items:
            inputs.append({} if item.image is None else {"image": _STAND_IN})
            inputs[-1].update({} if item.text is None else {"text": item.text})
            if item.image is not None:
                key = self.keys[self.records.items.position(item.id)]
                self._images.stored.append(self.store.read(key.decode()))
        features = self._twin.preprocess(inputs)
        features.pop("pixel_values", None)
        if self._images.stored:
            tokens = torch.cat([image["tokens"] for image in self._images.stored], dim=1)
            features[VISUAL_TOKENS] = list(tokens)  # a list is not cut by rows where a batch is
        self._images.stored = []
        return features

    def __str__(self) -> str:
        images = len(np.unique(self.keys[self.keys != b""]))
        return f"{images:,} images; the folder of this vision tower has {self.store.nbytes / 2**30:.2f} GiB"


class _StoredImages:
    """In the place of an image processor: says of stored images what the processor said of them."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.stored: list[dict[str, torch.Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_processor" not in self.__dict__:  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._processor, name)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        first = self.stored[0]
        found = {name: torch.cat([one[name] for one in self.stored]) for name in _OF_A_IMAGE if name in first}
        side = first["crop"].tolist() if "crop" in first else [1, 1]
        return BatchFeature({**found, "pixel_values": torch.zeros(()).expand(1, 1, 1, *side)})


def _put_in(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Hand stored tokens to the model under the name that transformers has for them."""
    if VISUAL_TOKENS not in args[0]:
        return None
    features = dict(args[0])
    tokens, *inner = features.pop(VISUAL_TOKENS)
    image = SimpleNamespace(pooler_output=(tokens,), deepstack_features=[(layer,) for layer in inner])
    return {**features, "mm_encoder_outputs": {"image": image}}, *args[1:]


class SeenOnce:
    """Runs a frozen vision tower once in a step with cached gradients, whose two passes would each decode and run it.

    Args:
        model: The model to train, with its adapter.
        dtype: What training computes in.

    Attributes:
        most_bytes: Features that may be kept in memory from the first pass to the second: 16 MiB in that of a CPU, 1 GiB
            in that of another device. The others wait in a temporary file, so that memory does not grow with the batch.

    Raises:
        ValueError: See :func:`check_frozen`.

    Example:
        >>> import torch
        >>> from unime_st import UniME
        >>> once = SeenOnce(UniME("unime-tiny").requires_grad_(False), torch.float32)
        >>> once.most_bytes >> 20
        16
    """

    def __init__(self, model: BaseModel, dtype: torch.dtype) -> None:
        check_frozen(model)
        self.most_bytes = (16 if model.device.type == "cpu" else 1024) << 20
        self._model, self._dtype = model, dtype
        self._kept: dict[int, Features] = {}
        self._held = 0
        self._spill = Spill()
        model.register_forward_pre_hook(_put_in)

    def begin(self) -> None:
        """Forget the step before."""
        self._kept.clear()
        self._held = 0
        self._spill.clear()

    @property
    def host_bytes(self) -> int:
        """Bytes kept in the memory of the host."""
        return self._held if self._model.device.type == "cpu" else 0

    def __contains__(self, number: int) -> bool:
        return number in self._kept or number in self._spill

    def __getitem__(self, number: int) -> Features:
        """The features of mini-batch ``number`` as the first pass left them."""
        if number in self._kept:
            return dict(self._kept[number])
        return self._spill.read(number, self._model.device)

    def look(self, number: int, features: Features, *, keep: bool) -> Features:
        """Put visual tokens in the place of pixels.

        Args:
            number: Of the mini-batch.
            features: Input of the model.
            keep: For the second pass.

        Returns:
            dict: Input of the model without pixels.
        """
        tokens: list[torch.Tensor] = []
        if "pixel_values" in features:
            with torch.no_grad(), _autocast(self._model, self._dtype):
                layers = _visual_layers(self._model, features)
            tokens = [torch.cat([layer[index] for index in range(len(layer))]) for layer in layers]
            features = {name: value for name, value in features.items() if name != "pixel_values"}
            features[VISUAL_TOKENS] = tokens
        if keep:
            self._keep(number, features)
        return features

    def _keep(self, number: int, features: Features) -> None:
        parts = [part for value in features.values() for part in (value if isinstance(value, list) else [value])]
        size = sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
        if self._held + size <= self.most_bytes:
            self._held += size
            self._kept[number] = dict(features)
        else:
            self._spill.add(number, features)


def check_frozen(model: BaseModel) -> None:
    """Refuse a model whose visual tokens do not stay what they are.

    Raises:
        ValueError: If the family is not supported, or something outside the language model is trained or random.

    Example:
        >>> from unime_st import UniME
        >>> check_frozen(UniME("unime-tiny").requires_grad_(False))
    """
    base: Any = _base(model)
    family = base.config.model_type.removeprefix("unime_")
    if family not in _FAMILIES:
        raise ValueError(f"vision_cache supports {', '.join(_FAMILIES)}, but the model is {family}: leave it out.")
    language = f"{_name_of(base, base.get_decoder())}."
    trained = [
        name
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and not name.startswith(language)
    ]
    if trained:
        raise ValueError(
            f"vision_cache needs a frozen vision tower and projector, but {len(trained)} of their weights are trained "
            f"({trained[0]}, ...): leave vision_cache out, or change lora_targets (with lora_rank 0: frozen)."
        )
    for name, module in base.named_modules():
        rates = (getattr(module, rate, 0.0) for rate in ("p", "dropout", "attention_dropout", "drop_prob"))
        if not name.startswith(language) and any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise ValueError(f"vision_cache needs a vision tower without dropout, but {name} has some: leave it out.")


def image_keys(records: ItemFolder, positions: np.ndarray, path: Path | None = None) -> np.ndarray:
    """Know images by their content; they are read, not decoded.

    Args:
        records: The items.
        positions: Those that matter.
        path: ``.npy`` file that keeps the keys for the next start.

    Returns:
        np.ndarray: Bytes of shape (items,), empty where an item has no image or does not matter.
    """
    if path is not None and path.is_file():
        return np.load(path, allow_pickle=False)
    keys = np.zeros(len(records.items), dtype="S32")
    for position in tqdm(np.unique(positions).tolist(), desc="reading images", unit="item"):
        image = records.items.at(position).image
        if image is not None:
            keys[position] = hashlib.sha256(image.read()).hexdigest()[:32]
    if path is not None:
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, keys, allow_pickle=False)
        temporary.replace(path)
    return keys


def most_bytes(model: BaseModel, records: ItemFolder, positions: np.ndarray, costs: np.ndarray) -> int:
    """Disk that the visual tokens take at most: text is counted as well, and an image in several items several times.

    Args:
        model: The model.
        records: The items.
        positions: Those that matter.
        costs: Tokens of every item.
    """
    base: Any = _base(model)
    weight = base.get_input_embeddings().weight
    layers = 1 + len(getattr(base.config.vision_config, "deepstack_visual_indexes", ()))
    tokens = sum(int(costs[p]) for p in np.unique(positions).tolist() if records.items.at(p).image is not None)
    return tokens * layers * weight.shape[1] * weight.element_size()


def _visual_layers(model: BaseModel, features: Features) -> list[Any]:
    """What the vision tower gives to the language model, for each layer that it enters a sequence over the images."""
    base = _base(model)
    accepted = signature(base.get_image_features).parameters
    inputs = {name: value for name, value in features.items() if name in accepted}
    out = base.get_image_features(**inputs, return_dict=True)
    return [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]


def _autocast(model: BaseModel, dtype: torch.dtype) -> Any:
    return torch.autocast(model.device.type, dtype) if dtype != torch.float32 else nullcontext()


def _base(model: BaseModel) -> Any:
    transformer: Any = model.transformers_model
    return transformer.base_model


def _name_of(module: nn.Module, part: nn.Module) -> str:
    return next(name for name, child in module.named_modules() if child is part)


def _identity(model: BaseModel, dtype: torch.dtype) -> dict[str, Any]:
    """All that the tokens of an image depend on. The language model does not count, so stages share a folder."""
    base, processor, first = _base(model), model.processor, model[0]
    config = {
        name: value for name, value in base.config.to_dict().items() if name.startswith(("vision", "image", "multi"))
    }
    options = (getattr(first, "processing_kwargs", None) or {}).get("image")
    rule = [getattr(processor, name, None) for name in ("image_rule", "image_size", "image_backend")]
    images = processor.image_processor
    content = {
        "family": base.config.model_type.removeprefix("unime_"),
        "weights": weights_fingerprint(base, leave_out=_name_of(base, base.get_decoder())),
        "config": config,
        "image_processor": [type(images).__name__, images.to_dict(), rule, options],
        "computed_in": str(dtype),
        "transformers": transformers.__version__,
    }
    return json.loads(json.dumps(content, default=str))
