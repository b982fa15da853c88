"""Forward counter: forward passes, tokens and image patches of a model, counted where it computes."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass
class ForwardCount:
    """Work of a model: passes and tokens (padding included) of the language model, patches of the vision tower.

    Example:
        >>> from unime_st.scoring.forward_counter import ForwardCount
        >>> str(ForwardCount(forwards=2, tokens=100, patches=36).per_query(2))
        '1 forwards, 50 tokens, 18 image patches'
    """

    forwards: float = 0
    tokens: float = 0
    patches: float = 0

    def per_query(self, queries: int) -> ForwardCount:
        """Return the count divided by a number of queries."""
        queries = max(1, queries)
        return ForwardCount(self.forwards / queries, self.tokens / queries, self.patches / queries)

    def __str__(self) -> str:
        return f"{self.forwards:g} forwards, {self.tokens:.0f} tokens, {self.patches:.0f} image patches"


class ForwardCounter(ForwardCount):
    """Context manager that counts the work of a model in a block.

    Args:
        model: A vision-language model of transformers, or a module that contains one.

    Example:
        >>> from unime_st import UniMEReranker
        >>> from unime_st.scoring.forward_counter import ForwardCounter
        >>> reranker = UniMEReranker("unime-tiny", template="tiny")
        >>> ranker = reranker.ranker()  # made here, because it runs the model once
        >>> with ForwardCounter(reranker) as count:
        ...     ranking = reranker.rank("a red square", ["a red square", "a blue circle"], method="listwise")
        >>> count.forwards
        1
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> ForwardCounter:
        for name, part in self._model.named_modules():
            if name.endswith("language_model"):
                self._handles.append(part.register_forward_pre_hook(self._language, with_kwargs=True))
            elif name.endswith((".visual", ".vision_tower", ".vision_model")):
                self._handles.append(part.register_forward_pre_hook(self._vision, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _language(self, module: nn.Module, arguments: tuple[object, ...], options: dict[str, object]) -> None:
        embedded = options.get("inputs_embeds")
        given = embedded if embedded is not None else options.get("input_ids", arguments[0] if arguments else None)
        if isinstance(given, Tensor):
            self.forwards += 1
            self.tokens += given.shape[0] * given.shape[1]

    def _vision(self, module: nn.Module, arguments: tuple[object, ...], options: dict[str, object]) -> None:
        given = arguments[0] if arguments else next((v for v in options.values() if isinstance(v, Tensor)), None)
        if isinstance(given, Tensor):
            self.patches += given.shape[0]
