"""Models that survive pickling, as a pool of processes needs."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing


def restore_output_registry(module: nn.Module) -> None:
    """Enter every transformers model inside ``module`` again into the table of outputs it can record.

    transformers fills that table when a model is built. A model that arrives in another process by pickle was never
    built there, and LLaVA models then fail with "NoneType object is not subscriptable".

    Args:
        module: Any module that may contain transformers models.

    Example:
        >>> restore_output_registry(nn.Linear(1, 1))
    """
    for child in module.modules():
        if isinstance(child, PreTrainedModel):
            output_capturing._CAN_RECORD_REGISTRY[child] = child._can_record_outputs


def remove_output_hooks(module: nn.Module) -> None:
    """Take off the hooks with which transformers records outputs; they cannot be pickled, and come back when needed.

    A LLaVA model has them from its first forward pass on.

    Args:
        module: Any module that may contain transformers models.

    Example:
        >>> remove_output_hooks(nn.Linear(1, 1))
    """
    for child in module.modules():
        for key, hook in list(child._forward_hooks.items()):
            if getattr(hook, "__module__", None) == output_capturing.__name__:
                del child._forward_hooks[key]
        if isinstance(child, PreTrainedModel):
            child._output_capturing_hooks_installed = False  # type: ignore[assignment]


class PickleSafe:
    """Mixin for transformers models: usable after pickling, see :func:`restore_output_registry`."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        restore_output_registry(self)  # type: ignore[arg-type]
