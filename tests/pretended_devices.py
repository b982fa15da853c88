"""Pretended CUDA devices: CPU tensors that say ``cuda:0``, and raise where devices mix as on a real card.

The device stands beside each tensor as an attribute of its storage, which all views share. Every tensor is a plain CPU
tensor, so autograd, autocast and all operators work as on a CPU, and results are equal to those of the CPU:

1. A dispatch mode sees every operator, those of backward passes included. It raises if devices mix, and marks the
   outputs.
2. ``Tensor.device``, ``to``, ``cpu``, ``numpy`` and what else tells or changes a device read and write the mark.
3. ``torch.cuda`` says that there are devices, and its memory, streams and random states do nothing.

Not shown: CUDA kernels, their numbers and dtypes, asynchrony and streams, memory, speed, flash attention and NCCL.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
import torch._dynamo  # builds a table of torch functions when it is imported, which must be before they are replaced
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from unime_st.backbones import varlen_attention

Device = str | int | torch.device

CPU = torch.device("cpu")
REAL_CARD = torch.cuda.is_available()
_CPU_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""Operators that take indices on the CPU for a tensor on a device."""

_COPIES = {"copy_", "copy"}
_STRICT = {"cat", "stack"}
"""Operators that take no scalar tensor of another device."""

_REAL_DEVICE = torch.Tensor.device
_real_to, _real_pin_memory = torch.Tensor.to, torch.Tensor.pin_memory


class MixedDevicesError(RuntimeError):
    """Tensors of several devices in one operator."""


def _with_index(device: Device) -> torch.device:
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", 0) if found.type == "cuda" and found.index is None else found


def device_of(tensor: Tensor) -> torch.device:
    """Pretended device of a tensor."""
    while torch._C._functorch.is_functorch_wrapped_tensor(
        tensor
    ):  # within `vmap`, with which transformers makes masks
        tensor = torch._C._functorch.get_unwrapped(tensor)
    real: torch.device = _REAL_DEVICE.__get__(tensor)
    if real.type != "cpu" or tensor.layout != torch.strided:
        return real
    return getattr(tensor.untyped_storage(), "pretended_device", None) or real


def _is_unplaced(tensor: Tensor) -> bool:
    """Whether C++ code made a tensor, which knows the real device only: it takes that of its partners."""
    return _REAL_DEVICE.__get__(tensor) == CPU and getattr(tensor.untyped_storage(), "pretended_device", CPU) is None


