"""All speed and memory figures of one GPU in one call: at most nine minutes on an H100 or H200, nothing is downloaded.

    pip install . && python benchmarks/gpu.py
    python benchmarks/gpu.py --rehearse        # the same parts with tiny shapes on the CPU

Models have random weights in the shapes of Qwen2-VL-2B (embedder) and Qwen2.5-VL-7B (judge, reranker), in bfloat16. Each
part is timed after a warm-up. A part that fails is reported, and the others run. A part that would start after
``--seconds`` is left out. ``results/gpu.json`` and ``gpu.md`` are written after every part.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import numpy as np
import torch
from judge import ALL_PAIRS, mixes
from sentence_transformers import CrossEncoder, SentenceTransformer
from throughput import forward_flops, peak_matmul_flops
from torch.nn import Identity
from torch.utils.flop_counter import FlopCounterMode
from workloads import images, mixed, random_qwen2_5_vl, random_qwen2_vl, sentences

from unime_st import Item, UniME, stages
from unime_st.data.records import PairRecord, RecordSet
from unime_st.encoding.list_inputs import encode_list
from unime_st.judging import LocalJudge
from unime_st.memory import peak_resident
from unime_st.retrieval import top_k
from unime_st.training import embedders

LEAST_COSINE = 0.9999
SOFT_LABELS_GIB, RERANKER_GIB = 8, 28
"""Computed peaks of soft_labels/qwen2-vl-2b and reranker/qwen2.5-vl-7b in docs/memory.md, at 16,384 tokens."""

Part = Callable[["Gpu"], dict[str, Any]]


@dataclass(frozen=True)
class Shapes:
    """Sizes of the models and workloads; ``side`` is that of the largest square that the embedder's images are fitted to."""

    embedder: str = "2b"
    judge: str = "7b"
    inputs: int = 300
    equality_inputs: int = 48
    queries: int = 2
    candidates: int = 50
    rows: int = 48
    batch_rows: int = 16
    negatives: int = 8
    token_budget: int = 16384
    corpus: int = 500_000
    searches: int = 10_000
    dim: int = 1536
    side: int = 448
    repeats: int = 2


REHEARSAL = Shapes(
    embedder="small", judge="small", inputs=6, equality_inputs=4, queries=1, candidates=4, rows=6, batch_rows=2,
    negatives=2, token_budget=512, corpus=2000, searches=200, dim=64, side=84, repeats=1,
)  # fmt: skip


