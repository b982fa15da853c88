"""Search index benchmark: build time, queries per second, recall@10 and bytes per vector of every kind of index.

python benchmarks/index.py [--vectors 100000 --dim 512 --queries 1000 --kinds flat ivf] [--threads 1]
python benchmarks/index.py --beside_faiss [--items 5000]    # `Index` beside the same faiss calls by hand, wall time

Times are CPU seconds of the process, which other processes on the machine hardly change. Vectors are unit vectors around
random centers, as embeddings of similar items lie together; queries are displaced vectors.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import faiss
import harness
import numpy as np
import torch
from workloads import sentences

from unime_st import UniME
from unime_st.retrieval import Index, top_k
from unime_st.retrieval.faiss_engine import Kind, make_engine, map_engine, search_engine

BRUTE_FORCE, K = "brute force (top_k)", 10
_BLOCK = 8192
_SAME = 0.99  # share of equal results
_SINGLE = 20  # queries that are also searched one by one


def clustered(count: int, dim: int, seed: int = 0, per_center: int = 100) -> np.ndarray:
    """Random float32 unit vectors around ``count / per_center`` centers.

    Args:
        count: Number of vectors.
        dim: Dimension.
        seed: Random seed. Defaults to 0.
        per_center: Mean number of vectors around a center. Defaults to 100.
    """
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((max(1, count // per_center), dim), dtype=np.float32)
    found = np.empty((count, dim), dtype=np.float32)
    for start in range(0, count, _BLOCK):
        rows = min(_BLOCK, count - start)
        block = centers[rng.integers(len(centers), size=rows)] + rng.standard_normal((rows, dim), dtype=np.float32)
        found[start : start + rows] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return found


def displaced(vectors: np.ndarray, count: int, seed: int = 1) -> np.ndarray:
    """Queries: vectors of the index plus noise of half their length.

    Args:
        vectors: The indexed vectors.
        count: Number of queries.
        seed: Random seed. Defaults to 1.
    """
    rng = np.random.default_rng(seed)
    chosen = vectors[rng.permutation(len(vectors))[:count]]
    noise = rng.standard_normal(chosen.shape, dtype=np.float32)
    noisy = chosen + 0.5 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return noisy / np.linalg.norm(noisy, axis=1, keepdims=True)


def measure(kind: Kind, vectors: np.ndarray, queries: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Build, save, map and search one kind of index.

    Args:
        kind: Kind of the index.
        vectors: Vectors to index.
        queries: Query vectors.
        exact: Positions of the true neighbors.
    """
    start = time.process_time()
    engine = make_engine(kind, vectors)
    build = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.faiss")
        faiss.write_index(engine, str(path))
        size = path.stat().st_size
        del engine
        mapped = map_engine(path)
        search_engine(mapped, queries[:8], K, ())
        start = time.process_time()
        found = search_engine(mapped, queries, K, ())[1]
        seconds = time.process_time() - start
        start = time.process_time()
        for row in range(_SINGLE):
            search_engine(mapped, queries[row : row + 1], K, ())
        single = time.process_time() - start
    recall = np.mean([len(set(own) & set(true)) / K for own, true in zip(found.tolist(), exact.tolist(), strict=True)])
    return _facts(build, len(queries) / seconds, _SINGLE / single, float(recall), size / len(vectors))


