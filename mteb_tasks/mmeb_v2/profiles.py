"""Protocol profiles of MMEB-V2: where an instruction goes, what candidates get, and how many pixels an image has.

Published rows compare models that were each run with their own prompts, so every result names its profile.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Literal

from mteb_tasks.columns import Setting
from mteb_tasks.mmeb.subsets import IMAGE_TOKEN, VIDEO_TOKEN
from mteb_tasks.pixel_rule import PixelRule
from unime_st.files import digest

PROFILE_VARIABLE = "MMEB_V2_PROFILE"
PAGE_QUERY = "Find a document image that matches the given query:"
PAGE = "Understand the content of the provided document image."


@dataclass(frozen=True)
class Profile:
    """One protocol.

    Args:
        name: Name in results and in ``$MMEB_V2_PROFILE``.
        instruction_in: Whether the instruction is joined with the text, or is the system turn of the chat.
        pixels: Pixel rule; None leaves images to the recipe of the model.
        style: Style of chat template that texts of visual-document tasks are put in, for models that have it.
        page_query: Instruction of the queries of visual-document tasks.
        candidates: Instruction of all candidates; None gives them the instruction of their task.
        source: Where the protocol is published.
        frames: Frames that are sampled of a video, at most.
        video_name: Name in results of video tasks, which says how many frames there are.
        video_pixels: Pixel rule of video tasks; None for that of images.
    """

    name: str
    instruction_in: Literal["text", "system"]
    pixels: PixelRule | None
    style: str | None
    page_query: str
    candidates: str | None
    source: str
    frames: int = 8
    video_name: str = ""
    video_pixels: PixelRule | None = None

    def video_encoding(self, instruction: str) -> tuple[Setting, Setting]:
        """Settings of the queries and of the candidates of a video task, see `encoding`."""
        return replace(self, pixels=self.video_pixels or self.pixels).encoding(instruction, self.style)

    def encoding(self, instruction: str, style: str | None) -> tuple[Setting, Setting]:
        """Settings of the queries and of the candidates of a task.

        Args:
            instruction: Instruction of the queries.
            style: Style of chat template, for models that have it.
        """
        pixels = None if self.pixels is None else str(self.pixels)
        if self.instruction_in == "text":
            return Setting(style, None, pixels), Setting(style, None, pixels)
        return Setting(None, instruction, pixels), Setting(None, self.candidates, pixels)

    def facts(self, *instructions: str) -> dict[str, str]:
        """What a result says about the protocol it was made with.

        Args:
            *instructions: Instructions of the task.
        """
        pixels = "model" if self.pixels is None else f"{self.pixels.min_pixels}-{self.pixels.max_pixels}"
        return {"profile": self.name, "pixels": pixels, "instructions": digest("\n".join(instructions), length=12)}


_REFERENCE = "https://github.com/TIGER-AI-Lab/VLM2Vec at 6e1e1d42d4cba85ae4db4d3f7a25cba2465d1e16"

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="vlm2vec",
            instruction_in="text",
            pixels=PixelRule(4 * 28 * 28, 1280 * 28 * 28, small_side=28),
            style="mmeb",
            page_query=PAGE_QUERY,
            candidates=None,
            source=_REFERENCE,
            video_name="vlm2vec-8",
            video_pixels=PixelRule(
                4 * 28 * 28,
                1280 * 28 * 28,
                small_side=28,
                frame_min_pixels=4 * 28 * 28,
                frame_max_pixels=1280 * 28 * 28,
            ),
        ),
        Profile(
            name="qwen3-vl",
            instruction_in="system",
            pixels=PixelRule(4 * 32 * 32, 1800 * 32 * 32),
            style=None,
            page_query=PAGE_QUERY.replace(":", "."),
            candidates="Represent the user's input.",
            source="https://github.com/QwenLM/Qwen3-VL-Embedding at 8ce3aab",
            frames=64,
            video_name="qwen-64",
            video_pixels=PixelRule(
                4 * 32 * 32,
                1800 * 32 * 32,
                frame_min_pixels=128 * 32 * 32,
                frame_max_pixels=768 * 32 * 32,
                video_pixels=7_864_320,
            ),
        ),
        Profile(
            name="model",
            instruction_in="text",
            pixels=None,
            style=None,
            page_query=PAGE_QUERY,
            candidates=None,
            source=_REFERENCE,
            video_name="model",
        ),
    )
}
"""The reference protocol, that of Qwen3-VL-Embedding, and the reference's texts with a model's own image size."""


_VIDEO_NAMES = {profile.video_name: profile.name for profile in PROFILES.values()}


def profile_name(name: str) -> str:
    """Name of the profile that a result names, which of video tasks says how many frames there are.

    Example:
        >>> profile_name("vlm2vec-8"), profile_name("vlm2vec")
        ('vlm2vec', 'vlm2vec')
    """
    return _VIDEO_NAMES.get(name, name)


def spoken(instruction: str) -> str:
    """Instruction as a system turn: ended by a full stop instead of a colon.

    Example:
        >>> spoken("Find the clip:")
        'Find the clip.'
    """
    bare = instruction.strip()
    return f"{bare[:-1]}." if bare.endswith(":") else bare


def current_profile() -> Profile:
    """Return the profile named by ``$MMEB_V2_PROFILE``, ``vlm2vec`` where it is not set.

    ``vlm2vec-8`` and ``qwen-64``, as results of video tasks are named, are other names of ``vlm2vec`` and ``qwen3-vl``.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> current_profile().name
        'vlm2vec'
    """
    name = profile_name(os.environ.get(PROFILE_VARIABLE) or "vlm2vec")
    if name not in PROFILES:
        raise ValueError(f"{PROFILE_VARIABLE}={name}: expected one of {', '.join(PROFILES)}")
    return PROFILES[name]


def joined(instruction: str, text: str = "", *, image: bool = False, video: bool = False) -> str:
    """Join image or video token, instruction and text as the official code does.

    Args:
        instruction: Instruction of the task.
        text: What follows it, kept verbatim; an empty one adds nothing.
        image: Whether the input has an image.
        video: Whether the input has a video.

    Example:
        >>> joined("Understand this page.", image=True)
        '<|image_1|> Understand this page.'
    """
    media = [*([IMAGE_TOKEN] if image else []), *([VIDEO_TOKEN] if video else [])]
    return " ".join([*media, instruction, *([text] if text else [])])


def profiled(metadata: Any, profile: Profile) -> Any:
    """Metadata of a task under a profile: results of two profiles are never taken for each other.

    Args:
        metadata: Metadata of the class.
        profile: The profile; names the only subset of the task.
    """
    languages = sorted(metadata.bcp47_codes) if isinstance(metadata.eval_langs, dict) else metadata.eval_langs
    return metadata.model_copy(update={"eval_langs": {profile.name: languages}})
