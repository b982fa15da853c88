"""Image sizes that a benchmark prescribes: native shape within pixel limits, instead of the size of a model's recipe."""

from __future__ import annotations

from dataclasses import dataclass

from unime_st.backbones.video_frames import FrameLimits


@dataclass(frozen=True)
class PixelRule:
    """How large an image may be after the image processor; it keeps its shape.

    EXIF orientation is not applied and transparency is dropped, as in the evaluation code of MMEB-V2.

    Args:
        min_pixels: Fewest pixels.
        max_pixels: Most pixels.
        small_side: An image with a side below this becomes a square of twice this side first; 0 leaves it as it is.
        frame_min_pixels: Fewest pixels of a frame of a video; 0 for those of an image.
        frame_max_pixels: Most pixels of a frame of a video; 0 for those of an image.
        video_pixels: Most pixels of a video, see `unime_st.backbones.video_frames.FrameLimits`; 0 for no limit.
    """

    min_pixels: int
    max_pixels: int
    small_side: int = 0
    frame_min_pixels: int = 0
    frame_max_pixels: int = 0
    video_pixels: int = 0

    @property
    def frames(self) -> FrameLimits:
        """Limits of the frames of videos."""
        least, most = self.frame_min_pixels or self.min_pixels, self.frame_max_pixels or self.max_pixels
        return FrameLimits(least, most, self.video_pixels)

    def __str__(self) -> str:
        """Return the rule as it stands in a column of a table, see `parse`."""
        sizes = f"{self.min_pixels}-{self.max_pixels}-{self.small_side}"
        frames = (self.frame_min_pixels, self.frame_max_pixels, self.video_pixels)
        return "-".join([sizes, *map(str, frames)]) if any(frames) else sizes

    @classmethod
    def parse(cls, text: str) -> PixelRule:
        """Read a rule back.

        Args:
            text: For instance ``"3136-1003520-28"``.

        Example:
            >>> rule = PixelRule(3136, 1003520, 28)
            >>> str(rule), PixelRule.parse(str(rule)) == rule
            ('3136-1003520-28', True)
        """
        return cls(*map(int, text.split("-")))
