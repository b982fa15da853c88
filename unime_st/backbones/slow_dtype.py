"""Warning about images in 16 bits on a CPU, which take several times as long as in float32."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)


def warn_of_slow_dtype(model: PreTrainedModel) -> None:
    """Warn, once per process, if a model is about to process an image in 16 bits on a CPU.

    Args:
        model: The model.

    Example:
        >>> from unime_st import UniME
        >>> warn_of_slow_dtype(UniME("unime-tiny").transformers_model)
    """
    if model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16):
        logger.warning_once(
            f"Images in {str(model.dtype).removeprefix('torch.')} on a CPU take up to 7 times as long as in float32. "
            'Load the model with model_kwargs={"dtype": "float32"}; a smaller image size, such as '
            'processor_kwargs={"image_size": 672}, saves more.'
        )


class WarnsOfSlowDtype:
    """Mixin for a transformers model, before it in the list of bases: :func:`warn_of_slow_dtype` at every image."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        original: Any = cls.get_image_features  # type: ignore[attr-defined]

        @functools.wraps(original)  # other code reads the signature
        def get_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
            warn_of_slow_dtype(self)
            return original(self, *args, **kwargs)

        cls.get_image_features = get_image_features  # type: ignore[attr-defined]
