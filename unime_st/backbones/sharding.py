"""How the weights of a model are cut up where they are sharded over devices (FSDP2)."""

from __future__ import annotations

import re
from typing import Any

_SOMETIMES = re.compile("visual|vision|image")


class ShardedByLayer:
    """Tells accelerate which modules to shard one by one, where Sentence Transformers' models name none.

    With none the whole model is one unit, which every device holds in full from the first layer to the last.

    Example:
        >>> from unime_st import UniME
        >>> UniME("unime-tiny")._no_split_modules
        ['Qwen2VLDecoderLayer']
    """

    transformers_model: Any

    # Where accelerate looks for a last norm to shard: in the backbone, not among the modules around it, whose
    # `Normalize` has no weights and cannot be sharded.
    base_model_prefix = "transformers_model"

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers of the language model that the backbone names.

        Those of the vision tower stay with the rest, which is gathered in every forward pass: devices without an image
        in their mini-batch do not run the tower, and would leave the others waiting for its layers.
        """
        backbone = self.transformers_model
        named = set(getattr(backbone, "_no_split_modules", None) or ())
        if not named:
            return []
        modules = [(type(module).__name__, _SOMETIMES.search(name)) for name, module in backbone.named_modules()]
        always = {kind for kind, sometimes in modules if not sometimes}
        return sorted(named & (always - {kind for kind, sometimes in modules if sometimes}))
