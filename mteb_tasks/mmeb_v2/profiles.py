"""Protocol profiles of MMEB-V2: where an instruction goes, what candidates get, and how many pixels an image has.

Published rows compare models that were each run with their own prompts, so every result names its profile.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from mteb_tasks.mmeb.subsets import IMAGE_TOKEN
from mteb_tasks.pixel_rule import PixelRule

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
        page_query: Instruction of the queries of visual-document tasks.
        candidates: Instruction of all candidates; None gives them the instruction of their task.
        source: Where the protocol is published.
    """

    name: str
    instruction_in: Literal["text", "system"]
    pixels: PixelRule | None
    page_query: str
    candidates: str | None
    source: str


_REFERENCE = "https://github.com/TIGER-AI-Lab/VLM2Vec at 6e1e1d42d4cba85ae4db4d3f7a25cba2465d1e16"

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            "vlm2vec", "text", PixelRule(4 * 28 * 28, 1280 * 28 * 28, small_side=28), PAGE_QUERY, None, _REFERENCE
        ),
        Profile(
            "qwen3-vl",
            "system",
            PixelRule(4 * 32 * 32, 1800 * 32 * 32),
            PAGE_QUERY.replace(":", "."),
            "Represent the user's input.",
            "https://github.com/QwenLM/Qwen3-VL-Embedding at 8ce3aab",
        ),
        Profile("model", "text", None, PAGE_QUERY, None, _REFERENCE),
    )
}
"""The reference protocol, that of Qwen3-VL-Embedding, and the reference's texts with a model's own image size."""


def current_profile() -> Profile:
    """Return the profile named by ``$MMEB_V2_PROFILE``, ``vlm2vec`` where it is not set.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> current_profile().name
        'vlm2vec'
    """
    name = os.environ.get(PROFILE_VARIABLE) or "vlm2vec"
    if name not in PROFILES:
        raise ValueError(f"{PROFILE_VARIABLE}={name}: expected one of {', '.join(PROFILES)}")
    return PROFILES[name]


def joined(instruction: str, text: str = "", *, image: bool = False) -> str:
    """Join image token, instruction and text as the official code does.

    Args:
        instruction: Instruction of the task.
        text: What follows it, kept verbatim; an empty one adds nothing.
        image: Whether the input has an image.

    Example:
        >>> joined("Understand this page.", image=True)
        '<|image_1|> Understand this page.'
    """
    return " ".join([*([IMAGE_TOKEN] if image else []), instruction, *([text] if text else [])])
