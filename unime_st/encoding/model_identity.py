"""Model identity: fingerprints of the weights of a model, and of everything that determines its vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

_CHUNK = 1 << 24
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VOLATILE = frozenset(
    ["_name_or_path", "name_or_path", "transformers_version", "_attn_implementation", "torch_dtype", "architectures"]
)
"""Entries of configurations that differ between copies of one model, or do not change what it computes."""


def weights_fingerprint(model: torch.nn.Module, leave_out: str | None = None) -> str:
    """Compute a fingerprint of all weights, which changes with any row or column of any tensor.

    The bit patterns of every tensor are summed as integers along its rows and its columns. This is exact on every
    device, and limited by memory bandwidth: 16 GB take seconds.

    Args:
        model: A module.
        leave_out: Name of a submodule whose weights are ignored. Defaults to None.

    Returns:
        str: 16 hexadecimal digits.

    Example:
        >>> import torch
        >>> from unime_st.encoding import weights_fingerprint
        >>> len(weights_fingerprint(torch.nn.Linear(2, 2)))
        16
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if leave_out is not None and name.startswith(f"{leave_out}."):
            continue
        if not isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor!r}".encode())
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for sums in _sums(tensor.detach()):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sums(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Sums of the bit patterns along the rows and along the columns of a tensor."""
    if not tensor.numel():
        return []
    plain = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous()
    bits = plain.reshape(len(plain) if plain.ndim > 1 else 1, -1).view(_INTEGERS[plain.element_size()])
    step = max(1, _CHUNK // bits.shape[1])
    rows, columns = [], torch.zeros(bits.shape[1], dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), step):
        block = bits[start : start + step].to(torch.int64)
        rows.append(block.sum(dim=1))
        columns += block.sum(dim=0)
    return [*rows, columns]


def model_fingerprint(model: SentenceTransformer) -> str:
    """Compute a fingerprint of everything that determines the vectors of a model, except prompt and truncation.

    Besides the weights these are active adapters, configuration, pooling, chat template, tokenizer, image rule and
    size, options of the processor, and the maximum sequence length.

    Args:
        model: A Sentence Transformers model.

    Returns:
        str: 16 hexadecimal digits.

    Example:
        >>> from unime_st import UniME
        >>> from unime_st.encoding import model_fingerprint
        >>> model = UniME("unime-tiny", device="cpu")
        >>> before = model_fingerprint(model)
        >>> model.max_seq_length = 16
        >>> model_fingerprint(model) == before
        False
    """
    content = json.dumps(model_settings(model), sort_keys=True, default=repr)
    return hashlib.sha256(f"{weights_fingerprint(model)} {content}".encode()).hexdigest()[:16]


def model_settings(
    model: torch.nn.Module, tokenizer_settings: Callable[[object], object] | None = None
) -> dict[str, object]:
    """Everything besides weights, prompt and truncation that determines what a model computes, by name."""
    described = tokenizer_settings or _tokenizer_settings
    return {
        "modules": [_module_settings(module, described) for module in model.children()],
        "max_seq_length": getattr(model, "max_seq_length", None),
        "adapters": _adapters(model),
    }


def model_state(model: SentenceTransformer) -> str:
    """Cheap token of a model in memory: equal as long as its weights and settings have not been touched.

    It knows addresses, versions and 64 values of every tensor, so it serves within one process only, between two
    calls that would otherwise compute :func:`model_fingerprint` again.

    Args:
        model: A Sentence Transformers model.

    Returns:
        str: The token.

    Example:
        >>> from unime_st import UniME
        >>> from unime_st.encoding.model_identity import model_state
        >>> model = UniME("unime-tiny", device="cpu")
        >>> before = model_state(model)
        >>> _ = model.encode(["a red circle"])
        >>> model_state(model) == before
        True
    """
    tensors = [
        (name, tensor.data_ptr(), tensor._version, tensor.flatten()[:: max(1, tensor.numel() // 64)].tolist())
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    ]
    return json.dumps([tensors, model_settings(model, id)], sort_keys=True, default=repr)


def _module_settings(module: torch.nn.Module, tokenizer_settings: Callable[[object], object]) -> dict[str, object]:
    backbone, processor = getattr(module, "model", None), getattr(module, "processor", None)
    tokenizer = getattr(processor, "tokenizer", getattr(module, "tokenizer", None))
    return {
        "class": type(module).__name__,
        "config": _as_dict(module, "get_config_dict"),
        "backbone": _as_dict(getattr(backbone, "config", None), "to_dict"),
        "processor": _as_dict(processor, "to_dict"),
        "image_processor": _as_dict(getattr(processor, "image_processor", None), "to_dict"),
        "image_side": getattr(processor, "image_side", None),
        "chat_template": [getattr(part, "chat_template", None) for part in (processor, tokenizer)],
        "tokenizer": tokenizer_settings(tokenizer),
    }


def _as_dict(part: object, method: str) -> object:
    return _without_volatile(getattr(part, method)()) if hasattr(part, method) else None


def _without_volatile(content: object) -> object:
    if isinstance(content, dict):
        return {str(key): _without_volatile(value) for key, value in content.items() if key not in _VOLATILE}
    return [_without_volatile(value) for value in content] if isinstance(content, (list, tuple)) else content


def _tokenizer_settings(tokenizer: Any) -> object:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None if tokenizer is None else repr(tokenizer)
    content = json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # of the last call
        content.pop(state, None)
    return [hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(), tokenizer.padding_side]


def _adapters(model: torch.nn.Module) -> list[list[str]]:
    """State of every adapter layer of peft: whether it is on, which adapters are active or merged, and their scale."""
    names = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
    return [
        [name, *(repr(getattr(layer, attribute, None)) for attribute in names)]
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "disable_adapters", None), bool)  # a method of the same name is transformers' own
    ]
