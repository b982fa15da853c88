"""The authors' recipes done by hand on transformers' own classes, a reference that needs no golden data."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel, AutoProcessor


def _square(image: Image.Image, side: int | None, *, exif: bool) -> Image.Image:
    image = image if side is None else image.resize((side, side))
    image = ImageOps.exif_transpose(image) if exif else image
    image = image.convert("RGB")
    image.info = {}
    return image


def _qwen2_vl(text: str | None, image: Image.Image | None) -> str:
    return ("<|image_pad|>" if image else "") + (text or "")


def _llava_onevision(text: str | None, image: Image.Image | None) -> str:
    start = "<|im_start|>user " + ("<image>" if image else "")
    return f"{start}\n{(text or '').strip()}<|im_end|><|im_start|>assistant\n"


def _llava_next(text: str | None, image: Image.Image | None) -> str:
    if image is not None:
        return "[INST] <image>\nSummary above image in one word: [/INST]"
    return f"[INST] {text}\nSummary above sentence in one word: [/INST]"


RECIPES: dict[str, dict[str, Any]] = {
    "unime-v2-2b": {"prompt": _qwen2_vl, "exif": False},
    "unime-v2": {"prompt": _llava_onevision, "exif": True},
    "unime-v1-llava1.6": {"prompt": _llava_next, "exif": False},
}


@cache
def _load(checkpoint: Path) -> tuple[Any, Any]:
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.image_processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    return processor, AutoModel.from_pretrained(checkpoint).eval()


@torch.no_grad()
def embed(checkpoint: Path, name: str, text: str | None, image: Image.Image | None, side: int | None) -> np.ndarray:
    """Unit vector of one row; ``checkpoint`` is the bare, unconverted folder."""
    recipe = RECIPES[name]
    processor, model = _load(checkpoint)
    pil_image = _square(image, side, exif=recipe["exif"]) if image is not None else None
    inputs = processor(
        text=[recipe["prompt"](text, image)], images=[pil_image] if pil_image else None, return_tensors="pt"
    )
    if name == "unime-v2-2b":
        inputs.pop("mm_token_type_ids")
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    vector = model(**inputs).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(vector, dim=0).numpy()