def _made_in_cpp() -> bool:
    """Whether a formula of autograd or a part of a composite runs the operator, and not a Python function."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(
        ("torch/_compile.py", "_dynamo/eval_frame.py")
    ):
        frame = frame.f_back
    return frame.f_code.co_name in ("_engine_run_backward", "run_composite")


def _composite(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator whose C++ code makes tensors of its own."""

    def run_composite(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    return run_composite


def _mark(tensor: Tensor, device: torch.device | None) -> Tensor:
    if _REAL_DEVICE.__get__(tensor).type == "cpu":
        vars(tensor.untyped_storage())["pretended_device"] = device
    return tensor


class _Move(torch.autograd.Function):
    """Copy to another device; the gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.device = device_of(tensor)
        return _moved(tensor, device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _moved(gradient, ctx.device), None


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "meta":
        return _real_to(tensor, "meta")
    return _mark(torch.ops.aten.clone(tensor.detach()), device)


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``: the dtype as usual, the device by a marked copy."""
    copy = kwargs.pop("copy", False)
    if "other" in kwargs or (args and isinstance(args[0], Tensor)):
        other = kwargs.pop("other", None) if "other" in kwargs else args[0]
        device, dtype, layout = device_of(other), other.dtype, kwargs.get("memory_format")
    else:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    found = _real_to(tensor, dtype=dtype, copy=copy) if dtype is not None or copy else tensor
    if layout is not None:
        found = found.contiguous(memory_format=layout)
    if device is None or _with_index(device) == device_of(found):
        return found
    if torch.is_grad_enabled() and found.requires_grad:
        return _Move.apply(found, _with_index(device))
    return _moved(found, _with_index(device))


def _check(name: str, args: Sequence[Any], tensors: list[Tensor]) -> torch.device | None:
    """Device of the outputs of an operator, None if all inputs are on the CPU."""
    devices = [(tensor, device_of(tensor)) for tensor in tensors]
    pretended = {device for _, device in devices if device.type == "cuda"}
    if not pretended or name in _COPIES:
        return None
    strangers = [t for t, device in devices if device == CPU and (t.dim() or name in _STRICT)]
    if name in _CPU_INDICES and (device_of(args[0]).type == "cuda" or _is_unplaced(args[0])):
        indices = {id(index) for index in args[1] if index is not None}
        strangers = [tensor for tensor in strangers if id(tensor) not in indices]
    if len(pretended) > 1 or strangers:
        found = ", ".join(f"{device} {tuple(tensor.shape)}" for tensor, device in devices)
        raise MixedDevicesError(f"{name}: expected all tensors to be on the same device, found {found}")
    return pretended.pop()


class _Bookkeeping(TorchDispatchMode):
    """Checks the devices of the inputs of every operator and marks its outputs."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        tensors = list({id(leaf): leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)}.values())
        placed = [tensor for tensor in tensors if not _is_unplaced(tensor)]
        device = _check(func.overloadpacket.__name__, args, placed)
        unplaced = not placed and bool(tensors)
        if (asked := options.get("device")) is not None:
            options["device"] = CPU if asked.type == "cuda" else asked
            if asked.type == "cpu" and _made_in_cpp():
                unplaced = not placed
            else:
                device = _with_index(asked)
        options |= {"pin_memory": False} if "pin_memory" in options else {}
        result = func(*args, **options)
        if unplaced or (device is not None and device.type == "cuda"):
            known = {_storage(tensor) for tensor in placed}
            for made in tree_leaves(result):
                if isinstance(made, Tensor) and _storage(made) not in known:
                    _mark(made, device)
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _no_numpy(tensor: Tensor, *args: object, **kwargs: object) -> NoReturn:
    raise TypeError(f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() first.")


def _on_cpu_only(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensor, *args, **kwargs: (method if device_of(tensor) == CPU else _no_numpy)(tensor, *args, **kwargs)


def _placed(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A factory whose C++ code would reach for the real device."""

    def placed(*args: Any, device: Device | None = None, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        if device is None:
            return made
        needs_grad, moved = made.requires_grad, _to(made.detach(), device)
        return moved.requires_grad_(needs_grad)

    return placed


class _Generator(torch.Generator):
    def __new__(cls, device: Device = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


class _Autocast(torch.autocast):
    """Autocast of the pretended device, which is that of the CPU; autocast of the CPU does nothing to its tensors."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        if device_type == "cpu":
            kwargs["enabled"], args = False, args[:1]
        super().__init__("cpu", *args, **kwargs)


class _Event:
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def record(self, *args: object) -> None: ...
    def wait(self, *args: object) -> None: ...
    def synchronize(self) -> None: ...


class _Stream(_Event):
    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, *args: object) -> None: ...
    def wait_event(self, *args: object) -> None: ...


def _nothing(*args: object, **kwargs: object) -> None: ...


def _random_state(*args: object) -> Tensor:
    return torch.zeros(16, dtype=torch.uint8)


def _cuda(count: int) -> dict[str, Any]:
    """What ``torch.cuda`` answers with ``count`` devices of 80 GiB."""
    memory = dict.fromkeys(
        ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), 2**30
    )
    properties = SimpleNamespace(name="pretended", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)
    silent = (
        "_lazy_init _set_rng_state_offset empty_cache ipc_collect manual_seed manual_seed_all reset_peak_memory_stats "
        "seed seed_all set_device set_rng_state set_rng_state_all synchronize"
    )
    return {
        **dict.fromkeys(silent.split(), _nothing),
        **{name: lambda *args, size=size: size for name, size in memory.items()},
        "_exchange_device": lambda *args: 0,
        "_maybe_exchange_device": lambda *args: 0,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "get_device_name": lambda *args: "pretended",
        "get_device_properties": lambda *args: properties,
        "get_device_capability": lambda *args: (9, 0),
        "mem_get_info": lambda *args: (60 << 30, 80 << 30),
        "get_rng_state": _random_state,
        "get_rng_state_all": lambda: [_random_state()] * count,
        "current_stream": lambda *args: _Stream(),
        "stream": lambda *args: nullcontext(),
        "Event": _Event,
        "Stream": _Stream,
    }


def equal_dropout(probability: float) -> float:
    """Dropout whose masks are equal on both devices: none with a real card, which has random numbers of its own."""
    return 0.0 if REAL_CARD else probability


def on_both(run: Callable[[str], Any], tolerance: float = 1e-5, *, count: int = 1) -> None:
    """Assert that ``run`` gives equal values for "cpu" and for "cuda": real devices if there are so many, else pretended."""
    expected = run("cpu")
    real = torch.cuda.is_available() and torch.cuda.device_count() >= count
    with nullcontext() if real else pretended_devices(count):
        found = run("cuda")
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@contextmanager
def pretended_devices(count: int = 1) -> Iterator[None]:
    """Pretend that this process has CUDA devices, also in threads that start inside.

    Example:
        >>> with pretended_devices():
        ...     weight = torch.ones(2, device="cuda")
        ...     weight.device, (weight * 2).cpu().device
        (device(type='cuda', index=0), device(type='cpu'))
    """
    real_run, real_load = threading.Thread.run, torch.load

    def run(thread: threading.Thread) -> None:
        with _Bookkeeping():
            real_run(thread)

    def load(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
        found = real_load(file, map_location="cpu", **kwargs)
        if map_location is None:
            return found
        return tree_map_only(Tensor, lambda tensor: tensor.to(map_location), found)

    tensors: dict[str, Any] = {
        "device": property(device_of),
        "is_cuda": property(lambda tensor: device_of(tensor).type == "cuda"),
        "is_cpu": property(lambda tensor: device_of(tensor).type == "cpu"),
        "get_device": lambda tensor: -1 if device_of(tensor) == CPU else device_of(tensor).index,
        "to": _to,
        "cpu": lambda tensor, *args, **kwargs: _to(tensor, "cpu"),
        "cuda": lambda tensor, device=None, *args, **kwargs: _to(tensor, "cuda" if device is None else device),
        "numpy": _on_cpu_only(torch.Tensor.numpy),
        "__array__": _on_cpu_only(torch.Tensor.__array__),
        "pin_memory": lambda tensor, *args: _on_cpu_only(lambda found: found)(tensor),
        "is_pinned": lambda tensor, *args: False,
        "new_tensor": lambda tensor, data, **kwargs: torch.tensor(
            data, **{"dtype": tensor.dtype, "device": device_of(tensor), **kwargs}
        ),
    }
    enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype
    functions: dict[str, Any] = {
        **{name: _placed(getattr(torch, name)) for name in ("tensor", "as_tensor", "asarray")},
        "load": load,
        "Generator": _Generator,
        "autocast": _Autocast,
        "is_autocast_enabled": lambda kind="cuda": enabled("cpu" if kind == "cuda" else kind),
        "get_autocast_dtype": lambda kind: dtype_of("cpu" if kind == "cuda" else kind),
    }
    with pytest.MonkeyPatch.context() as patch:
        accelerator: dict[str, Any] = {
            **dict.fromkeys("empty_cache set_device_index synchronize".split(), _nothing),
            "is_available": lambda: True,
            "current_accelerator": lambda *args, **kwargs: torch.device("cuda"),
            "current_device_index": lambda: 0,
            "current_stream": lambda *args: _Stream(),
            "device_count": lambda: count,
        }
        cuda = _cuda(count)
        owners = [(torch.Tensor, tensors), (torch, functions), (torch.cuda, cuda), (torch.accelerator, accelerator)]
        owners.append(
            (torch.cuda.random, {name: cuda[name] for name in cuda if "rng_state" in name or "seed" in name})
        )
        for owner, names in owners:
            for name, value in names.items():
                patch.setattr(owner, name, value, raising=False)
        attention = torch.nn.functional.scaled_dot_product_attention
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _composite(attention))
        patch.setattr(varlen_attention, "_runs_flash", lambda states: False)  # a kernel of real cards
        patch.setattr(torch.utils.checkpoint.DefaultDeviceType, "_default_device_type", "cuda")
        patch.setattr(torch.amp, "autocast", _Autocast)
        patch.setattr(torch.amp.autocast_mode, "autocast", _Autocast)
        patch.setattr(threading.Thread, "run", run)
        with _Bookkeeping():
            yield
