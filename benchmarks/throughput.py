"""Throughput benchmark: images per second, share of the peak matmul FLOPS, and time by stage."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from workloads import images

from unime_st.encoding import TokenCounter, encode_items, pack


def throughput(model: SentenceTransformer, folder: Path, *, count: int, repeats: int, budget: int) -> str:
    """Measure the engine on JPEG files, and the forward passes alone on preprocessed images.

    Args:
        model: The embedding model.
        folder: Output folder for the images.
        count: Number of images; each becomes about 336 x 336 pixels.
        repeats: Number of timed runs after one warm-up.
        budget: Tokens per batch.

    Returns:
        str: Markdown table with images per second, share of the peak FLOPS and milliseconds per image by stage.
    """
    paths = images(folder, count, shortest=336, longest=500)
    rows = [{"image": path} for path in paths]
    batches = pack(TokenCounter(model)(rows), budget)
    ready = [_prepared(model, [rows[index] for index in batch]) for batch in batches]
    flops = _flops(model, ready)
    with_decoding = _median(lambda: encode_items(model, rows, token_budget=budget), repeats)
    without = _median(lambda: _forward(model, ready), repeats)
    peak = peak_matmul_flops(model.device)
    result = {
        "name": "encode_throughput",
        "machine": harness.machine(),
        "images": count,
        "tokens_per_batch": budget,
        "gflop_per_image": round(flops / count / 1e9, 1),
        "peak_matmul_tflops": round(peak / 1e12, 2),
        "images_per_second": {
            "with decoding": round(count / with_decoding, 1),
            "without decoding": round(count / without, 1),
        },
        "share_of_peak": {
            "with decoding": round(flops / with_decoding / peak, 3),
            "without decoding": round(flops / without / peak, 3),
        },
        "milliseconds_per_image": _stages(model, rows, ready, without / count * 1e3),
        "operations": _operations(model, ready),
    }
    table = _table(result)
    harness.save(result, table)
    return table


def _prepared(model: SentenceTransformer, rows: list[dict[str, str]]) -> dict[str, Any]:
    features = model.preprocess(rows)
    return {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in features.items()}


@torch.inference_mode()
def _forward(model: SentenceTransformer, ready: list[dict[str, Any]]) -> None:
    for features in ready:
        model(dict(features))
    _wait()


def forward_flops(model: SentenceTransformer, rows: list[Any], budget: int) -> int:
    """Count the FLOPs of the forward passes of inputs, in batches of at most ``budget`` tokens."""
    batches = pack(TokenCounter(model)(rows), budget)
    return _flops(model, [_prepared(model, [rows[index] for index in batch]) for batch in batches])


def _flops(model: SentenceTransformer, ready: list[dict[str, Any]]) -> int:
    with FlopCounterMode(display=False) as counter:
        _forward(model, ready)
    return counter.get_total_flops()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _median(run: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def peak_matmul_flops(device: torch.device) -> float:
    """Measure the FLOPS of a large matrix product: bfloat16 on a GPU, float32 on a CPU.

    Args:
        device: The device.
    """
    side, kind = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left = torch.randn(side, side, device=device, dtype=kind)

    def products() -> None:
        for _ in range(20):
            left @ left
        _wait()

    return 20 * 2 * side**3 / _median(products, 3)


def _stages(
    model: SentenceTransformer, rows: list[dict[str, str]], ready: list[dict[str, Any]], forward: float
) -> dict[str, float]:
    """Milliseconds per image of each stage alone, in one thread."""
    decoded = [{"image": Image.open(row["image"]).convert("RGB")} for row in rows]
    vision: Any = getattr(model[0].model, "visual", None)
    spent = {
        "decode": _median(lambda: [Image.open(row["image"]).convert("RGB") for row in rows], 1),
        "resize, patches, tokens": _median(lambda: model.preprocess(decoded), 1),
    }
    found = {name: round(seconds / len(rows) * 1e3, 2) for name, seconds in spent.items()}
    if vision is not None:
        seen = _median(lambda: _vision(vision, ready), 3) / len(rows) * 1e3
        found |= {"vision tower": round(seen, 2), "language model": round(forward - seen, 2)}
        return found
    return found | {"forward pass": round(forward, 2)}


@torch.inference_mode()
def _vision(tower: Any, ready: list[dict[str, Any]]) -> None:
    for features in ready:
        tower(features["pixel_values"].to(next(tower.parameters()).dtype), grid_thw=features["image_grid_thw"])
    _wait()


def _operations(model: SentenceTransformer, ready: list[dict[str, Any]], most: int = 8) -> dict[str, float]:
    """Share of the forward time by operation."""
    on_gpu = model.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        _forward(model, ready[:4])
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    spent = {event.key: float(getattr(event, name)) for event in seen.key_averages()}
    largest = sorted(spent, key=lambda key: -spent[key])[:most]
    return {key[:60]: round(spent[key] / sum(spent.values()), 3) for key in largest}


def _table(result: dict[str, Any]) -> str:
    speed, share = result["images_per_second"], result["share_of_peak"]
    lines = [
        f"{harness.where(result)}; {result['images']} JPEG files, {result['gflop_per_image']} GFLOP each, "
        f"{result['peak_matmul_tflops']} TFLOP/s in a large matrix product",
        "",
        "| | images/s | share of peak FLOPS |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {speed[name]} | {share[name]:.1%} |" for name in speed]
    lines += ["", "| stage, alone in one thread | ms per image |", "|---|---|"]
    lines += [f"| {name} | {spent} |" for name, spent in result["milliseconds_per_image"].items()]
    lines += ["", "| operation | share of forward time |", "|---|---|"]
    lines += [f"| `{name}` | {share:.1%} |" for name, share in result["operations"].items()]
    return "\n".join(lines) + "\n"
