"""Backbones: vision-language model classes that transformers lacks, registered under model types of their own.

A checkpoint whose official numbers need more than transformers' own classes (one-dimensional image positions, an image
rule, Phi-3.5-Vision) has a model type that begins with ``unime_``. Without this package, loading it fails with "model
type not recognized" and never gives other vectors silently.
"""

from __future__ import annotations

from unime_st.backbones.families import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "register"]


def register() -> None:
    """Register our classes with transformers' Auto classes; a second call changes nothing.

    ``import unime_st`` schedules this for the first ``from_pretrained`` of an Auto class.

    Example:
        >>> register()
        >>> from transformers import AutoConfig
        >>> AutoConfig.for_model("unime_qwen2_vl").image_positions
        '1d'
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    for family in FAMILIES.values():
        if family.module is None:
            continue
        config, model = family.load("config"), family.load("model")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        processor = family.load("processor")
        AutoProcessor.register(config, processor, exist_ok=True)
        if (images := processor.own_image_processor_class) is not None:
            AutoImageProcessor.register(
                config, image_processor_classes={"pil": images, "torchvision": images}, exist_ok=True
            )
        renamed = [model]
        if family.generator:
            generator = family.load("generator")
            AutoModelForImageTextToText.register(config, generator, exist_ok=True)
            AutoModelForMultimodalLM.register(config, generator, exist_ok=True)
            renamed.append(generator)
        for cls in renamed:
            if (mapping := get_checkpoint_conversion_mapping(cls.__name__.removeprefix("UniME"))) is not None:
                register_checkpoint_conversion_mapping(cls.__name__, mapping, overwrite=True)
