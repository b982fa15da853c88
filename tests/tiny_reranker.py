"""Tiny random generative vision-language checkpoints, and prompts written out by hand to check ours against."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import CrossEncoder
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = "a red blue green big small square circle triangle on the left of right image Query Candidate Ans".split()
ANSWERS = ("Yes", "No")

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
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def tokenizer(words: Sequence[str] = ANSWERS) -> Qwen2TokenizerFast:
    """Byte-level BPE that keeps digits apart, as Qwen's; only the given words and a few more are whole tokens."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}|\p{L}+|[^\p{L}\p{N}]"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    backend.train_from_iterator([" ".join([*WORDS, *words])] * 3, trainer)
    fast = Qwen2TokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        model_max_length=1024,
        padding_side="left",
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return fast


def checkpoint(folder: Path, family: str = "qwen2_vl", *, seed: int = 0, words: Sequence[str] = ANSWERS) -> str:
    """Write a bare generative checkpoint in the layout of transformers, without chat template."""
    tokens = tokenizer(words)
    ids = {name: int(tokens.convert_tokens_to_ids(name)) for name in SPECIAL}
    text = {"vocab_size": len(tokens), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    # The default range of 0.02 would leave all answers nearly alike at this width.
    text |= {"initializer_range": 0.2, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    shared: dict[str, Any] = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }
    vision: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    vision |= {"initializer_range": 0.2}
    config: Any
    if family == "qwen2_vl":
        config = Qwen2VLConfig(text_config=text, vision_config=vision | {"embed_dim": 32, "mlp_ratio": 2}, **shared)
        model_class, processor_class = Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    else:
        vision |= {"out_hidden_size": 32, "intermediate_size": 64, "fullatt_block_indexes": [1], "window_size": 56}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **shared)
        model_class, processor_class = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model_class(config).save_pretrained(folder)
    processor_class(Qwen2VLImageProcessor(), tokens, Qwen2VLVideoProcessor()).save_pretrained(folder)
    return str(folder)


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
