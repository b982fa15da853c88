"""LLaVA-1.6 and LLaVA-OneVision: model types and processors with an image rule."""

from __future__ import annotations

from transformers import (
    BaseImageProcessor,
    BaseVideoProcessor,
    LlavaNextConfig,
    LlavaNextModel,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerBase,
)

from unime_st.backbones.processing import UniMEProcessorMixin
from unime_st.backbones.slow_dtype import WarnsOfSlowDtype
from unime_st.recipes.recipe import RuleFields


class UniMELlavaNextConfig(LlavaNextConfig):
    """LLaVA-1.6's configuration under a model type of its own, so that the image rule is never lost silently."""

    model_type = "unime_llava_next"


class UniMELlavaNextModel(WarnsOfSlowDtype, LlavaNextModel):
    """LLaVA-1.6 without a language head."""

    config_class = UniMELlavaNextConfig
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight$"]


class UniMELlavaNextProcessor(UniMEProcessorMixin, LlavaNextProcessor):
    """LLaVA-1.6's processor with the image rule of a recipe, see :class:`UniMEProcessorMixin`."""

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        image_rule: RuleFields | None = None,
        image_size: str | int | None = None,
        image_backend: str | None = None,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )
        self.set_image_rule(image_rule, image_size, image_backend)


class UniMELlavaOnevisionConfig(LlavaOnevisionConfig):
    """LLaVA-OneVision's configuration under a model type of its own, so that the image rule is never lost silently."""

    model_type = "unime_llava_onevision"


class UniMELlavaOnevisionModel(WarnsOfSlowDtype, LlavaOnevisionModel):
    """LLaVA-OneVision without a language head."""

    config_class = UniMELlavaOnevisionConfig
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight$"]


class UniMELlavaOnevisionProcessor(UniMEProcessorMixin, LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor with the image rule of a recipe, see :class:`UniMEProcessorMixin`."""

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        video_processor: BaseVideoProcessor | None = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
        image_rule: RuleFields | None = None,
        image_size: str | int | None = None,
        image_backend: str | None = None,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
        )
        self.set_image_rule(image_rule, image_size, image_backend)
