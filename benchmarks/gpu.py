"""All speed and memory figures of one GPU in one call: three minutes on an H200, nothing is downloaded.

    pip install . && python benchmarks/gpu.py
    python benchmarks/gpu.py --rehearse        # the same parts with tiny shapes on the CPU

Models have random weights in the shapes of Qwen2-VL-2B (embedder) and Qwen2.5-VL-7B (judge, reranker), in bfloat16. Each
part is timed after a warm-up. A part that fails is reported, and the others run. A part that would start after
``--seconds`` is left out; ``--parts`` names those to run, in this order. ``results/gpu.json`` and ``gpu.md`` are written after every
part.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from unime_st.backbones.varlen_attention import use_varlen_attention
from unime_st.data.records import PairRecord, RecordSet
from unime_st.encoding.list_inputs import encode_list
from unime_st.encoding.model_inputs import Features
from unime_st.judging import LocalJudge
from unime_st.memory import peak_resident
from unime_st.retrieval import top_k
from unime_st.training import embedders
from unime_st.training.feed import Feed
from unime_st.training.trainer import ReportingTrainer

LEAST_COSINE = 0.9999
"""Of packed to padded batches in float32 and float16. In bfloat16 the rounding of 28 layers alone is larger."""

MARGIN = 1e-4
"""By which the least cosine to float32 may be below that of the model as Sentence Transformers runs it, in bfloat16."""

SOFT_LABELS_GIB, RERANKER_GIB = 8, 28
"""Computed peaks of soft_labels/qwen2-vl-2b and reranker/qwen2.5-vl-7b in docs/memory.md, at 16,384 tokens."""

Part = Callable[["Gpu"], dict[str, Any]]


@dataclass(frozen=True)
class Shapes:
    """Sizes of the models and workloads; ``side`` is that of the largest square that the embedder's images are fitted to."""

    embedder: str = "2b"
    judge: str = "7b"
    inputs: int = 160
    equality_inputs: int = 16
    queries: int = 2
    candidates: int = 50
    rows: int = 48
    batch_rows: int = 16
    steps: int = 8
    negatives: int = 8
    token_budget: int = 16384
    corpus: int = 500_000
    searches: int = 10_000
    dim: int = 1536
    side: int = 448
    repeats: int = 2


REHEARSAL = Shapes(
    embedder="small", judge="small", inputs=6, equality_inputs=4, queries=1, candidates=4, rows=6, batch_rows=2,
    steps=3, negatives=2, token_budget=512, corpus=2000, searches=200, dim=64, side=84, repeats=1,
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

    def embedder(self, attention: str = "sdpa", dtype: torch.dtype | None = None) -> UniME:
        """Load the embedder."""
        options = {"dtype": dtype or self.dtype, "attn_implementation": attention}
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
        """Median seconds of a call that has run once to warm up."""
        spent = []
        for _ in range(self.shapes.repeats):
            started = time.perf_counter()
            run()
            self.wait()
            spent.append(time.perf_counter() - started)
        return statistics.median(spent)

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
    folder = gpu.embedder_folder
    gpu.free()  # what was needed to draw the weights
    stock = partial(SentenceTransformer(folder, **options).encode, rows, batch_size=32)
    expected, theirs = stock(), gpu.seconds(stock)
    flops = forward_flops(gpu.embedder(), rows, gpu.shapes.token_budget)
    found = {
        "items/s, stock": round(count / theirs, 1),
        "MFU, stock": _share(flops / theirs, gpu),
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
            f"{attention}: MFU": _share(flops / ours, gpu),
            f"{attention}: least cosine": _least_cosine(expected, vectors),
            f"{attention}: peak GiB": gpu.peak_gib(),
        }
    return found


def attention(gpu: Gpu) -> dict[str, Any]:
    """Packed batches and flash attention: cosine to padded batches, and to float32.

    Packing computes the same in another order. In float32 and float16 that shows: the cosine to padded batches is at
    least 0.9999. In bfloat16 all ways differ from float32 and from one another by the rounding of its 8 bits, so what is
    compared is how far each is from float32.
    """
    rows = mixed(gpu.work / "attention", gpu.shapes.equality_inputs, repeats=0.0)
    found: dict[str, Any] = {}

    def vectors(model: UniME, packed: bool) -> np.ndarray:
        return encode_list(model, rows, packed=packed).float().cpu().numpy()

    def ways(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
        model = gpu.embedder(dtype=dtype)
        yield "padded, sdpa", partial(vectors, model, False)
        yield "packed, sdpa", partial(vectors, model, True)
        use_varlen_attention(model, everywhere=True)
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
            f"{name}: MFU": _share(counter.get_total_flops() / ours, gpu),
            f"{name}: computed tokens a pair": round(judging.count_tokens(groups)[0] / len(pairs), 1),
            f"{name}: GPU hours for 662k x 50": round(ALL_PAIRS / (len(pairs) / ours) / 3600, 1),
            f"{name}: largest difference of log-odds": round(difference, 4),
        }
    return {**found, "peak GiB": gpu.peak_gib()}


@dataclass
class _Watch:
    """What the steps of a training waited for and sent to the vision tower."""

    waited: list[float] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)


