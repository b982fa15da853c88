"""Tokenizer, processor and randomly initialized Qwen2-VL of `unime-tiny`."""

from __future__ import annotations

import random
import string
import unicodedata
from collections.abc import Iterator
from importlib import resources
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from unime_st.data.scenes.contrast import contrastive_record, sample_scene_for
from unime_st.data.scenes.scene_pairs import TRAINING_MIX
from unime_st.scoring.prompts import LIST_PROMPT, PAIR_PROMPT

VOCABULARY = 2048
SIDE = 84  # pixels; patch 14 and merge 2 make 9 visual tokens of a square image
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Pre-tokenization of Qwen2: contractions, words, single digits, punctuation, white space.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _symbol_names() -> Iterator[str]:
    """Names of Unicode's symbols: everyday English nouns that the scenes lack."""
    for code in range(0x2000, 0x1FB00):
        if unicodedata.category(chr(code)) == "So":
            yield unicodedata.name(chr(code), "").lower()


def _corpus(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(6000):
        (kind,) = rng.choices(list(TRAINING_MIX), list(TRAINING_MIX.values()))
        record = contrastive_record(kind, sample_scene_for(kind, rng, "train"), rng)
        for item in (record.query, record.positive):
            yield item.text or ""
    for name in _symbol_names():
        yield name
        yield f" {name}"
    words = ["Yes", "No", "Ans: (", "Query:", "Candidate:", "Candidates:", PAIR_PROMPT, LIST_PROMPT]
    yield from words * 400
    yield from (f"({digit}) " for digit in string.digits * 100)


def build_tokenizer(seed: int = 0) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer on descriptions of scenes and the names of Unicode's symbols.

    ``Yes``, ``No`` and the digits are single tokens, as in Qwen2-VL.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    fast = Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=1024,
        padding_side="left",
    )
    for word in ("Yes", "No", *string.digits):
        if len(fast.encode(word, add_special_tokens=False)) != 1:
            raise ValueError(f"{word!r} is not a single token of the trained vocabulary; add it to the corpus.")
    return fast


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Processor of Qwen2-VL that resizes every image to about 84 x 84 pixels, keeping its aspect ratio."""
    template = (resources.files("unime_st.recipes") / "templates" / "tiny_embedding.jinja").read_text()
    sizes: dict[str, Any] = {"min_pixels": SIDE * SIDE, "max_pixels": SIDE * SIDE}
    grid: dict[str, Any] = {"patch_size": 14, "temporal_patch_size": 1, "merge_size": 2}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes, **grid),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes, **grid),
        chat_template=template,
    )


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    """Randomly initialized Qwen2-VL of about 1.4 million parameters."""

    def id_of(token: str) -> int:
        return tokenizer.get_vocab()[token]

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "bos_token_id": id_of("<|endoftext|>"),
        "eos_token_id": id_of("<|im_end|>"),
        "pad_token_id": id_of("<|endoftext|>"),
    }
    vision = {
        "depth": 3,
        "embed_dim": 96,
        "hidden_size": 128,
        "num_heads": 3,
        "mlp_ratio": 2,
        "patch_size": 14,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "initializer_range": 0.05,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
    )
    return Qwen2VLForConditionalGeneration(config)
