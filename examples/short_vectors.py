"""Short and quantized vectors: `truncate_dim`, int8, and binary vectors with rescoring by faiss.

Prints bytes per vector and recall@10 against the full float32 vectors.
"""

from __future__ import annotations

import argparse

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings, semantic_search_faiss

from unime_st.data.scenes import retrieval_data


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of the exact results among those that were found."""
    return float(np.mean([len(set(own) & set(best)) / len(best) for own, best in zip(found, exact)]))


def nearest(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Indices of the ten most similar documents of each query."""
    return np.argsort(-queries.astype(np.float32) @ documents.astype(np.float32).T, axis=1)[:, :10]


def main(model_name: str, size: int) -> None:
    """Compare the ten nearest images of every image."""
    model = SentenceTransformer(model_name)
    images = [{"image": item.to_input()["image"]} for item in retrieval_data("short_t2i", size=size).corpus.values()]
    full = model.encode(images, normalize_embeddings=True)
    exact = nearest(full, full)

    def show(name: str, size_in_bytes: int, found: np.ndarray) -> None:
        print(f"{name:<26}{size_in_bytes:>6} bytes   recall@10 {recall(found, exact):.2f}")

    show(f"float32, {full.shape[1]} dimensions", full[0].nbytes, exact)
    for dim in (full.shape[1] // 2, full.shape[1] // 4):  # train with `matryoshka_dims` to keep them good
        short = model.encode(images, truncate_dim=dim, normalize_embeddings=True)
        show(f"float32, {dim} dimensions", short[0].nbytes, nearest(short, short))
    ranges = np.stack([full.min(0), full.max(0)])
    int8 = quantize_embeddings(full, precision="int8", ranges=ranges)
    restored = (int8 + 128.0) * (ranges[1] - ranges[0]) / 255 + ranges[0]
    show("int8", int8[0].nbytes, nearest(full, restored))
    binary = quantize_embeddings(full, precision="ubinary")
    for name, multiplier in (("binary", None), ("binary, rescored 4x", 4)):
        hits, _ = semantic_search_faiss(
            full, corpus_embeddings=binary, corpus_precision="ubinary", top_k=10,
            rescore=multiplier is not None, rescore_multiplier=multiplier or 1,
        )  # fmt: skip
        show(name, binary[0].nbytes, np.array([[hit["corpus_id"] for hit in row] for row in hits]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="unime-tiny")
    parser.add_argument("--size", type=int, default=300, help="number of images (default: 300)")
    options = parser.parse_args()
    main(options.model, options.size)
