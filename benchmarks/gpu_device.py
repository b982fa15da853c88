"""Device, random models and sizes that all parts of ``gpu.py`` share."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from workloads import images, random_qwen2_5_vl, random_qwen2_vl, sentences

from unime_st import Item, UniME
from unime_st.data.records import PairRecord, RecordSet
from unime_st.memory import peak_resident


@dataclass(frozen=True)
class Shapes:
    """Sizes of the models and workloads; ``side`` is that of the largest square image of the embedder, in pixels."""

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
        pixels = self.shapes.side**2
        return str(random_qwen2_vl(self.work / "embedder", self.shapes.embedder, pixels=pixels, device=self.device))

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

    def mfu(self, flops_per_second: float) -> float:
        """Share of the measured peak."""
        return round(flops_per_second / self.peak, 3)
