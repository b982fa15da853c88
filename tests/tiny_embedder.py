"""A tiny random Qwen2-VL embedder for tests that need real forwards but no trained weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny_checkpoints import IMAGE, qwen

_TEMPLATE = (
    "{%- for m in messages -%}{%- if m.content is string -%}{{ m.content }}{%- else -%}{%- for c in m.content -%}"
    "{%- if c.type == 'image' -%}" + IMAGE + "{%- elif c.type == 'text' -%}{{ c.text }}{%- endif -%}{%- endfor -%}"
    "{%- endif -%}{%- endfor -%}<|im_end|>"
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
    with TemporaryDirectory() as bare:
        qwen(Path(bare), template=_TEMPLATE, sides=sides, vision_depth=vision_depth)
        transformer = Transformer(bare, unpad_inputs=False)
        transformer.tokenizer.padding_side = transformer.tokenizer.init_kwargs["padding_side"] = "left"
        pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
        SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save_pretrained(str(folder))
    return str(folder)


@cache
def tiny_embedder() -> SentenceTransformer:
    """Random weights, the same in every process; takes texts, images of any size and both."""
    with TemporaryDirectory() as folder:
        return SentenceTransformer(write_tiny_embedder(folder), device="cpu")
