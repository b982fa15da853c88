"""Encoding benchmark: `UniME.encode` beside `SentenceTransformer.encode`, same model and same vectors.

python benchmarks/encode.py [--inputs 60 --throughput_images 24 --memory_images 5000 --texts 20000]
python benchmarks/encode.py --device cuda --size 2b --inputs 600 --throughput_images 1024 --no_scaling --memory_images 0 --texts 0
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from throughput import throughput
from workloads import SIZES, images, mixed, random_qwen2_vl, sentences

from unime_st import UniME
from unime_st.encoding import encode_items
from unime_st.memory import peak_resident

STOCK, ENGINE = "SentenceTransformer.encode", "UniME.encode"


def _pair(folder: Path | str, device: str) -> dict[str, SentenceTransformer]:
    options: dict[str, Any] = {"model_kwargs": {"dtype": torch.bfloat16}} if device == "cuda" else {}
    classes = {STOCK: SentenceTransformer, ENGINE: UniME}
    return {label: load(str(folder), device=device, **options) for label, load in classes.items()}


def _speed(models: dict[str, SentenceTransformer], work: Path, chosen: Any) -> None:
    for share, name in ((0.2, "encode_20_percent_repeats"), (0.0, "encode_without_repeats")):
        rows = mixed(work / name, chosen.inputs, repeats=share)
        vectors = {label: model.encode(rows) for label, model in models.items()}
        cosine = float((vectors[STOCK] * vectors[ENGINE]).sum(1).min())
        runs = {label: partial(model.encode, rows) for label, model in models.items()}
        facts = {"inputs": chosen.inputs, "least_cosine": cosine, "size": chosen.size}
        result = harness.compare(name, runs, repeats=chosen.repeats, facts=facts)
        _print(f"{name}: {chosen.inputs} inputs, least cosine {cosine:.7f}\n{harness.table(result)}")


def _memory(work: Path, count: int) -> None:
    """Measure peak memory above the loaded model, each variant in its own process."""
    files = images(work / "memory", min(count, 200))
    links = work / "links"
    links.mkdir()
    for number in range(count):  # different names, so that neither side can deduplicate them
        (links / f"{number}.jpg").symlink_to(files[number % len(files)])
    found = {}
    for name in (STOCK, ENGINE):
        command = [sys.executable, __file__, "--measure_memory", name, "--work", str(links)]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
        loaded, peak = map(float, output.split()[-2:])
        found[name] = {"loaded_mb": loaded, "peak_mb": peak, "above_mb": round(peak - loaded, 1)}
    # A few images may fit into memory that loading has freed.
    ratio = {key: round(found[ENGINE][key] / max(found[STOCK][key], 1.0), 2) for key in ("peak_mb", "above_mb")}
    result = {"name": "encode_memory", "machine": harness.machine(), "images": count, "found": found, "ratio": ratio}
    lines = [f"{count} JPEG files given by path, unime-tiny", "", "| variant | loaded MB | peak MB | above MB |"]
    lines += ["|---|---|---|---|"]
    lines += [
        f"| {name} | {v['loaded_mb']:.0f} | {v['peak_mb']:.0f} | {v['above_mb']:.0f} |" for name, v in found.items()
    ]
    harness.save(result, "\n".join(lines) + "\n")
    _print("\n".join(lines) + f"\nengine / stock: {ratio}\n")


def _measure_memory(name: str, folder: Path) -> None:
    model = _pair("unime-tiny", "cpu")[name]
    paths = sorted(map(str, folder.glob("*.jpg")))
    model.encode(paths[:1])
    loaded = peak_resident() / 2**20
    model.encode(paths)
    _print(f"{loaded:.1f} {peak_resident() / 2**20:.1f}\n")


def _overhead(count: int) -> None:
    """Measure the microseconds per text that the engine spends outside the forward pass, tokenization included."""
    model, spent, started = UniME("unime-tiny", device="cpu"), [0.0], [0.0]

    def begin(*_: Any) -> None:
        started[0] = time.perf_counter()

    def end(*_: Any) -> None:
        spent[0] += time.perf_counter() - started[0]

    model.register_forward_pre_hook(begin)
    model.register_forward_hook(end)
    texts = sentences(count, least=3, most=10)
    encode_items(model, texts[:200], workers=1)
    stages: dict[str, float] = {}
    for size in (count // 4, count // 2, count):
        spent[0], begun = 0.0, time.perf_counter()
        encode_items(model, texts[:size], workers=1)
        stages[str(size)] = round((time.perf_counter() - begun - spent[0]) / size * 1e6, 1)
    begun = time.perf_counter()
    model.tokenizer(texts, add_special_tokens=False)
    tokenizing = round((time.perf_counter() - begun) / count * 1e6, 1)
    result = {
        "name": "encode_overhead",
        "machine": harness.machine(),
        "microseconds": stages,
        "tokenizing": tokenizing,
    }
    summary = f"microseconds per text outside the forward pass: {stages}, of which tokenizer: {tokenizing}\n"
    harness.save(result, summary)
    _print(summary)


def _scaling(models: dict[str, SentenceTransformer], work: Path) -> None:
    def by_count(count: int) -> dict[str, Any]:
        rows = mixed(work / f"n{count}", count, repeats=0.0)
        return {label: partial(model.encode, rows) for label, model in models.items()}

    def by_size(side: int) -> dict[str, Any]:
        paths = images(work / f"s{side}", 6, shortest=side, longest=side)
        return {label: partial(model.encode, paths) for label, model in models.items()}

    def by_batch(size: int) -> dict[str, Any]:
        rows = mixed(work / f"b{size}", 24, repeats=0.0)
        return {label: partial(model.encode, rows, batch_size=size) for label, model in models.items()}

    axes = {
        "inputs: 6 12 24": by_count,
        "image side in pixels: 224 448 896": by_size,
        "batch size: 2 8 24": by_batch,
    }
    harness.scaling("encode_scaling", axes)


def _print(text: str) -> None:
    sys.stdout.write(text + ("" if text.endswith("\n") else "\n"))
    sys.stdout.flush()


def main() -> None:
    """Run the benchmarks and print the results."""
    parser = harness.options(__doc__, repeats=3)
    parser.add_argument("--size", choices=tuple(SIZES), default="mid", help="size of the random Qwen2-VL")
    parser.add_argument("--inputs", type=int, default=60, help="number of inputs of the mixed workload")
    parser.add_argument(
        "--throughput_images", type=int, default=24, help="number of images of the throughput benchmark; 0 skips it"
    )
    parser.add_argument(
        "--batch_tokens", type=int, help="tokens per batch of the throughput benchmark; default 2048, on a GPU 16384"
    )
    parser.add_argument(
        "--memory_images", type=int, default=5000, help="number of images of the memory benchmark; 0 skips it"
    )
    parser.add_argument(
        "--texts", type=int, default=20_000, help="number of texts of the overhead benchmark; 0 skips it"
    )
    parser.add_argument("--no_scaling", action="store_true", help="skip the scaling benchmark")
    parser.add_argument(
        "--measure_memory", choices=(STOCK, ENGINE), help="internal: measure one variant in this process"
    )
    parser.add_argument("--work", type=Path, help="internal: image folder of --measure_memory")
    chosen = parser.parse_args()
    if chosen.measure_memory:
        _measure_memory(chosen.measure_memory, chosen.work)
        return
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        models = _pair(random_qwen2_vl(work / "model", chosen.size, device=chosen.device), chosen.device)
        _speed(models, work, chosen)
        if chosen.throughput_images:
            budget = chosen.batch_tokens or (16384 if chosen.device == "cuda" else 2048)
            sizes = {"count": chosen.throughput_images, "repeats": chosen.repeats, "budget": budget}
            _print(throughput(models[ENGINE], work / "throughput", **sizes))
        if not chosen.no_scaling:
            _scaling(models, work)
        if chosen.memory_images:
            _memory(work, chosen.memory_images)
        if chosen.texts:
            _overhead(chosen.texts)


if __name__ == "__main__":
    main()
