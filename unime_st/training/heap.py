"""Keeps the memory of freed buffers from piling up over the mini-batches of a large batch."""

from __future__ import annotations

from unime_st.memory import malloc_trim, resident

_SLACK = 16 << 20


class HeapTrimmer:
    """Watches the resident memory of a step, and gives freed memory back where more and more of it is kept.

    Images of all sizes, their pixels and activations come and go, small things that stay (embeddings, kernels, random
    states) lie between them, and glibc's heap grows although the sum of what is in use does not: by hundreds of MiB in
    a batch of a few hundred images. Handing pages back costs their first touch, so it is done only between the passes
    and where more is kept than one mini-batch leaves behind on a heap that was just tidied.

    Args:
        slack: Bytes that may be kept beyond those of one mini-batch. Defaults to 16 MiB.

    Example:
        >>> from unime_st.training.heap import HeapTrimmer
        >>> heap = HeapTrimmer()
        >>> heap.begin()
        >>> heap.trim("forward")
        False
    """

    def __init__(self, slack: int = _SLACK) -> None:
        self._slack = slack
        self._begun = self._usual = 0
        self._clean = False
        self._last: str | None = None

    def begin(self) -> None:
        """Start a step with what is in use."""
        self._clean = malloc_trim()
        self._begun, self._usual, self._last = resident(), 0, None

    def trim(self, kind: str, kept: int = 0) -> bool:
        """Call before a mini-batch, when nothing of the one before is in use.

        Args:
            kind: Pass of the mini-batch that is to come.
            kept: Bytes that are kept on purpose since the step began.

        Returns:
            Whether memory was given back.
        """
        last, self._last = self._last, kind
        if last is None:
            return False
        above = resident() - self._begun - kept
        if self._clean:
            self._usual = max(self._usual, above)
        self._clean = (kind != last or above > self._usual + self._slack) and malloc_trim()
        return self._clean
