"""Vector format: dimension and precision that embeddings are evaluated in, an experiment of mteb."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
import torch

from unime_st.losses.quantization import Precision, fake_quantize
from unime_st.options import check_count


@dataclass(frozen=True)
class VectorFormat:
    """Truncation and rounding of embeddings, after which they have length 1 again.

    Args:
        truncate_dim: Leading dimensions to keep; None keeps all.
        precision: ``"int8"``, 256 levels between the smallest and the largest value of each dimension among the vectors
            that are embedded together; ``"binary"``, the signs; None, float32.

    Raises:
        ValueError: If a value is wrong.

    Example:
        >>> VectorFormat(2, "binary")(np.array([[0.6, -0.6, 0.5]], dtype=np.float32)).round(2).tolist()
        [[0.7099999785423279, -0.7099999785423279]]
    """

    truncate_dim: int | None = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if self.truncate_dim is not None:
            check_count("truncate_dim", self.truncate_dim)
        if self.precision not in (None, *get_args(Precision)):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")

    @property
    def experiment(self) -> dict[str, object]:
        """mteb's ``experiment_kwargs``, under which results are filed apart; empty for whole float32 vectors."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Format vectors ``(n, dim)``.

        Raises:
            ValueError: If the vectors have fewer dimensions.
        """
        if not self.experiment:
            return vectors
        if (self.truncate_dim or 1) > vectors.shape[1]:
            raise ValueError(f"truncate_dim={self.truncate_dim}: the embeddings have {vectors.shape[1]} dimensions")
        tensor = torch.as_tensor(vectors[:, : self.truncate_dim])
        tensor = tensor if self.precision is None else fake_quantize([tensor], self.precision)[0]
        return cast(np.ndarray, torch.nn.functional.normalize(tensor, dim=1).numpy())
