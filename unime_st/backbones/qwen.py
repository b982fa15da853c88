"""Qwen2-VL and Qwen2.5-VL: one-dimensional image positions, processors with an image rule."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BaseImageProcessor,
    BaseVideoProcessor,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen2VLProcessor,
)

from unime_st.backbones.processing import UniMEProcessorMixin
from unime_st.backbones.slow_dtype import WarnsOfSlowDtype
from unime_st.recipes.recipe import RuleFields


class UniMEQwen2VLConfig(Qwen2VLConfig):
    """Configuration of :class:`UniMEQwen2VLModel`.

    Args:
        image_positions: ``"1d"`` counts image tokens like text tokens, ``"3d"`` is Qwen2-VL's own scheme.
        **kwargs: As for :class:`transformers.Qwen2VLConfig`.

    Example:
        >>> UniMEQwen2VLConfig().image_positions
        '1d'
    """

    model_type = "unime_qwen2_vl"
    image_positions: str = "1d"


class _ImagePositions:
    """Mixin: rotary positions as the configuration of the checkpoint says.

    UniME-V2 was trained on bare image tokens. The rope index of its code looks for ``<|vision_start|>``, finds no
    image and counts every token by one (transformers then repeats that count for height and width). transformers 5
    uses token types instead, which would give these weights positions that they were never trained on.
    """

    config: Any

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions of shape ``(3, batch, length)`` and the offset that follows them, see transformers."""
        if self.config.image_positions == "1d":
            mm_token_type_ids = torch.zeros_like(mm_token_type_ids)
        return super().get_rope_index(  # type: ignore[misc]
            input_ids,
            mm_token_type_ids,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
            **kwargs,
        )


class UniMEQwen2VLModel(WarnsOfSlowDtype, _ImagePositions, Qwen2VLModel):
    """Qwen2-VL without a language head, with the image positions that its configuration names."""

    config_class = UniMEQwen2VLConfig
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight$"]


class UniMEQwen2VLProcessor(UniMEProcessorMixin, Qwen2VLProcessor):
    """Qwen2-VL's processor with the image rule of a recipe, see :class:`UniMEProcessorMixin`."""

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        video_processor: BaseVideoProcessor | None = None,
        chat_template: str | None = None,
        image_rule: RuleFields | None = None,
        image_size: str | int | None = None,
        image_backend: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        self.set_image_rule(image_rule, image_size, image_backend)


class UniMEQwen2_5_VLConfig(Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration under a model type of its own, so that the image rule is never lost silently."""

    model_type = "unime_qwen2_5_vl"


class UniMEQwen2_5_VLModel(WarnsOfSlowDtype, Qwen2_5_VLModel):
    """Qwen2.5-VL without a language head."""

    config_class = UniMEQwen2_5_VLConfig
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight$"]


class UniMEQwen2_5_VLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with a language head: UniME-V2-Reranker."""

    config_class = UniMEQwen2_5_VLConfig


class UniMEQwen2_5_VLProcessor(UniMEProcessorMixin, Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor with the image rule of a recipe, see :class:`UniMEProcessorMixin`."""

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        video_processor: BaseVideoProcessor | None = None,
        chat_template: str | None = None,
        image_rule: RuleFields | None = None,
        image_size: str | int | None = None,
        image_backend: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        self.set_image_rule(image_rule, image_size, image_backend)
