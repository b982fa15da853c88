"""Exact search benchmark: `top_k` beside faiss.IndexFlatIP and plain matrix products, on the same vectors.

python benchmarks/retrieval.py [--device cuda] [--queries 4096 --corpus 100000 --dim 896 --k 50]
python benchmarks/retrieval.py --products_only --queries 10000 --corpus 1000000 --dim 512   # 4 GB of memory
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

import faiss
import harness
import numpy as np
import torch

from unime_st.memory import peak_resident
from unime_st.retrieval import top_k

FAISS, PRODUCTS, OURS = "faiss.IndexFlatIP", "matrix products alone", "top_k"
BELOW, DEEP = "top_k with max_similarity (about rank 10)", "top_k with max_similarity (half are above)"
QUERY_CHUNK, CORPUS_CHUNK = 1024, 8192  # the defaults of top_k
BLOCK = 2 * QUERY_CHUNK  # queries of which one run of the large corpus consists


def vectors(count: int, dim: int, seed: int) -> np.ndarray:
    """Random float32 unit vectors.

    Args:
        count: Number of vectors.
        dim: Dimension.
        seed: Random seed.
    """
    rng = np.random.default_rng(seed)
    found = np.empty((count, dim), dtype=np.float32)
    for start in range(0, count, CORPUS_CHUNK):
        block = rng.standard_normal((min(CORPUS_CHUNK, count - start), dim), dtype=np.float32)
        found[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return found


def products(queries: np.ndarray, corpus: np.ndarray, device: str) -> None:
    """Compute all similarities block by block and discard them: with NumPy on a CPU, else with torch on the device."""
    left, right = (values if device == "cpu" else torch.from_numpy(values).to(device) for values in (queries, corpus))
    for start in range(0, len(queries), QUERY_CHUNK):
        for begin in range(0, len(corpus), CORPUS_CHUNK):
            left[start : start + QUERY_CHUNK] @ right[begin : begin + CORPUS_CHUNK].T


def speed(chosen: Any) -> None:
    """Compare times and check that the neighbors agree."""
    queries, corpus = vectors(chosen.queries, chosen.dim, 0), vectors(chosen.corpus, chosen.dim, 1)
    found: dict[str, np.ndarray] = {}

    def with_faiss() -> None:
        index = faiss.IndexFlatIP(chosen.dim)
        index.add(corpus)
        found[FAISS] = index.search(queries, chosen.k)[1]

    def ours() -> None:
        found[OURS] = top_k(queries, corpus, chosen.k, device=chosen.device)[1]

    # The highest similarity within a tenth of the corpus: about ten vectors of the whole corpus exceed it.
    tenth = top_k(queries, corpus[: len(corpus) // 10], 1, device=chosen.device)[0][:, 0]

    def below(ceiling: np.ndarray) -> None:
        top_k(queries, corpus, chosen.k, max_similarity=ceiling, device=chosen.device)

    variants = {
        FAISS: with_faiss,
        PRODUCTS: lambda: products(queries, corpus, chosen.device),
        OURS: ours,
        BELOW: lambda: below(tenth),
        DEEP: lambda: below(np.zeros_like(tenth)),
    }
    shape = {"queries": chosen.queries, "corpus": chosen.corpus, "dim": chosen.dim, "k": chosen.k}
    result = harness.compare("retrieval", variants, repeats=chosen.repeats, facts=shape)
    result["same_neighbors"] = float((found[FAISS] == found[OURS]).mean())
    ratios = {name: round(result["median"][name] / result["median"][PRODUCTS], 3) for name in (OURS, BELOW, DEEP)}
    result["times_the_products"] = ratios
    summary = (
        f"\n{shape}: times the products: {', '.join(f'{name} {ratio:.2f}' for name, ratio in ratios.items())}; "
        f"{result['same_neighbors']:.4%} of the neighbors agree with faiss\n"
    )
    harness.save(result, harness.table(result) + summary)
    sys.stdout.write(harness.table(result) + summary)


def large(chosen: Any) -> None:
    """Compare `top_k` with the plain products on a corpus that no other variant needs twice; peak memory is reported.

    Runs alternate by blocks of queries, so that both sides meet the same state of the machine.
    """
    queries, corpus = vectors(chosen.queries, chosen.dim, 0), vectors(chosen.corpus, chosen.dim, 1)
    products(queries[:8], corpus[:CORPUS_CHUNK], chosen.device)
    top_k(queries[:8], corpus[:CORPUS_CHUNK], chosen.k, device=chosen.device)
    before = peak_resident() / 2**20
    seconds: dict[str, list[float]] = {PRODUCTS: [], OURS: []}
    cpu = dict.fromkeys(seconds, 0.0)
    sides = {
        PRODUCTS: lambda part: products(part, corpus, chosen.device),
        OURS: lambda part: top_k(part, corpus, chosen.k, device=chosen.device),
    }
    for _ in range(chosen.repeats):
        spent = dict.fromkeys(seconds, 0.0)
        for number, start in enumerate(range(0, len(queries), BLOCK)):
            for label in list(sides)[:: 1 if number % 2 else -1]:
                began, used = time.perf_counter(), time.process_time()
                sides[label](queries[start : start + BLOCK])
                spent[label] += time.perf_counter() - began
                cpu[label] += time.process_time() - used
        for label, total in spent.items():
            seconds[label].append(round(total, 3))
    medians = {label: statistics.median(runs) for label, runs in seconds.items()}
    result = {
        "name": f"retrieval_{chosen.corpus}",
        "machine": harness.machine(),
        "seconds": seconds,
        "median": medians,
        "times_faster": {label: round(medians[PRODUCTS] / median, 3) for label, median in medians.items()},
        "times_the_products": round(medians[OURS] / medians[PRODUCTS], 3),
        "cpu_times_the_products": round(cpu[OURS] / cpu[PRODUCTS], 3),
        "mb_above_the_vectors": round(peak_resident() / 2**20 - before),
        **{name: getattr(chosen, name) for name in ("queries", "corpus", "dim", "k")},
    }
    text = (
        f"{harness.table(result)}\n{chosen.queries:,} queries, {chosen.corpus:,} x {chosen.dim}, k {chosen.k}: "
        f"{result['times_the_products']} of the products ({result['cpu_times_the_products']} of their CPU time), "
        f"{result['mb_above_the_vectors']} MB above the vectors\n"
    )
    harness.save(result, text)
    harness.bars(result)
    sys.stdout.write(text)


def memory(chosen: Any) -> None:
    """Measure peak memory above the vectors for several numbers of queries, each in its own process."""
    lines = ["| queries | MB above the vectors |", "|---|---|"]
    above = {}
    for count in (chosen.queries // 4, chosen.queries // 2, chosen.queries):
        command = [sys.executable, __file__, "--measure_memory", "--queries", str(count), "--device", chosen.device]
        command += ["--corpus", str(chosen.corpus), "--dim", str(chosen.dim), "--k", str(chosen.k)]
        above[str(count)] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        lines.append(f"| {count} | {above[str(count)]:.0f} |")
    harness.save({"name": "retrieval_memory", "machine": harness.machine(), "mb": above}, "\n".join(lines) + "\n")
    sys.stdout.write("\n".join(["", *lines, ""]))


def measure_memory(chosen: Any) -> None:
    """Print by how much a search raises the peak memory of this process."""
    queries, corpus = vectors(chosen.queries, chosen.dim, 0), vectors(chosen.corpus, chosen.dim, 1)
    top_k(queries[:8], corpus[:256], chosen.k, device=chosen.device)  # warm-up for one-time allocations
    before = peak_resident() / 2**20
    top_k(queries, corpus, chosen.k, device=chosen.device)
    sys.stdout.write(f"{peak_resident() / 2**20 - before:.1f}\n")


def main() -> None:
    """Run the benchmarks and print the results."""
    parser = harness.options(__doc__, repeats=3)
    parser.add_argument("--queries", type=int, default=4096, help="number of query vectors")
    parser.add_argument("--corpus", type=int, default=100_000, help="number of corpus vectors")
    parser.add_argument("--dim", type=int, default=896, help="dimension of the vectors")
    parser.add_argument("--k", type=int, default=50, help="number of neighbors per query")
    parser.add_argument("--products_only", action="store_true", help="compare with the plain products only")
    parser.add_argument("--measure_memory", action="store_true", help="internal: measure memory in this process")
    chosen = parser.parse_args()
    if chosen.measure_memory:
        measure_memory(chosen)
        return
    if chosen.products_only:
        large(chosen)
        return
    speed(chosen)
    memory(chosen)


if __name__ == "__main__":
    main()
