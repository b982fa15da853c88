"""Model identity: fingerprint of the weights of a model."""

from __future__ import annotations

import hashlib

import torch


def weights_fingerprint(model: torch.nn.Module, leave_out: str | None = None) -> str:
    """Compute a fingerprint from a few numbers of every tensor.

    Args:
        model: Any module.
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
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // 16)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
