"""Parts of ``gpu.py`` that train: the UniME-V2 step, and the peak memory of training an embedder and a reranker."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_device import Gpu
from torch.utils.flop_counter import FlopCounterMode

from unime_st import UniME, stages
from unime_st.encoding.model_inputs import Features
from unime_st.training import embedders
from unime_st.training.feed import Feed
from unime_st.training.trainer import ReportingTrainer

SOFT_LABELS_GIB, RERANKER_GIB = 8, 28
"""Computed peaks of soft_labels/qwen2-vl-2b and reranker/qwen2.5-vl-7b in docs/memory.md, at 16,384 tokens."""


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
    vision tower also the FLOPs of its forward passes. Recomputation and the second pass of gradient caching are
    included, also for the first mini-batch, which has no second pass.
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