@contextmanager
def _watched(gpu: Gpu) -> Iterator[_Watch]:
    """Measure how long the device is idle until a mini-batch is prepared, and count the patches of its images."""
    watch, stream, step = _Watch(), Feed.stream, ReportingTrainer.training_step

    def watched_stream(feed: Feed, *args: Any) -> Iterator[Features]:
        source = stream(feed, *args)
        while True:
            gpu.wait()
            began = time.perf_counter()
            held: list[Any] = [next(source, None)]
            if watch.waited:
                watch.waited[-1] += time.perf_counter() - began
            if held[0] is None:
                return
            if watch.patches and "image_grid_thw" in held[0]:
                watch.patches[-1] += int(held[0]["image_grid_thw"].prod(dim=1).sum())
            yield held.pop()  # the pixels are not kept alive here

    def watched_step(trainer: ReportingTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        watch.waited.append(0.0)
        watch.patches.append(0)
        return step(trainer, *args, **kwargs)

    with (
        mock.patch.object(Feed, "stream", watched_stream),
        mock.patch.object(ReportingTrainer, "training_step", watched_step),
    ):
        yield watch


def _flops_per_patch(gpu: Gpu) -> float:
    """FLOPs of the vision tower for a patch of 14 x 14 pixels, from a few images of the training."""
    model: Any = gpu.embedder()
    photos = [item.to_input() for item in gpu.records.items if item.image is not None][:4]
    features = model.preprocess(photos)
    pixels, grid = features["pixel_values"].to(gpu.device, gpu.dtype), features["image_grid_thw"].to(gpu.device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model[0].model.visual(pixels, grid_thw=grid)
    return counter.get_total_flops() / len(pixels)


def training(gpu: Gpu, variants: Sequence[str] = ("frozen-tower cache", "no cache")) -> dict[str, Any]:
    """UniME-V2 step (query, positive, hard negatives, in-batch term) with and without frozen-tower cache.

    The whole stage runs; its first two steps do not count. MFU counts the weights of the language model, and with the
    vision tower also the FLOPs of its forward passes. Recomputation and the second pass of gradient caching are included,
    also that of the first mini-batch, which has none.
    """
    found: dict[str, Any] = {}
    patch_flops, rows = _flops_per_patch(gpu), gpu.shapes.batch_rows
    for name in variants:
        gpu.free()
        output = gpu.work / f"step, {name}"
        given = {"in_batch_weight": 0.5, "token_budget": gpu.shapes.token_budget, "max_steps": gpu.shapes.steps}
        with (
            mock.patch.object(embedders, "is_frozen", lambda model, frozen=name != "no cache": frozen),
            mock.patch.object(embedders, "UniME", partial(_loaded, name.removeprefix("frozen-tower cache, "))),
            _watched(gpu) as watch,
        ):
            stages.train_soft_labels(_soft_labels(gpu, output, **given))
        lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()][2:]
        rate = statistics.median(line["examples_per_second"] for line in lines)
        language = statistics.median(line["mfu"] for line in lines)
        vision = patch_flops * statistics.mean(watch.patches[2:]) * rate / rows / gpu.peak
        found |= {
            f"{name}: rows/s": round(rate, 2),
            f"{name}: s a step": round(rows / rate, 3),
            f"{name}: s a step, device idle until data is prepared": round(statistics.median(watch.waited[2:]), 3),
            f"{name}: MFU, language model": round(language, 3),
            f"{name}: MFU, with vision tower": round(language + vision, 3),
            f"{name}: loss": round(lines[-1]["loss"], 4),
            f"{name}: peak GiB": gpu.peak_gib(),
        }
    return found


def training_torch_flash(gpu: Gpu) -> dict[str, Any]:
    """The same step with the flash attention of torch in the language model."""
    return training(gpu, ["frozen-tower cache, torch_flash"])


def _loaded(attention: str, *args: Any, model_kwargs: dict[str, Any], **options: Any) -> UniME:
    """Load a model to train, with flash attention if it is named."""
    chosen = {"attn_implementation": attention} if attention == "torch_flash" else {}
    return UniME(*args, model_kwargs={**model_kwargs, **chosen}, **options)


def memory(gpu: Gpu) -> dict[str, Any]:
    """Peak memory of training an embedder, as ``--dry_run`` measures it, beside the computed one of docs/memory.md."""
    given = {"token_budget": gpu.shapes.token_budget, "dry_run": True}
    stages.train_soft_labels(_soft_labels(gpu, gpu.work / "dry", **given))
    return {
        "soft_labels/qwen2-vl-2b: GiB": gpu.peak_gib(),
        "soft_labels/qwen2-vl-2b: GiB, computed": SOFT_LABELS_GIB,
    }


def memory_reranker(gpu: Gpu) -> dict[str, Any]:
    """Peak memory of training a reranker, likewise."""
    folder = gpu.judge_folder
    gpu.free()  # what was needed to draw the weights
    stages.train_reranker(
        stages.RerankerArguments(
            model=folder, template="official", num_negatives=gpu.shapes.negatives, lora_rank=128, lora_alpha=256,
            **_common(gpu, gpu.work / "dry reranker", per_device_train_batch_size=2, dry_run=True),
        )
    )  # fmt: skip
    return {"reranker/qwen2.5-vl-7b: GiB": gpu.peak_gib(), "reranker/qwen2.5-vl-7b: GiB, computed": RERANKER_GIB}


def _soft_labels(gpu: Gpu, output: Path, **given: Any) -> stages.SoftLabelArguments:
    shared = _common(gpu, output, per_device_train_batch_size=gpu.shapes.batch_rows, **given)
    return stages.SoftLabelArguments(model=gpu.embedder_folder, num_negatives=gpu.shapes.negatives, **shared)


def _common(gpu: Gpu, output: Path, **given: Any) -> dict[str, Any]:
    options = {"data": str(gpu.records.folder), "output": str(output), "max_steps": 3, "logging_steps": 1}
    options |= {"gradient_checkpointing": True, "bf16": gpu.device == "cuda", "use_cpu": gpu.device == "cpu"}
    return {**options, "save_steps": 1000, **given}


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
    *(matmul, search, encode, attention, judge, training, memory, memory_reranker, training_torch_flash),
)


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
