"""Configuration of Phi-3.5-Vision."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CLIPVisionConfig, Phi3Config, PreTrainedConfig

# The published configuration names this vision tower and does not repeat its numbers.
_CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


class UniMEPhi3VConfig(Phi3Config):
    """Configuration of :class:`UniMEPhi3VModel`.

    Args:
        vision_config: Configuration of the CLIP tower; default is ViT-L/14 at 336 pixels as published.
        vision_feature_layer: Hidden states of the tower that become image tokens.
        pad_token_id: Padding token, None as published.
        **kwargs: As for :class:`transformers.Phi3Config`; the fields of the published ``config.json`` are understood.

    Example:
        >>> UniMEPhi3VConfig().vision_config.image_size
        336
    """

    model_type = "unime_phi3_v"
    sub_configs_defaults = {"vision_config": CLIPVisionConfig}  # type: ignore[dict-item]

    vision_config: dict | PreTrainedConfig | None = None
    vision_feature_layer: int = -2
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        kwargs.pop("img_processor", None)
        kwargs.pop("embd_layer", None)
        if self.vision_config is None:
            self.vision_config = dict(_CLIP_LARGE_336)
        if isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**{k: v for k, v in self.vision_config.items() if k != "model_type"})
        super().__post_init__(**kwargs)

    @classmethod
    def from_published(cls, folder: str | Path) -> UniMEPhi3VConfig:
        """Read the ``config.json`` of a published Phi-3.5-Vision checkpoint, whose model type transformers lacks.

        Raises:
            ValueError: The configuration is of a variant without published weights.
        """
        content = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        layer, tower = content.get("embd_layer") or {}, content.get("img_processor") or {}
        expected = {"projection_cls": "mlp", "hd_transform_order": "sub_glb", "use_hd_transform": True}
        wrong = {key: layer[key] for key in expected if key in layer and layer[key] != expected[key]}
        rope = dict(content.pop("rope_scaling", None) or {})
        kind = rope.pop("type", rope.get("rope_type", "su"))
        if kind not in ("su", "longrope"):
            wrong["rope_scaling"] = kind
        if wrong or tower.get("type_feature", "patch") != "patch":
            raise ValueError(f"{folder}: this variant of Phi-3-Vision is not supported: {wrong or tower}.")
        for key in ("model_type", "auto_map", "architectures"):
            content.pop(key, None)
        if rope:
            # transformers calls this scheme longrope and looks for its length among the other numbers.
            length = content.get("original_max_position_embeddings", 4096)
            rope.update(rope_type="longrope", original_max_position_embeddings=length)
            rope["factor"] = content.get("max_position_embeddings", length) / length
            content["rope_scaling"] = rope
        if "layer_idx" in tower:
            content["vision_feature_layer"] = tower["layer_idx"]
        return cls.from_dict(content)
