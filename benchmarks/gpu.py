"""All speed and memory figures of one GPU in one call: three minutes on an H200, nothing is downloaded.

    pip install . && python benchmarks/gpu.py
    python benchmarks/gpu.py --rehearse        # the same parts with tiny shapes on the CPU

Models have random weights in the shapes of Qwen2-VL-2B (embedder) and Qwen2.5-VL-7B (judge, reranker), in bfloat16.
Each part is timed after a warm-up. A part that fails is reported, and the others run. A part that would start after
``--seconds`` is left out; ``--parts`` names those to run, in this order. ``results/gpu.json`` and ``gpu.md`` are
written after every part.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from gpu_device import REHEARSAL, Gpu, Shapes
from gpu_training import memory, memory_reranker, training, training_torch_flash
from judge import ALL_PAIRS, mixes
from sentence_transformers import CrossEncoder, SentenceTransformer
from throughput import forward_flops, peak_matmul_flops
from torch.nn import Identity
from torch.utils.flop_counter import FlopCounterMode
from workloads import mixed

from unime_st import UniME
from unime_st.backbones.fast_modules import use_fast_modules
from unime_st.encoding.list_inputs import encode_list
from unime_st.judging import LocalJudge
from unime_st.retrieval import top_k

LEAST_COSINE = 0.9999
"""Of packed to padded batches in float32 and float16. In bfloat16 the rounding of 28 layers alone is larger."""

MARGIN = 1e-4
"""How far, in bfloat16, the least cosine to float32 may be below that of the model run by Sentence Transformers."""

Part = Callable[[Gpu], dict[str, Any]]


def matmul(gpu: Gpu) -> dict[str, Any]:
    """Rate of a large matrix product, the reference of every MFU."""
    gpu.peak = peak_matmul_flops(torch.device(gpu.device))
    return {"TFLOP/s": round(gpu.peak / 1e12, 2), "dtype": str(gpu.dtype).removeprefix("torch.")}


def encode(gpu: Gpu) -> dict[str, Any]:
    """Embedding of images, texts and both, beside the model as Sentence Transformers loads and runs it."""
    count = gpu.shapes.inputs
    rows = mixed(gpu.work / "encode", count, repeats=0.0)
    options: dict[str, Any] = {"device": gpu.device, "model_kwargs": {"dtype": gpu.dtype}}
    folder = gpu.embedder_folder
    gpu.free()  # what was needed to draw the weights
    stock = partial(SentenceTransformer(folder, **options).encode, rows, batch_size=32)
    expected, theirs = stock(), gpu.seconds(stock)
    flops = forward_flops(gpu.embedder(), rows, gpu.shapes.token_budget)
    found = {
        "items/s, stock": round(count / theirs, 1),
        "MFU, stock": gpu.mfu(flops / theirs),
        "GFLOP an item": round(flops / count / 1e9, 1),
        "peak GiB, stock": gpu.peak_gib(),
    }
    del stock
    for attention in ("sdpa", "torch_flash"):
        model = None
        gpu.free()
        model = gpu.embedder(attention)
        vectors, ours = model.encode(rows), gpu.seconds(partial(model.encode, rows))
        found |= {
            f"{attention}: items/s": round(count / ours, 1),
            f"{attention}: speed-up": round(theirs / ours, 2),
            f"{attention}: MFU": gpu.mfu(flops / ours),
            f"{attention}: least cosine": _least_cosine(expected, vectors),
            f"{attention}: peak GiB": gpu.peak_gib(),
        }
    return found


def attention(gpu: Gpu) -> dict[str, Any]:
    """Packed batches and flash attention: cosine to padded batches, and to float32.

    Packing computes the same in another order. In float32 and float16 that shows: the cosine to padded batches is at
    least 0.9999. In bfloat16 all ways differ from float32 and from one another by the rounding of its 8 bits, so what
    is compared is how far each is from float32.
    """
    rows = mixed(gpu.work / "attention", gpu.shapes.equality_inputs, repeats=0.0)
    found: dict[str, Any] = {}

    def vectors(model: UniME, packed: bool) -> np.ndarray:
        return encode_list(model, rows, packed=packed).float().cpu().numpy()

    def ways(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
        model = gpu.embedder(dtype=dtype)
        yield "padded, sdpa", partial(vectors, model, False)
        yield "packed, sdpa", partial(vectors, model, True)
        use_fast_modules(model, everywhere=True)
        yield "packed, torch_flash", partial(vectors, model, True)

    exact = np.empty(0)
    for dtype in (torch.float32, torch.float16) if gpu.device == "cuda" else (torch.float32,):
        gpu.free()
        padded = np.empty(0)
        for name, run in ways(dtype):
            made, kind = run(), str(dtype).removeprefix("torch.")
            if name == "padded, sdpa":
                padded, exact = made, exact if exact.size else made
                continue
            cosine = _least_cosine(padded, made)
            found[f"{name}, {kind}: least cosine to padded"] = cosine
            found[f"{name}, {kind}: equal"] = cosine >= LEAST_COSINE
    gpu.free()
    kind = str(gpu.dtype).removeprefix("torch.")
    options: dict[str, Any] = {"device": gpu.device, "model_kwargs": {"dtype": gpu.dtype}}
    stock = _least_cosine(exact, SentenceTransformer(gpu.embedder_folder, **options).encode(rows))
    found[f"Sentence Transformers, {kind}: least cosine to float32"] = stock
    for name, run in ways(gpu.dtype):
        cosine = _least_cosine(exact, run())
        found[f"{name}, {kind}: least cosine to float32"] = cosine
        found[f"{name}, {kind}: as near as stock"] = cosine >= stock - MARGIN
        found[f"{name}, {kind}: s"] = round(gpu.seconds(run), 3)
    return found


def judge(gpu: Gpu) -> dict[str, Any]:
    """Judging with the official prompt, beside ``CrossEncoder.predict``; hours for the 33.1 M pairs of the paper."""
    folder = gpu.judge_folder
    gpu.free()  # what was needed to draw the weights
    judging = LocalJudge(
        folder,
        template="official",
        batch_size=32,
        device=gpu.device,
        model_kwargs={"dtype": gpu.dtype},
    )
    found: dict[str, Any] = {}
    for name, groups in mixes(gpu.work / "judge images", gpu.shapes.queries, gpu.shapes.candidates).items():
        pairs = [(group.query.to_input(), item.to_input()) for group in groups for item in group.candidates]
        predict = partial(CrossEncoder.predict, judging.model, pairs, batch_size=32, activation_fn=Identity())

        def score(groups: Any = groups) -> list[np.ndarray]:
            judging.scorer.clear()  # every run sees its images anew
            return judging.score(groups)

        with FlopCounterMode(display=False) as counter:
            scores = np.concatenate(score())
        difference = float(np.abs(predict() - scores).max())
        ours, theirs = gpu.seconds(score), gpu.seconds(predict)
        found |= {
            f"{name}: pairs/s": round(len(pairs) / ours, 1),
            f"{name}: speed-up": round(theirs / ours, 2),
            f"{name}: MFU": gpu.mfu(counter.get_total_flops() / ours),
            f"{name}: computed tokens a pair": round(judging.count_tokens(groups)[0] / len(pairs), 1),
            f"{name}: GPU hours for 662k x 50": round(ALL_PAIRS / (len(pairs) / ours) / 3600, 1),
            f"{name}: largest difference of log-odds": round(difference, 4),
        }
    return {**found, "peak GiB": gpu.peak_gib()}


def search(gpu: Gpu) -> dict[str, Any]:
    """Exact top 50, beside the plain products with ``torch.topk`` in blocks; float32, from tensors of the device."""
    shapes, device = gpu.shapes, torch.device(gpu.device)
    own = torch.Generator(device).manual_seed(0)
    corpus, queries = (
        torch.nn.functional.normalize(torch.randn(rows, shapes.dim, device=device, generator=own), dim=1)
        for rows in (shapes.corpus, shapes.searches)
    )

    def plain() -> list[torch.Tensor]:
        return [(block @ corpus.T).topk(50).indices.cpu() for block in queries.split(1024)]

    ours = partial(top_k, queries, corpus, 50, device=device)
    same = float((torch.cat(plain()).numpy() == ours()[1]).mean())
    spent, reference = gpu.seconds(ours), gpu.seconds(plain)
    peak, host = gpu.peak_gib(), partial(top_k, queries.cpu().numpy(), corpus.cpu().numpy(), 50, device=device)
    host()
    return {
        "vectors": f"{shapes.searches:,} x {shapes.corpus:,} x {shapes.dim}",
        "s": round(spent, 3),
        "plain products: s": round(reference, 3),
        "times the plain products": round(spent / reference, 2),
        "from arrays in host memory: s": round(gpu.seconds(host), 3),
        "same neighbors": round(same, 5),
        "peak GiB": peak,
    }


PARTS: tuple[Part, ...] = (
    matmul, search, encode, attention, judge, training, memory, memory_reranker, training_torch_flash,
)  # fmt: skip
"""What is measured, in this order."""


def _least_cosine(left: np.ndarray, right: np.ndarray) -> float:
    products = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    return round(float(products.min()), 6)


def measure(gpu: Gpu, name: str, seconds: float, parts: tuple[Part, ...] = PARTS) -> dict[str, Any]:
    """Run all parts and write the result after each.

    Args:
        gpu: Device, shapes and working folder.
        name: Stem of the result's files.
        seconds: Time after which no part begins.
        parts: Functions that measure, in this order.

    Returns:
        dict: Figures, seconds and errors by part.
    """
    began = time.perf_counter()
    result: dict[str, Any] = {"name": name, "machine": harness.machine(), "shapes": vars(gpu.shapes), "parts": {}}
    for part in parts:
        started = time.perf_counter()
        row: dict[str, Any] = {"figures": {}}
        if started - began > seconds:
            row["error"] = f"left out: {seconds:g} s were over"
        else:
            gpu.free()
            try:
                row["figures"] = part(gpu)
            except Exception as error:
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        row["seconds"] = round(time.perf_counter() - started, 1)
        result["parts"][part.__name__] = row
        sys.stdout.write(_rows(part.__name__, row))
        sys.stdout.flush()
        harness.save(result, table(result))
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown table of all figures."""
    head = [harness.where(result), "", "| part | figure | value |", "|---|---|---|"]
    return "\n".join(head) + "\n" + "".join(_rows(name, row) for name, row in result["parts"].items())


