"""A tiny random Qwen2-VL embedder for tests that need real forwards but no trained weights."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

_SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TEMPLATE = (
    "{%- for m in messages -%}{%- if m.content is string -%}{{ m.content }}{%- else -%}{%- for c in m.content -%}"
    "{%- if c.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif c.type == 'text' -%}{{ c.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}<|im_end|>"
)


def _processor(sides: tuple[int, int]) -> Qwen2VLProcessor:
    letters = {letter: row for row, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    tokenizer.padding_side = "left"
    pixels = {"min_pixels": sides[0] ** 2, "max_pixels": sides[1] ** 2}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(**pixels), tokenizer, Qwen2VLVideoProcessor(**pixels), chat_template=_TEMPLATE
    )


def write_tiny_embedder(folder: str | Path, *, sides: tuple[int, int] = (56, 112), vision_depth: int = 2) -> str:
    """Write a native folder with random weights, the same ones at every call.

    Args:
        folder: Where to write.
        sides: Sides in pixels of the smallest and the largest square that images are fitted to.
        vision_depth: Layers of the vision tower.

    Returns:
        The folder.
    """
    processor = _processor(sides)
    ids = {name: int(processor.tokenizer.convert_tokens_to_ids(name)) for name in _SPECIAL}
    text = {"vocab_size": len(processor.tokenizer), "hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    text |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    text |= {"pad_token_id": ids["<|endoftext|>"]}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": vision_depth, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with TemporaryDirectory() as bare:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            Qwen2VLModel(config).save_pretrained(bare)
        processor.save_pretrained(bare)
        transformer = Transformer(bare, unpad_inputs=False)
        pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
        SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save_pretrained(str(folder))
    return str(folder)


@lru_cache(maxsize=1)
def tiny_embedder() -> SentenceTransformer:
    """Random weights, the same in every process; takes texts, images of any size and both."""
    with TemporaryDirectory() as folder:
        return SentenceTransformer(write_tiny_embedder(folder), device="cpu")
