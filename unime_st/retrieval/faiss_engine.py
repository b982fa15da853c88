"""Kinds of faiss indices: creation, search, recall on a sample, and reading as a memory map."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import faiss
import numpy as np

from unime_st.retrieval.top_k import top_k

logger = logging.getLogger(__name__)

Kind = Literal["flat", "hnsw", "ivf", "sq8", "binary"]
"""Kind of an index. "flat" is exact; "hnsw" (graph) and "ivf" (clusters) are approximate and faster; "sq8" stores 8 bits
per dimension, "binary" 1 bit (RaBitQ)."""

_SAMPLE = 256  # vectors on which the recall of an approximate index is measured
_MATRIX_QUERIES = 4  # from so many queries on a matrix product is faster than inner products one by one
GPU_LIMIT = 2048
"""Largest k that faiss supports on a GPU."""


def check_kind(kind: str) -> None:
    """Raise ValueError if there is no such kind of index."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")


def make_engine(kind: Kind, vectors: np.ndarray) -> faiss.Index:
    """Create a faiss index for inner products, train it on float32 vectors of shape (n, dim), and add them.

    Example:
        >>> import numpy as np
        >>> from unime_st.retrieval.faiss_engine import make_engine
        >>> make_engine("hnsw", np.eye(8, dtype=np.float32)).ntotal
        8
    """
    module: Any = faiss  # its stubs are incomplete
    count, dim = vectors.shape
    metric = faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        engine = module.IndexHNSWFlat(dim, 32, metric)
        engine.hnsw.efConstruction, engine.hnsw.efSearch = 80, 96
    elif kind == "ivf":
        lists = max(1, min(int(np.sqrt(count)), count // 39))  # 39 training vectors per list, as faiss asks for
        engine = module.IndexIVFFlat(module.IndexFlatIP(dim), dim, lists, metric)
        engine.cp.min_points_per_centroid = 1  # few vectors have one list, of which faiss would warn
        engine.nprobe = max(min(lists, 8), lists // 16)
    elif kind == "sq8":
        engine = module.IndexScalarQuantizer(dim, module.ScalarQuantizer.QT_8bit, metric)
    elif kind == "binary":
        engine = module.IndexRaBitQ(dim, metric)
    else:
        engine = module.IndexFlatIP(dim)
    if not engine.is_trained:
        engine.train(vectors)
    engine.add(vectors)  # at once: in blocks, the storage of faiss would be copied whenever it grows
    return engine


def sample_recall(engine: faiss.Index, vectors: np.ndarray, k: int = 10) -> float:
    """Recall of an index on a sample of its own vectors, each searched among all others.

    Example:
        >>> import numpy as np
        >>> from unime_st.retrieval.faiss_engine import make_engine, sample_recall
        >>> vectors = np.random.default_rng(0).standard_normal((50, 16), dtype=np.float32)
        >>> sample_recall(make_engine("flat", vectors), vectors)
        1.0
    """
    k = min(k, len(vectors) - 1)
    if k < 1:
        return 1.0
    rows = np.random.default_rng(0).permutation(len(vectors))[:_SAMPLE]
    exact = top_k(vectors[rows], vectors, k, exclude=[[row] for row in rows.tolist()])[1].tolist()
    found = engine.search(vectors[rows], k + 1)[1].tolist()
    others = ([other for other in own if other != row][:k] for row, own in zip(rows.tolist(), found, strict=True))
    return float(np.mean([len(set(own) & set(true)) / k for own, true in zip(others, exact, strict=True)]))


def map_engine(path: Path) -> faiss.Index:
    """Map a faiss index into memory, read-only."""
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be read as a faiss index ({str(error)[:200]}); build it again") from error


def search_engine(engine: Any, vectors: np.ndarray, k: int, removed: Collection[int]) -> tuple[np.ndarray, np.ndarray]:
    """Similarities and positions of shape (n, k), without removed positions; -1 where fewer are found.

    The index must be on the CPU if positions are removed.
    """
    if not removed:
        with _matrix_products(engine.d):
            return engine.search(vectors, k)
    module: Any = faiss  # its stubs lack the parameters
    kept = module.IDSelectorNot(module.IDSelectorBatch(np.fromiter(removed, dtype=np.int64)))
    if hasattr(engine, "nprobe"):
        chosen = module.SearchParametersIVF(sel=kept, nprobe=engine.nprobe)
    elif hasattr(engine, "hnsw"):
        chosen = module.SearchParametersHNSW(sel=kept, efSearch=engine.hnsw.efSearch)
    else:
        chosen = module.SearchParameters(sel=kept)
    return engine.search(vectors, k, params=chosen)


@contextmanager
def _matrix_products(dim: int) -> Iterator[None]:
    """Let faiss compute matrix products for few queries, too.

    Since 1.15 its threshold is 128,000 components of queries (older: 20 queries): 249 queries of 512 dimensions would
    take ten times as long as 250.
    """
    settings = faiss.cvar
    threshold = settings.distance_compute_blas_threshold
    settings.distance_compute_blas_threshold = min(threshold, _MATRIX_QUERIES * dim)
    try:
        yield
    finally:
        settings.distance_compute_blas_threshold = threshold


def on_gpu(engine: faiss.Index, kind: Kind) -> faiss.Index:
    """Copy of an index on all GPUs; the index itself if faiss has no GPU, or no GPU version of the kind."""
    if kind not in ("flat", "ivf") or not hasattr(faiss, "StandardGpuResources"):
        return engine
    return faiss.index_cpu_to_all_gpus(engine) if faiss.get_num_gpus() else engine
