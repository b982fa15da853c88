"""Turns a pre-trained checkpoint into the folder that is shipped: embedder, judge and reranker start in one file."""

from __future__ import annotations

import shutil
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoModelForImageTextToText


def package(checkpoint: str | Path, output: str | Path) -> Path:
    """Write a native Sentence Transformers folder whose weights are still the whole language model.

    Args:
        checkpoint: Folder written by :func:`unime_st.tiny.pretrain.pretrain`.
        output: Folder to write; an existing one is replaced.

    Returns:
        The folder. ``SentenceTransformer(folder)`` embeds with it, ``AutoModelForImageTextToText`` generates.
    """
    output = Path(output)
    shutil.rmtree(output, ignore_errors=True)
    # Cutting a long row with a picture would cut the end of the prompt, where the embedding is read.
    whole = {"text": {"truncation": False}}
    transformer = Transformer(str(checkpoint), unpad_inputs=False, processing_kwargs=whole)
    pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
    SentenceTransformer(modules=[transformer, pooling, Normalize()]).save_pretrained(str(output))
    # The embedder's weights lack the head; the whole model serves as embedder, judge and reranker alike.
    AutoModelForImageTextToText.from_pretrained(checkpoint).save_pretrained(output)
    shutil.copy(Path(checkpoint) / "log.jsonl", output / "pretraining.jsonl")
    return output
