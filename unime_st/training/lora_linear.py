"""LoRA layers as one matrix product with merged weights, instead of a product beside the frozen one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class MergedLoraLinear(Linear):
    """peft's LoRA layer without dropout, computed as ``x (W + s B A)^T``: the same weights, value and gradients.

    Beside the product with W, peft's layer has two thin products, and passes over outputs of all tokens: three in the
    forward, three in the backward pass. Merging costs one pass over the weights. Nothing is stored between calls. Where
    merging would round the adapter away (16-bit weights, autocast) or cost more than it saves (few tokens), and for
    merged or disabled adapters, the layer is peft's.

    Example:
        >>> from peft import LoraConfig, inject_adapter_in_model
        >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 2)))
        >>> merge_lora_products(model)
        >>> type(model[0]).__name__, model(torch.ones(3, 4)).shape
        ('MergedLoraLinear', torch.Size([3, 2]))
    """

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Apply the layer to ``x`` of shape ``(..., in_features)``."""
        base: nn.Linear = self.get_base_layer()  # type: ignore[assignment]
        if args or kwargs or not self._can_merge(x, base.weight):
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        thin = (self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
        product: Tensor = _MergedProduct.apply(x, base.weight, base.bias, *thin)
        return product

    def _can_merge(self, x: Tensor, weight: Tensor) -> bool:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        same = type(weight) is nn.Parameter and x.dtype == weight.dtype and not weight.requires_grad
        exact = same and x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
        return exact and x.numel() // x.shape[-1] >= len(weight)


class _MergedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scaling = scaling
        return F.linear(x, torch.addmm(weight, up, down, alpha=scaling), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        rows, outputs = x.flatten(end_dim=-2), gradient.flatten(end_dim=-2)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (outputs @ torch.addmm(weight, up, down, alpha=ctx.scaling)).view_as(x)
        of_down = (outputs @ up).mul_(ctx.scaling).T @ rows
        of_up = outputs.T @ (rows @ down.T).mul_(ctx.scaling)
        return of_x, None, None, of_down, of_up, None


def merge_lora_products(model: nn.Module) -> None:
    """Change the plain LoRA layers without dropout of this model to :class:`MergedLoraLinear`."""
    for module in model.modules():
        if type(module) is not Linear or type(module.get_base_layer()) is not nn.Linear:
            continue
        plain = not module.lora_variant and not any(module.lora_bias.values()) and not module.fan_in_fan_out
        if plain and all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values()):
            module.__class__ = MergedLoraLinear
