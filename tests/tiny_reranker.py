"""Tiny random generative vision-language checkpoints, and prompts written out by hand to check ours against."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sentence_transformers import CrossEncoder
from tiny_checkpoints import ANSWERS, IMAGE, qwen

PAIR = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nI will provide you with a query and "
    "a candidate. Please evaluate whether the candidate meets the requirements of the query. If it does, respond with "
    "'Yes'; if it doesn't, respond with 'No'.Query:{}Candidate:{}<|im_end|>\n<|im_start|>assistant\n"
)
LIST = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nI will provide you with a query "
    "followed by multiple candidates in the format: (1) cand1 (2) cand2, etc. Each candidate is independent of the "
    "others. Evaluate each candidate against the query, and respond with the number corresponding to the candidate "
    "that best meets the requirements of the query.Query:{}Candidates:{}<|im_end|>\n<|im_start|>assistant\nAns: ("
)


def checkpoint(folder: Path, family: str = "qwen2_vl", *, seed: int = 0, words: Sequence[str] = ANSWERS) -> str:
    """Write a bare generative checkpoint in the layout of transformers, without chat template."""
    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[family]
    return str(qwen(folder, kind, words=words, template=None, sides=(56, 1003), seed=seed))


@lru_cache(maxsize=64)
def make_image(seed: int, size: tuple[int, int] = (60, 90)) -> Image.Image:
    """Noise, different for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(seed: int, size: tuple[int, int] = (60, 90)) -> bytes:
    """The same as an encoded image."""
    buffer = io.BytesIO()
    make_image(seed, size).save(buffer, "PNG")
    return buffer.getvalue()


def written(text: str | None, image: Image.Image | None) -> str:
    """One side of a prompt, by hand."""
    return (IMAGE if image is not None else "") + (text or "")


@torch.inference_mode()
def answer_logits(model: CrossEncoder, prompt: str, images: Sequence[Image.Image]) -> torch.Tensor:
    """Logits behind a prompt written by hand, through the processor and the model of transformers alone."""
    side = 28 * 28
    inputs = model[0].processor(
        text=[prompt],
        images=list(images) or None,
        images_kwargs={"size": {"shortest_edge": 4 * side, "longest_edge": 300 * side}},
        return_tensors="pt",
    )
    return model[0].model(**inputs).logits[0, -1]
