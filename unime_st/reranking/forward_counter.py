"""What answers cost: forward passes and tokens, counted where the model computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Cost:
    """Work of a model.

    Args:
        forwards: Forward passes of the language model.
        tokens: Tokens that passed through it, padding included.
        patches: Image patches that passed the vision tower.

    Example:
        >>> from unime_st.reranking.forward_counter import Cost
        >>> str(Cost(forwards=2, tokens=100, patches=36).per_query(2))
        '1 forwards, 50 tokens, 18 image patches'
    """

    forwards: float = 0
    tokens: float = 0
    patches: float = 0

    def per_query(self, queries: int) -> Cost:
        """Divide by a number of queries."""
        queries = max(1, queries)
        return Cost(self.forwards / queries, self.tokens / queries, self.patches / queries)

    def __str__(self) -> str:
        return f"{self.forwards:g} forwards, {self.tokens:.0f} tokens, {self.patches:.0f} image patches"


@contextmanager
def measured(model: nn.Module) -> Iterator[Cost]:
    """Count what a model does in a block.

    Args:
        model: A vision-language model of transformers, or anything that contains one.

    Yields:
        Cost: Complete when the block ends.

    Example:
        >>> from unime_st import UniMEReranker
        >>> from unime_st.reranking.forward_counter import measured
        >>> reranker = UniMEReranker("unime-tiny", template="tiny")
        >>> with measured(reranker) as cost:
        ...     ranking = reranker.rank("a red square", ["a red square", "a blue circle"], method="listwise")
        >>> cost.forwards
        1
    """
    cost = Cost()

    def language(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        embedded = options.get("inputs_embeds")
        given = embedded if embedded is not None else options.get("input_ids", arguments[0] if arguments else None)
        if isinstance(given, Tensor):
            cost.forwards += 1
            cost.tokens += given.shape[0] * given.shape[1]

    def vision(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = arguments[0] if arguments else next((v for v in options.values() if isinstance(v, Tensor)), None)
        if isinstance(given, Tensor):
            cost.patches += given.shape[0]

    handles = []
    for name, part in model.named_modules():
        if name.endswith("language_model"):
            handles.append(part.register_forward_pre_hook(language, with_kwargs=True))
        elif name.endswith((".visual", ".vision_tower", ".vision_model")):
            handles.append(part.register_forward_pre_hook(vision, with_kwargs=True))
    try:
        yield cost
    finally:
        for handle in handles:
            handle.remove()
