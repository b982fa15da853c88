"""Pre-training of `unime-tiny`, the model that the package contains."""

from __future__ import annotations
