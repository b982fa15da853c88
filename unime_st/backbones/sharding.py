"""FSDP2 units: which modules of a model are sharded one by one."""

from __future__ import annotations

import re
from typing import Any

_VISION = re.compile("visual|vision|image")


class ShardedByLayer:
    """Mixin that names the modules accelerate shards one by one; Sentence Transformers' models name none.

    Without names the whole model is one unit, which every device holds in full during a pass.

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

        Those of the vision tower stay with the rest, which is gathered in every forward pass. Devices without an image
        in their mini-batch do not run the tower, so the others would wait for its layers.
        """
        backbone = self.transformers_model
        named = set(getattr(backbone, "_no_split_modules", None) or ())
        if not named:
            return []
        modules = [(type(module).__name__, _VISION.search(name)) for name, module in backbone.named_modules()]
        language = {kind for kind, vision in modules if not vision}
        return sorted(named & (language - {kind for kind, vision in modules if vision}))
