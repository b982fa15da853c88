"""Template frame: the fixed text that a chat template puts around its inputs, found by rendering sample texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SAMPLES = ("0", "a red circle", " \n 1  2\n\t3 'x' {y} \\n é☃ \n", "word " * 20 + "end")
"""Texts on which a frame has to agree with the template engine."""

_MARKS = ('<first&">{{0}}', "<second&'>{%1%}")


@dataclass(frozen=True)
class TemplateFrame:
    """The fixed pieces of a prompt, between which texts are joined without the template engine.

    Args:
        pieces: Fixed pieces in the order of the prompt, one more than texts.
        order: Which text follows each piece.
        clean: What the template does to a text: nothing, ``str.strip`` or ``str.rstrip``.

    Example:
        >>> frame = TemplateFrame.find(lambda texts: f"Query: {texts[0].strip()}\\n")
        >>> frame.join([" a red circle "])
        'Query: a red circle\\n'
    """

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    clean: Callable[[str], str]

    @classmethod
    def find(cls, render: Callable[[Sequence[str]], str], slots: int = 1) -> TemplateFrame | None:
        """Frame of a template that renders 1 or 2 texts (``slots``); None if it does more than a frame can express."""
        prompt = render(_MARKS[:slots])
        order = tuple(sorted(range(slots), key=lambda slot: prompt.find(_MARKS[slot])))
        pieces: list[str] = []
        for slot in order:
            piece, found, prompt = prompt.partition(_MARKS[slot])
            if not found:
                return None
            pieces.append(piece)
        expected = [render([sample] * slots) for sample in SAMPLES]
        for clean in (str, str.strip, str.rstrip):  # rstrip: a template that strips prompt and text together
            frame = cls((*pieces, prompt), order, clean)
            if [frame.join([sample] * slots) for sample in SAMPLES] == expected:
                return frame
        return None

    def join(self, texts: Sequence[str]) -> str:
        """Join the pieces and one text per slot to the prompt that the template engine would render."""
        joined = [part for piece, slot in zip(self.pieces, self.order) for part in (piece, self.clean(texts[slot]))]
        return "".join([*joined, self.pieces[-1]])
