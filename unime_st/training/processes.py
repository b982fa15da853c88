"""Processes of a run: one, or those that torchrun or accelerate started."""

from __future__ import annotations

import torch
from accelerate.state import PartialState


def computes_on_cpu() -> bool:
    """Whether there is no accelerator."""
    return not torch.accelerator.is_available()


def partial_state() -> PartialState:
    """State of all processes; the first call connects them.

    On a machine without accelerator ``cpu`` has to be set: accelerate would not connect the processes otherwise.
    """
    return PartialState(cpu=computes_on_cpu())
