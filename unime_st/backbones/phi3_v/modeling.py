"""Phi-3.5-Vision model: CLIP features, merged four to one, between the token embeddings of Phi-3."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import AutoModel, CLIPVisionConfig, Phi3Model
from transformers.modeling_outputs import BaseModelOutputWithPast

from unime_st.backbones.phi3_v.configuration import UniMEPhi3VConfig
from unime_st.backbones.slow_dtype import warn_of_slow_dtype


class Phi3VImageEmbedding(nn.Module):
    """Image tokens of crops.

    Two by two neighbouring patches of a crop become one token. The crops of an image are laid out as they lie in it,
    every row of tokens ends in a learned separator (``sub_GN``), and after another separator (``glb_GN``) follows the
    whole image in the same manner. An MLP projects all to the width of the language model.

    Args:
        config: Configuration of the whole model.
    """

    def __init__(self, config: UniMEPhi3VConfig) -> None:
        super().__init__()
        vision = cast(CLIPVisionConfig, config.vision_config)
        self.layer = config.vision_feature_layer
        self.crop_size = cast(int, vision.image_size)
        self.img_processor = AutoModel.from_config(vision)
        width = 4 * vision.hidden_size
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, width))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.img_projection = nn.Sequential(
            nn.Linear(width, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )

    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Return the tokens of all images one after another.

        Args:
            pixel_values: ``(n, 1 + crops, 3, size, size)``, the whole image first, zeros after the last crop.
            image_sizes: ``(n, 2)``, height and width in pixels of the crops of an image laid out.

        Returns:
            ``(tokens, hidden_size)``.
        """
        grids = [(int(height) // self.crop_size, int(width) // self.crop_size) for height, width in image_sizes]
        counts = [1 + rows * columns for rows, columns in grids]
        crops = torch.cat([values[:count] for values, count in zip(pixel_values, counts)])
        states = self.img_processor(crops.to(self.glb_GN.dtype), output_hidden_states=True).hidden_states
        patches = states[self.layer][:, 1:].split(counts)
        tokens = []
        for features, (rows, columns) in zip(patches, grids):
            tokens += [self._layout(features[1:], rows, columns), self.glb_GN[0], self._layout(features[:1], 1, 1)]
        projected: torch.Tensor = self.img_projection(torch.cat(tokens))
        return projected

    def _layout(self, features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """``(rows * columns, side * side, width)`` patches to ``(tokens, 4 * width)``, a separator after every row."""
        side = int(features.shape[1] ** 0.5) // 2
        grid = features.view(rows, columns, side, 2, side, 2, -1).permute(0, 2, 1, 4, 3, 5, 6)
        grid = grid.reshape(rows * side, columns * side, -1)
        return torch.cat([grid, self.sub_GN[0].expand(rows * side, 1, -1)], dim=1).flatten(0, 1)


class UniMEPhi3VModel(Phi3Model):
    """Phi-3.5-Vision without a language head.

    Image tokens are negative ids in ``input_ids``, as in the published code: -1 for the first image of a row, -2
    for the second, and so on.

    Args:
        config: Configuration.
    """

    config_class = UniMEPhi3VConfig
    # The published module kept a second name for the token embedding, and old CLIP a buffer of positions.
    _keys_to_ignore_on_load_unexpected = [r"vision_embed_tokens\.wte\.", r"embeddings\.position_ids$", r"^lm_head\."]

    def __init__(self, config: UniMEPhi3VConfig) -> None:
        super().__init__(config)
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Run the model on ``input_ids`` (batch, length), negative where an image token belongs, or ``inputs_embeds``.

        Raises:
            ValueError: The number of image tokens is not what the images need.
        """
        if inputs_embeds is None and input_ids is not None:
            is_image = input_ids < 0
            inputs_embeds = self.embed_tokens(input_ids.clamp_min(0))
            if pixel_values is not None and image_sizes is not None:
                warn_of_slow_dtype(self)
                tokens = self.vision_embed_tokens(pixel_values, image_sizes)
                if int(is_image.sum()) != len(tokens):
                    raise ValueError(
                        f"{int(is_image.sum())} image tokens in input_ids, the images give {len(tokens)}."
                    )
                inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], tokens.to(inputs_embeds.dtype))
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