@dataclass
class Gpu:
    """The device and what several parts use: folders of models, and the measured peak."""

    work: Path
    shapes: Shapes
    device: str
    peak: float = 0.0

    @cached_property
    def dtype(self) -> torch.dtype:
        """Precision of weights and computation."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @cached_property
    def embedder_folder(self) -> str:
        """Folder of the random embedder."""
        return str(
            random_qwen2_vl(
                self.work / "embedder", self.shapes.embedder, pixels=self.shapes.side**2, device=self.device
            )
        )

    @cached_property
    def judge_folder(self) -> str:
        """Folder of the random generative model."""
        return str(random_qwen2_5_vl(self.work / "judge", self.shapes.judge, self.device))

    def embedder(self, attention: str = "sdpa") -> UniME:
        """Load the embedder."""
        options = {"dtype": self.dtype, "attn_implementation": attention}
        return UniME(self.embedder_folder, device=self.device, model_kwargs=options)

    @cached_property
    def records(self) -> RecordSet:
        """Judged rows: a text, its image, and images and texts as hard negatives."""
        count, negatives, side = self.shapes.rows, self.shapes.negatives, self.shapes.side
        photos = [
            Item(image=path)
            for path in images(self.work / "train", count, shortest=side * 3 // 4, longest=side * 3 // 2)
        ]
        texts = [Item(text) for text in sentences(2 * count, least=5, most=40)]
        rng = np.random.default_rng(0)
        rows = []
        for number in range(count):
            others = [(number + 1 + int(step)) % count for step in rng.permutation(count - 1)[:negatives]]
            wrong = [photos[other] if other % 2 else texts[count + other] for other in others]
            logits = rng.normal(-2, 1, negatives).tolist()
            rows.append(PairRecord(texts[number], photos[number], "", tuple(wrong), 2.0, tuple(logits)))
        return RecordSet.write(self.work / "records", rows, {}, image_root=self.work / "train")

    def seconds(self, run: Callable[[], object]) -> float:
        """Median seconds of a call after a warm-up."""
        spent = []
        for _ in range(self.shapes.repeats + 1):
            started = time.perf_counter()
            run()
            self.wait()
            spent.append(time.perf_counter() - started)
        return statistics.median(spent[1:])

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Release what a part has left, and begin a new peak."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """Peak memory since :meth:`free`, of the device or (CPU) of the process so far."""
        found = torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_resident()
        return round(found / 2**30, 2)


def matmul(gpu: Gpu) -> dict[str, Any]:
    """Rate of a large matrix product, the reference of every MFU."""
    gpu.peak = peak_matmul_flops(torch.device(gpu.device))
    return {"TFLOP/s": round(gpu.peak / 1e12, 2), "dtype": str(gpu.dtype).removeprefix("torch.")}


def encode(gpu: Gpu) -> dict[str, Any]:
    """Embedding of images, texts and both, beside the model as Sentence Transformers loads and runs it."""
    count = gpu.shapes.inputs
    rows = mixed(gpu.work / "encode", count, repeats=0.0)
    options: dict[str, Any] = {"device": gpu.device, "model_kwargs": {"dtype": gpu.dtype}}
    stock = partial(SentenceTransformer(gpu.embedder_folder, **options).encode, rows, batch_size=32)
    expected, theirs = stock(), gpu.seconds(stock)
    flops = forward_flops(gpu.embedder(), rows, gpu.shapes.token_budget)
    found = {
        "items/s, stock": round(count / theirs, 1),
        "MFU, stock": _share(flops / theirs, gpu),
        "GFLOP an item": round(flops / count / 1e9, 1),
        "peak GiB, stock": gpu.peak_gib(),
    }
    for attention in ("sdpa", "torch_flash"):
        gpu.free()
        model = gpu.embedder(attention)
        vectors, ours = model.encode(rows), gpu.seconds(partial(model.encode, rows))
        found |= {
            f"{attention}: items/s": round(count / ours, 1),
            f"{attention}: speed-up": round(theirs / ours, 2),
            f"{attention}: MFU": _share(flops / ours, gpu),
            f"{attention}: least cosine": _least_cosine(expected, vectors),
            f"{attention}: peak GiB": gpu.peak_gib(),
        }
    return found


def attention(gpu: Gpu) -> dict[str, Any]:
    """Packed batches and flash attention, beside padded batches with sdpa: cosine and seconds."""
    rows = mixed(gpu.work / "attention", gpu.shapes.equality_inputs, repeats=0.0)
    found: dict[str, Any] = {}
    padded = partial(encode_list, gpu.embedder(), rows, packed=False)
    expected = padded().float().cpu().numpy()
    found["padded, sdpa: s"] = round(gpu.seconds(padded), 3)
    for name in ("sdpa", "torch_flash", "flash_attention_2"):
        try:
            other = gpu.embedder(name)
        except (ImportError, ValueError) as error:  # the package is missing, or the device is a CPU
            found[f"packed, {name}"] = f"not available: {str(error).splitlines()[0][:100]}"
            continue
        cosine = _least_cosine(expected, encode_list(other, rows, packed=True).float().cpu().numpy())
        found[f"packed, {name}: least cosine"] = cosine
        found[f"packed, {name}: equal"] = cosine >= LEAST_COSINE
        found[f"packed, {name}: s"] = round(gpu.seconds(partial(encode_list, other, rows, packed=True)), 3)
    return found


def judge(gpu: Gpu) -> dict[str, Any]:
    """Judging with the official prompt, beside ``CrossEncoder.predict``; hours for the 33.1 M pairs of the paper."""
    judging = LocalJudge(
        gpu.judge_folder,
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
            f"{name}: MFU": _share(counter.get_total_flops() / ours, gpu),
            f"{name}: computed tokens a pair": round(judging.count_tokens(groups)[0] / len(pairs), 1),
            f"{name}: GPU hours for 662k x 50": round(ALL_PAIRS / (len(pairs) / ours) / 3600, 1),
            f"{name}: largest difference of log-odds": round(difference, 4),
        }
    return {**found, "peak GiB": gpu.peak_gib()}


def training(gpu: Gpu) -> dict[str, Any]:
    """UniME-V2 step (query, positive, hard negatives, in-batch term) with and without frozen-tower cache.

    The whole stage runs. MFU counts the language model's weights only, and not the second pass of gradient caching.
    """
    found: dict[str, Any] = {}
    for name, frozen in (("frozen-tower cache", True), ("no cache", False)):
        gpu.free()
        output = gpu.work / f"step, {name}"
        given = {"in_batch_weight": 0.5, "token_budget": gpu.shapes.token_budget}
        with mock.patch.object(embedders, "is_frozen", lambda model, frozen=frozen: frozen):
            stages.train_soft_labels(_soft_labels(gpu, output, **given))
        lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        rate = statistics.median(line["examples_per_second"] for line in lines[1:])
        found[f"{name}: rows/s"] = round(rate, 2)
        found[f"{name}: MFU"] = statistics.median(line["mfu"] for line in lines[1:])
        found[f"{name}: loss"] = round(lines[-1]["loss"], 4)
        found[f"{name}: peak GiB"] = gpu.peak_gib()
    return found


def memory(gpu: Gpu) -> dict[str, Any]:
    """Peak memory of two configurations, as ``--dry_run`` measures it, beside the computed one of docs/memory.md."""
    given = {"token_budget": gpu.shapes.token_budget, "dry_run": True}
    stages.train_soft_labels(_soft_labels(gpu, gpu.work / "dry", **given))
    found: dict[str, Any] = {
        "soft_labels/qwen2-vl-2b: GiB": gpu.peak_gib(),
        "soft_labels/qwen2-vl-2b: GiB, computed": SOFT_LABELS_GIB,
    }
    gpu.free()
    stages.train_reranker(
        stages.RerankerArguments(
            model=gpu.judge_folder, template="official", num_negatives=gpu.shapes.negatives, lora_rank=128,
            lora_alpha=256, **_common(gpu, gpu.work / "dry reranker", per_device_train_batch_size=2, dry_run=True),
        )
    )  # fmt: skip
    return {
        **found,
        "reranker/qwen2.5-vl-7b: GiB": gpu.peak_gib(),
        "reranker/qwen2.5-vl-7b: GiB, computed": RERANKER_GIB,
    }


def _soft_labels(gpu: Gpu, output: Path, **given: Any) -> stages.SoftLabelArguments:
    shared = _common(gpu, output, per_device_train_batch_size=gpu.shapes.batch_rows, **given)
    return stages.SoftLabelArguments(model=gpu.embedder_folder, num_negatives=gpu.shapes.negatives, **shared)


def _common(gpu: Gpu, output: Path, **given: Any) -> dict[str, Any]:
    options = {"data": str(gpu.records.folder), "output": str(output), "max_steps": 3, "logging_steps": 1}
    options |= {"gradient_checkpointing": True, "bf16": gpu.device == "cuda", "use_cpu": gpu.device == "cpu"}
    return {**options, "save_steps": 1000, **given}


def search(gpu: Gpu) -> dict[str, Any]:
    """Exact top 50, beside the plain products with ``torch.topk`` in blocks; float32."""
    shapes, device = gpu.shapes, torch.device(gpu.device)
    own = torch.Generator(device).manual_seed(0)
    corpus, queries = (
        torch.nn.functional.normalize(torch.randn(rows, shapes.dim, device=device, generator=own), dim=1)
        for rows in (shapes.corpus, shapes.searches)
    )
    left, right = queries.cpu().numpy(), corpus.cpu().numpy()

    def plain() -> list[torch.Tensor]:
        return [(block @ corpus.T).topk(50).indices.cpu() for block in queries.split(1024)]

    exact = top_k(left, right, 50, device=device)[1]
    same = float((torch.cat(plain()).numpy() == exact).mean())
    spent, reference = gpu.seconds(lambda: top_k(left, right, 50, device=device)), gpu.seconds(plain)
    return {
        "vectors": f"{shapes.searches:,} x {shapes.corpus:,} x {shapes.dim}",
        "s": round(spent, 3),
        "plain products: s": round(reference, 3),
        "times the plain products": round(spent / reference, 2),
        "same neighbors": round(same, 5),
        "peak GiB": gpu.peak_gib(),
    }


PARTS: tuple[Part, ...] = (matmul, encode, attention, judge, training, search, memory)


def _least_cosine(left: np.ndarray, right: np.ndarray) -> float:
    products = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    return round(float(products.min()), 6)


def _share(rate: float, gpu: Gpu) -> float:
    return round(rate / gpu.peak, 3)


def measure(gpu: Gpu, name: str, seconds: float, parts: tuple[Part, ...] = PARTS) -> dict[str, Any]:
    """Run all parts and write the result after each.

    Args:
        gpu: Device, shapes and working folder.
        name: Stem of the result's files.
        seconds: Time after which no part begins.
        parts: What is measured, in this order.

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
    chosen = parser.parse_args()
    if not chosen.rehearse and not torch.cuda.is_available():
        parser.error("no GPU was found: add --rehearse to run tiny shapes on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        shapes, device = (REHEARSAL, "cpu") if chosen.rehearse else (Shapes(), "cuda")
        gpu = Gpu(Path(folder), shapes, device)
        result = measure(gpu, "gpu_rehearsal" if chosen.rehearse else "gpu", chosen.seconds)
    if any("error" in row for row in result["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
