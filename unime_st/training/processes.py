"""The processes of a run: one, or those that torchrun or accelerate started."""

from __future__ import annotations

import torch
from accelerate import PartialState


def computes_on_cpu() -> bool:
    """Whether there is no accelerator."""
    return not torch.accelerator.is_available()


def processes() -> PartialState:
    """Return the state of all processes; the first call connects them.

    Without ``cpu`` accelerate takes processes on a machine without accelerator for strangers to each other.

    Example:
        >>> from unime_st.training.processes import processes
        >>> processes().num_processes
        1
    """
    return PartialState(cpu=computes_on_cpu())
