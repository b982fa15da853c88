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
        name: ``model_type`` of the checkpoints, key of :data:`FAMILIES`; ``any`` stands for those without a row.
        module: Module with our classes; None where transformers' own classes suffice, i.e. no recipe of the family
            needs an image rule or a position scheme.
        classes: Beginning of the names of our classes. Behind ``UniME`` it is that of transformers' classes, whose
            renaming of checkpoint keys ours share.
        generator: Whether we have a class with a language head, for rerankers.
        native: Whether transformers can load the family without us.

    Example:
        >>> FAMILIES["qwen2_vl"].model_types
        ('qwen2_vl',)
    """

    name: str
    module: str | None = None
    classes: str = ""
    generator: bool = False
    native: bool = True

    @property
    def model_types(self) -> tuple[str, ...]:
        """Values of ``model_type`` in ``config.json`` that belong to the family."""
        return () if self.name == "any" else (self.name,)

    def load(self, attribute: str) -> Any:
        """Our class for ``"config"``, ``"model"``, ``"processor"`` or ``"generator"``; ValueError if there is none.

        Example:
            >>> FAMILIES["qwen2_vl"].load("config").__name__
            'UniMEQwen2VLConfig'
        """
        if self.module is None or (attribute == "generator" and not self.generator):
            raise ValueError(f"The family {self.name} has no {attribute} class in unime_st.")
        ending = "ForConditionalGeneration" if attribute == "generator" else attribute.title()
        return getattr(import_module(self.module), self.classes + ending)

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
        Family("qwen2_vl", "unime_st.backbones.qwen", "UniMEQwen2VL"),
        Family("qwen2_5_vl", "unime_st.backbones.qwen", "UniMEQwen2_5_VL", generator=True),
        Family("llava_next", "unime_st.backbones.llava", "UniMELlavaNext"),
        Family("llava_onevision", "unime_st.backbones.llava", "UniMELlavaOnevision"),
        Family("phi3_v", "unime_st.backbones.phi3_v", "UniMEPhi3V", native=False),
        Family("qwen3_vl"),
        Family("qwen3_5"),
        Family("internvl"),
        Family("smolvlm"),
        Family("any"),
    )
}
