"""Patch projection of Qwen's vision towers as a matrix product instead of a convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PatchProjection(nn.Conv3d):
    """Convolution whose kernel covers one patch, computed as a matrix product: the same weights, the same result.

    As a convolution it takes three times as long on a CPU. Torch also keeps a kernel for every number of patches that
    it has met, so memory grows with the number of mini-batches and fragments.

    Args:
        *args: As for :class:`torch.nn.Conv3d`.
        **kwargs: As for :class:`torch.nn.Conv3d`.

    Example:
        >>> import torch
        >>> from unime_st.backbones.patch_projection import PatchProjection
        >>> PatchProjection(3, 8, (2, 14, 14))(torch.ones(5, 3, 2, 14, 14)).shape
        torch.Size([5, 8, 1, 1, 1])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Project patches ``(patches, channels, frames, height, width)``; those of another size than the kernel stay stock."""
        if tuple(input.shape[2:]) != self.kernel_size:
            return super().forward(input)
        rows = F.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return rows[..., None, None, None]


def replace_patch_projections(model: nn.Module) -> None:
    """Make the patch projections of a model :class:`PatchProjection`, in place; saved files stay the same.

    Example:
        >>> from torch import nn
        >>> layers = nn.Sequential(nn.Conv3d(3, 8, (2, 14, 14)))
        >>> replace_patch_projections(layers)
        >>> type(layers[0]).__name__
        'PatchProjection'
    """
    for module in model.modules():
        plain = type(module) is nn.Conv3d and module.padding == (0, 0, 0) and module.dilation == (1, 1, 1)
        if plain and module.groups == 1:
            module.__class__ = PatchProjection