def _rows(name: str, row: dict[str, Any]) -> str:
    figures = {**row["figures"], "whole part: s": row["seconds"]}
    if "error" in row:
        figures["error"] = row["error"].replace("|", "/").replace("\n", " ")
    return "".join(f"| {name} | {key} | {value} |\n" for key, value in figures.items())


def main() -> None:
    """Measure, write and print; the exit code is 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes on the CPU, written to gpu_rehearsal.json"
    )
    parser.add_argument("--seconds", type=float, default=440, help="time after which no part begins (default: 440)")
    parser.add_argument(
        "--parts", nargs="*", choices=[part.__name__ for part in PARTS[1:]], help="parts to run, in this order"
    )
    chosen = parser.parse_args()
    if not chosen.rehearse and not torch.cuda.is_available():
        parser.error("no GPU was found: add --rehearse to run tiny shapes on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        shapes, device = (REHEARSAL, "cpu") if chosen.rehearse else (Shapes(), "cuda")
        gpu = Gpu(Path(folder), shapes, device)
        by_name = {part.__name__: part for part in PARTS}
        parts = (matmul, *(by_name[name] for name in chosen.parts)) if chosen.parts else PARTS
        result = measure(gpu, "gpu_rehearsal" if chosen.rehearse else "gpu", chosen.seconds, parts)
    if any("error" in row for row in result["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
