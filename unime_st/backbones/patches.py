"""The first layer of Qwen's vision towers as the matrix product that it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PatchProjection(nn.Conv3d):
    """A convolution that sees one patch at a time, computed as a matrix product: the same weights, the same result.

    As a convolution it takes three times as long on a CPU, and torch keeps a kernel for every number of patches that it
    has met: memory that grows with the number of mini-batches, in pieces that keep freed memory around them from being
    used again.

    Args:
        *args: Of :class:`torch.nn.Conv3d`.
        **kwargs: Of the same.

    Example:
        >>> import torch
        >>> from unime_st.backbones.patches import PatchProjection
        >>> PatchProjection(3, 8, (2, 14, 14))(torch.ones(5, 3, 2, 14, 14)).shape
        torch.Size([5, 8, 1, 1, 1])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Project patches ``(patches, channels, frames, height, width)`` as large as the kernel; others as always."""
        if tuple(input.shape[2:]) != self.kernel_size:
            return super().forward(input)
        rows = F.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return rows[..., None, None, None]


def project_patches(model: nn.Module) -> None:
    """Let the patch projections of a model compute as :class:`PatchProjection`; what it saves stays the same.

    Args:
        model: Any model; convolutions of another kind are left alone.

    Example:
        >>> from torch import nn
        >>> layers = nn.Sequential(nn.Conv3d(3, 8, (2, 14, 14)))
        >>> project_patches(layers)
        >>> type(layers[0]).__name__
        'PatchProjection'
    """
    for module in model.modules():
        plain = type(module) is nn.Conv3d and module.padding == (0, 0, 0) and module.dilation == (1, 1, 1)
        if plain and module.groups == 1:
            module.__class__ = PatchProjection
