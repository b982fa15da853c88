"""Image sizes that a benchmark prescribes: native shape within pixel limits, instead of the size of a model's recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PixelRule:
    """How large an image may be after the image processor; it keeps its shape.

    EXIF orientation is not applied and transparency is dropped, as in the evaluation code of MMEB-V2.

    Args:
        min_pixels: Fewest pixels.
        max_pixels: Most pixels.
        small_side: An image with a side below this becomes a square of twice this side first; 0 leaves it as it is.
    """

    min_pixels: int
    max_pixels: int
    small_side: int = 0

    def __str__(self) -> str:
        """Return the rule as it stands in a column of a table, see `parse`."""
        return f"{self.min_pixels}-{self.max_pixels}-{self.small_side}"

    @classmethod
    def parse(cls, text: str) -> PixelRule:
        """Read a rule back.

        Args:
            text: For instance ``"3136-1003520-28"``.

        Example:
            >>> PixelRule.parse(str(PixelRule(3136, 1003520, 28)))
            PixelRule(min_pixels=3136, max_pixels=1003520, small_side=28)
        """
        return cls(*map(int, text.split("-")))
