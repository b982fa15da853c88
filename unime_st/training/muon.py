"""Muon in the dtype of the weights: orthogonalized momentum for linear layers, AdamW for all other weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon for the groups of parameters with ``"muon": True``, AdamW for the others, with one learning rate.

    The update of a matrix is scaled by ``0.2 * sqrt(max(rows, columns))``, so that its size is that of an AdamW update
    (``match_rms_adamw``): learning rate and weight decay carry over. :class:`torch.optim.Muon` iterates in bfloat16,
    which took 15 times as long on a CPU without bfloat16 units; here matrices of one shape are orthogonalized
    together, in their own dtype.

    Args:
        params: Groups of parameters, or parameters (AdamW).
        lr: Learning rate. Defaults to 1e-3.
        betas: AdamW: decay of the gradient and of its square. Defaults to (0.9, 0.999).
        eps: AdamW: added to the denominator. Defaults to 1e-8.
        weight_decay: Decoupled weight decay. Defaults to 0.
        momentum: Muon: decay of the gradient, with Nesterov's look-ahead. Defaults to 0.95.

    Raises:
        ValueError: If a parameter of a Muon group is not a matrix.

    References:
        - Muon: https://kellerjordan.github.io/posts/muon/
        - Size of the update: https://arxiv.org/abs/2502.16982

    Example:
        >>> import torch
        >>> from unime_st.training.muon import Muon
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = Muon([{"params": [weight], "muon": True}], lr=0.1)
        >>> weight.grad = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
        >>> optimizer.step()
        >>> bool(weight[0, 0] < -0.01 and weight[1, 1] < -0.01 and weight[0, 1] == 0)
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum, "muon": False},
        )
        for group in self.param_groups:
            if group["muon"] and any(weight.ndim != 2 for weight in group["params"]):
                raise ValueError("a group with muon=True must hold matrices only; leave the others to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            (self._muon if group["muon"] else self._adamw)(group, weights)
        return loss

    def _muon(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        by_shape: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for weight in weights:
            by_shape[weight.shape, weight.dtype, weight.device].append(weight)
        for alike in by_shape.values():
            looked_ahead = []
            for weight in alike:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                gradient, buffer = weight.grad, state["momentum_buffer"]
                assert gradient is not None
                buffer.lerp_(gradient, 1 - group["momentum"])
                looked_ahead.append(gradient.lerp(buffer, group["momentum"]))
            scale = 0.2 * max(alike[0].shape) ** 0.5
            for weight, update in zip(alike, orthogonalized(torch.stack(looked_ahead))):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        if not weights:
            return
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        states = [self.state[weight] for weight in weights]
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            [weight.grad for weight in weights if weight.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalized(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices near 1 (0.7 to 1.2) by five Newton-Schulz iterations.

    Args:
        matrices: ``(n, rows, columns)``.

    Returns:
        Tensor: ``(n, rows, columns)``, with the singular vectors of the matrices.

    Example:
        >>> import torch
        >>> from unime_st.training.muon import orthogonalized
        >>> values = torch.linalg.svdvals(orthogonalized(torch.diag(torch.tensor([3.0, 1.0]))[None]))
        >>> bool(values.min() > 0.6 and values.max() < 1.3)
        True
    """
    a, b, c = _COEFFICIENTS
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_groups(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split each group of parameters of a trainer: weights of the model's linear layers for Muon, the rest for AdamW.

    Embeddings are left to AdamW, also where an output layer shares them.

    Example:
        >>> from torch import nn
        >>> from unime_st.training.muon import muon_groups
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
        >>> groups = muon_groups(model, [{"params": list(model.parameters()), "weight_decay": 0.1}])
        >>> [(group["muon"], [tuple(weight.shape) for weight in group["params"]]) for group in groups]
        [(True, [(2, 4)]), (False, [(9, 4), (2,)])]
    """
    modules = list(model.modules())
    matrices = {id(module.weight) for module in modules if isinstance(module, nn.Linear) and module.weight.ndim == 2}
    matrices -= {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    return [
        {**group, "muon": muon, "params": params}
        for group in groups
        for muon in (True, False)
        if (params := [weight for weight in group["params"] if (id(weight) in matrices) is muon])
    ]
