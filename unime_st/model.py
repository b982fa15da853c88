"""`UniME`: SentenceTransformer for vision-language backbones, with the encoding engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoConfig

from unime_st.backbones.fast_modules import use_fast_modules
from unime_st.backbones.sharding import ShardedByLayer
from unime_st.backbones.varlen_attention import TORCH_FLASH
from unime_st.backbones.video_frames import raise_without_video, resize_frames
from unime_st.encoding.input_videos import has_video
from unime_st.encoding.list_inputs import distinct_inputs, encode_list
from unime_st.encoding.model_inputs import Features, is_single, load_input, normalize_input, raise_if_table
from unime_st.options import check_count


class UniME(ShardedByLayer, SentenceTransformer):
    """Universal multimodal embedding model: texts, images and image+text go in, unit vectors come out.

    A thin subclass of :class:`~sentence_transformers.SentenceTransformer`: folders saved by one load in the other. It
    differs from the plain class as follows:

    - a bare vision-language checkpoint is refused, for which the plain class would silently use mean pooling;
    - embeddings truncated with ``truncate_dim`` are normalized again, so they stay unit vectors;
    - :meth:`encode` runs on the engine of :mod:`unime_st.encoding` and gives the same vectors: equal inputs are encoded
      once, inputs of similar length share a batch, images are decoded ahead of the device, URLs have a time limit;
    - mixed batches of LLaVA-OneVision can be split into mini-batches (cached losses), which needs image counts per row.

    Args:
        model_name_or_path: Alias (``"unime-v2"``, ``"unime-tiny"``), folder, or hub name of a native model.
        image_size: Side in pixels of the square to which images are resized, ``"official"``, ``"training"`` or
            ``"native"``. Only for folders with an image rule, as written by :command:`unime convert`. Defaults to
            None, the setting of the folder.
        **kwargs: As for :class:`~sentence_transformers.SentenceTransformer`. ``attn_implementation`` in ``model_kwargs``
            can also be ``"torch_flash"``: flash attention of torch on CUDA in 16 bits, without padding and without
            the package flash-attn.

    Raises:
        ValueError: The folder is a vision-language checkpoint without ``modules.json``, or ``image_size`` is given for
            a model without an image rule.

    Example:
        >>> from unime_st import UniME
        >>> model = UniME("unime-tiny")
        >>> model.encode([{"text": "a red circle"}]).shape
        (1, 128)
    """

    def __init__(
        self, model_name_or_path: str | Path | None = None, *, image_size: str | int | None = None, **kwargs: Any
    ) -> None:
        if image_size is not None:
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), "image_size": image_size}
        options = dict(kwargs.pop("model_kwargs", None) or {})
        everywhere = options.get("attn_implementation") == TORCH_FLASH
        if everywhere:  # transformers would look for a package of this name
            options["attn_implementation"] = "sdpa"
        super().__init__(
            str(model_name_or_path) if isinstance(model_name_or_path, Path) else model_name_or_path,
            model_kwargs=options,
            **kwargs,
        )
        if image_size is not None and not hasattr(self.processor, "image_rule"):
            raise ValueError(
                f"{model_name_or_path} has no image rule, so image_size={image_size!r} would have no effect. Convert it "
                "with `unime convert ... --image-size`, or omit image_size."
            )
        use_fast_modules(self, everywhere=everywhere)
        resize_frames(self.processor)

    def _load_default_modules(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        config = AutoConfig.from_pretrained(
            model_name_or_path,
            token=kwargs.get("token"),
            cache_dir=kwargs.get("cache_folder"),
            revision=kwargs.get("revision"),
            local_files_only=kwargs.get("local_files_only", False),
        )
        if getattr(config, "vision_config", None) is not None:
            raise ValueError(
                f"{model_name_or_path} is a bare {config.model_type} checkpoint (no modules.json), for which Sentence "
                "Transformers would silently use mean pooling. Make an embedding model of it first: "
                f"`unime convert {model_name_or_path} --recipe NAME --output DIR`."
            )
        return super()._load_default_modules(model_name_or_path, *args, **kwargs)

    def preprocess(self, inputs: Sequence[object], prompt: str | None = None, **kwargs: Any) -> Features:
        """Preprocess inputs into model features, see :meth:`SentenceTransformer.preprocess`.

        Args:
            inputs: Batch of texts, images, ``{"image": ..., "text": ...}`` dicts or chats. Parts that are None are
                ignored.
            prompt: Instruction that is added by the chat template. Defaults to None.
            **kwargs: Passed on.

        Returns:
            dict: Features. ``batch_num_images``, if present, counts the images of every row.

        Example:
            >>> features = UniME("unime-tiny").preprocess([{"text": "a red circle"}])
            >>> features["input_ids"].shape[0]
            1
        """
        inputs = [normalize_input(value) for value in inputs]
        if any(map(has_video, inputs)):
            raise_without_video(self.processor)
        inputs = [load_input(value) for value in inputs]
        features = super().preprocess(inputs, prompt=prompt, **kwargs)
        if "batch_num_images" in features and "num_images_per_sample" in features:
            features["batch_num_images"] = features["num_images_per_sample"]
        return features

    def encode(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute embeddings, see :meth:`SentenceTransformer.encode`.

        Args:
            inputs: One input, or a list, iterator, array or pandas Series of inputs: text, image (PIL, path, URL,
                array), ``{"image": ..., "text": ...}``, chat, :class:`~unime_st.Item`. Parts that are None are ignored.
            *args: Passed on.
            **kwargs: Passed on. ``batch_size`` counts units of 256 tokens, so that batches contain fewer long and more
                short inputs. With ``truncate_dim``, ``normalize_embeddings`` defaults to True.

        Returns:
            np.ndarray: Vectors of shape ``(n, dim)``, or ``(dim,)`` for one input.

        Example:
            >>> UniME("unime-tiny").encode(["a red circle"], truncate_dim=32).shape
            (1, 32)
        """
        if kwargs.get("truncate_dim") is not None or self.truncate_dim is not None:
            kwargs.setdefault("normalize_embeddings", True)
        raise_if_table(inputs)
        if "batch_size" in kwargs:
            check_count("batch_size", kwargs["batch_size"])
        if not isinstance(kwargs.get("prompt"), str | None):
            raise ValueError(f"prompt must be a text or None, got {kwargs['prompt']!r:.80}")
        if isinstance(inputs, os.PathLike):
            inputs = normalize_input(inputs)
        elif not isinstance(inputs, (list, tuple, np.ndarray, Tensor)) and not is_single(inputs):
            inputs = list(inputs)
        return super().encode(inputs, *args, **kwargs)

    def _inference(
        self,
        inputs: list[object],
        *,
        output_value: str | None = "sentence_embedding",
        save_to_cpu: bool = True,
        show_progress_bar: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Encode with the engine; every way of encoding, in this process or in a pool, ends here."""
        if output_value != "sentence_embedding" or self.device.type == "hpu":
            return super()._inference(
                inputs,
                output_value=output_value,
                save_to_cpu=save_to_cpu,
                show_progress_bar=show_progress_bar,
                **kwargs,
            )
        return encode_list(self, inputs, progress=show_progress_bar, on_cpu=save_to_cpu, **kwargs)

    def _multi_process(self, inputs: Sequence[object], *args: Any, **kwargs: Any) -> Any:
        distinct, indices = distinct_inputs(inputs)
        found = super()._multi_process(distinct, *args, **kwargs)
        return found[indices] if isinstance(found, Tensor) else [found[index] for index in indices]
