"""Items of every kind, for judges of every family."""

from __future__ import annotations

import tiny_reranker as tiny

from unime_st.data import Item

TEXTS = ["a red square", "the big circle on the left of a small triangle", "blue", "<|image_1|>\nWhich image?\n"]
ITEMS = [
    *(Item(text) for text in TEXTS[:3]),
    *(Item(image=tiny.png(seed, size)) for seed, size in enumerate([(60, 90), (30, 31), (200, 40)])),
    *(Item(TEXTS[3], tiny.png(seed)) for seed in (7, 8)),
]
