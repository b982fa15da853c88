"""MMEB (Massive Multimodal Embedding Benchmark, 36 subsets) for mteb, by its official protocol."""

from __future__ import annotations