def beside_faiss(chosen: Any) -> None:
    """Time `Index.build` and `search` beside encoding and faiss by hand, and the engine alone on given vectors."""
    model = UniME("unime-tiny", device="cpu")
    texts, queries = sentences(chosen.items, least=3, most=20), sentences(chosen.queries, least=3, most=12)
    made: dict[str, Any] = {}

    def build_by_hand() -> None:
        made["faiss"] = faiss.IndexFlatIP(int(model.get_embedding_dimension() or 0))
        made["faiss"].add(model.encode(texts))

    def build() -> None:
        made["index"] = Index.build(texts, model)

    def search_by_hand() -> None:
        made["by hand"] = made["faiss"].search(model.encode(queries), K)[1].tolist()

    def search() -> None:
        made["hits"] = made["index"].search(queries, k=K)

    shape = {"items": chosen.items, "queries": chosen.queries, "k": K}
    runs: dict[str, Callable[[], object]] = {"encode, faiss": build_by_hand, "Index.build": build}
    tables = [harness.compare("index_beside_faiss_build", runs, repeats=chosen.repeats, facts=shape)]
    runs = {"encode, faiss": search_by_hand, "Index.search": search}
    tables.append(harness.compare("index_beside_faiss_search", runs, repeats=chosen.repeats, facts=shape))
    found = [[int(hit.id) for hit in hits] for hits in made["hits"]]
    if np.mean(np.array(found) == np.array(made["by hand"])) < _SAME:
        raise RuntimeError("Index and faiss find other items")

    vectors = clustered(chosen.vectors, chosen.dim)
    asked = displaced(vectors, chosen.queries)

    def add_by_hand() -> None:
        made["plain"] = faiss.IndexFlatIP(chosen.dim)
        made["plain"].add(vectors)

    def add() -> None:
        made["engine"] = make_engine("flat", vectors)

    shape = {"vectors": chosen.vectors, "dim": chosen.dim, "queries": chosen.queries, "k": K}
    runs = {"faiss": add_by_hand, "make_engine": add}
    tables.append(harness.compare("index_beside_faiss_engine_build", runs, repeats=chosen.repeats, facts=shape))
    runs = {
        "faiss": lambda: made["plain"].search(asked, K),
        "search_engine": lambda: search_engine(made["engine"], asked, K, ()),
    }
    tables.append(harness.compare("index_beside_faiss_engine_search", runs, repeats=chosen.repeats, facts=shape))
    for result in tables:
        sys.stdout.write(f"{result['name']}\n{harness.table(result)}\n")


def _facts(build: float, rate: float, single: float, recall: float, size: float) -> dict[str, float]:
    values = {
        "build_cpu_s": build,
        "queries_per_cpu_s": rate,
        "queries_per_cpu_s_one_by_one": single,
        "recall@10": recall,
        "bytes_per_vector": size,
    }
    return {name: round(value, 3) for name, value in values.items()}


def main() -> None:
    """Run the benchmark and write ``results/index_<vectors>.json`` and ``.md``."""
    parser = harness.options(__doc__, repeats=1)
    parser.add_argument("--vectors", type=int, default=100_000, help="number of indexed vectors")
    parser.add_argument("--dim", type=int, default=512, help="dimension of the vectors")
    parser.add_argument("--queries", type=int, default=1000, help="number of queries")
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=get_args(Kind), help="kinds to measure")
    parser.add_argument("--threads", type=int, default=1, help="threads of faiss and of top_k")
    parser.add_argument("--beside_faiss", action="store_true", help="compare `Index` with faiss by hand instead")
    parser.add_argument("--items", type=int, default=5000, help="number of texts of --beside_faiss")
    chosen = parser.parse_args()
    faiss.omp_set_num_threads(chosen.threads)
    torch.set_num_threads(chosen.threads)
    if chosen.beside_faiss:
        beside_faiss(chosen)
        return
    vectors = clustered(chosen.vectors, chosen.dim)
    queries = displaced(vectors, chosen.queries)
    start = time.process_time()
    exact = top_k(queries, vectors, K)[1]
    seconds = time.process_time() - start
    start = time.process_time()
    for row in range(_SINGLE):
        top_k(queries[row : row + 1], vectors, K)
    single = time.process_time() - start
    rows = {BRUTE_FORCE: _facts(0, len(queries) / seconds, _SINGLE / single, 1, 4 * chosen.dim)}
    for kind in chosen.kinds:
        rows[kind] = measure(kind, vectors, queries, exact)
        sys.stderr.write(f"{kind}: {rows[kind]}\n")
    shape = {name: getattr(chosen, name) for name in ("vectors", "dim", "queries", "threads")}
    names = list(rows[BRUTE_FORCE])
    lines = [
        f"{chosen.vectors:,} vectors of {chosen.dim} dimensions, {chosen.queries:,} queries in one call (and {_SINGLE} one by one), "
        f"{chosen.threads} thread(s); faiss {faiss.__version__}.",
        "",
        f"| index | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        *(f"| {kind} | {' | '.join(f'{own[name]:,.6g}' for name in names)} |" for kind, own in rows.items()),
    ]
    result = {"name": f"index_{chosen.vectors}", "machine": harness.machine(), "faiss": faiss.__version__, **shape}
    harness.save({**result, "kinds": rows}, "\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
