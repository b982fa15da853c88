"""Starts a training script whose processes accelerate takes for devices, so that FSDP2 shards over gloo on a CPU.

``AcceleratorState`` looks at ``ACCELERATE_USE_FSDP`` only where processes have an accelerator each; those on a CPU
(``MULTI_CPU``) become DDP without a word. Everything after that question is what runs on GPUs.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

_begin = AcceleratorState.__init__


def _begin_with_devices(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    if PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _begin(self, *args, **kwargs)


if __name__ == "__main__":
    AcceleratorState.__init__ = _begin_with_devices  # type: ignore[method-assign]
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
