"""Table of model families: model types, configuration, model and processor classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Family:
    """A family of vision-language backbones.

    Classes are named, not imported: a family costs nothing until it is used.

    Args:
        name: Key of :data:`FAMILIES`, as in :class:`~unime_st.recipes.Recipe`.
        model_types: Values of ``model_type`` in ``config.json`` that belong to the family.
        module: Module with our classes; None where transformers' own classes suffice, i.e. no recipe of the family needs
            an image rule or a position scheme.
        config: Name of our configuration class.
        model: Name of our model class.
        processor: Name of our processor class.
        generator: Name of our class with a language head, for rerankers.
        weights_like: transformers' class whose renaming of checkpoint keys our model shares.
        generator_weights_like: The same for the class with a language head.
        native: Whether transformers can load the family without us.

    Example:
        >>> FAMILIES["qwen2_vl"].model_types
        ('qwen2_vl',)
    """

    name: str
    model_types: tuple[str, ...]
    module: str | None = None
    config: str | None = None
    model: str | None = None
    processor: str | None = None
    generator: str | None = None
    weights_like: str | None = None
    generator_weights_like: str | None = None
    native: bool = True

    def load(self, attribute: str) -> Any:
        """Our class for ``"config"``, ``"model"``, ``"processor"`` or ``"generator"``; ValueError if there is none.

        Example:
            >>> FAMILIES["qwen2_vl"].load("config").__name__
            'UniMEQwen2VLConfig'
        """
        name = getattr(self, attribute)
        if self.module is None or name is None:
            raise ValueError(f"The family {self.name} has no {attribute} class in unime_st.")
        return getattr(import_module(self.module), name)

    def read_config(self, folder: Path) -> Any:
        """Configuration of a checkpoint; where transformers lacks the family, in the layout of its publisher."""
        from transformers import AutoConfig

        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not self.native and content.get("model_type") in self.model_types:
            return self.load("config").from_published(folder)
        return AutoConfig.from_pretrained(folder)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="qwen2_vl",
            model_types=("qwen2_vl",),
            module="unime_st.backbones.qwen",
            config="UniMEQwen2VLConfig",
            model="UniMEQwen2VLModel",
            processor="UniMEQwen2VLProcessor",
            weights_like="Qwen2VLModel",
        ),
        Family(
            name="qwen2_5_vl",
            model_types=("qwen2_5_vl",),
            module="unime_st.backbones.qwen",
            config="UniMEQwen2_5_VLConfig",
            model="UniMEQwen2_5_VLModel",
            processor="UniMEQwen2_5_VLProcessor",
            generator="UniMEQwen2_5_VLForConditionalGeneration",
            weights_like="Qwen2_5_VLModel",
            generator_weights_like="Qwen2_5_VLForConditionalGeneration",
        ),
        Family(
            name="llava_next",
            model_types=("llava_next",),
            module="unime_st.backbones.llava",
            config="UniMELlavaNextConfig",
            model="UniMELlavaNextModel",
            processor="UniMELlavaNextProcessor",
            weights_like="LlavaNextModel",
        ),
        Family(
            name="llava_onevision",
            model_types=("llava_onevision",),
            module="unime_st.backbones.llava",
            config="UniMELlavaOnevisionConfig",
            model="UniMELlavaOnevisionModel",
            processor="UniMELlavaOnevisionProcessor",
            weights_like="LlavaOnevisionModel",
        ),
        Family(
            name="phi3_v",
            model_types=("phi3_v",),
            module="unime_st.backbones.phi3_v",
            config="UniMEPhi3VConfig",
            model="UniMEPhi3VModel",
            processor="UniMEPhi3VProcessor",
            native=False,
        ),
        Family(name="qwen3_vl", model_types=("qwen3_vl",)),
        Family(name="internvl", model_types=("internvl",)),
        Family(name="smolvlm", model_types=("smolvlm",)),
        Family(name="any", model_types=()),
    )
}
