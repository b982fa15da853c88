"""Pixel budget: batches are limited by decoded pixels as well as by tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer
from tiny_embedder import tiny_embedder

from unime_st import Item
from unime_st.encoding import encode_items
from unime_st.encoding.batch_runner import BatchRunner
from unime_st.encoding.model_inputs import texts_and_sizes

SIZES = [(1600, 1200), (400, 300), (1200, 1600), (3000, 3000), (640, 480), (1600, 1600)]


def photographs(folder: Path) -> list[str]:
    """Two images of every size, each at most sixteen tokens after the image processor."""
    rng, paths = np.random.default_rng(0), []
    for number in range(2 * len(SIZES)):
        grain = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        paths.append(str(folder / f"{number}.jpg"))
        Image.fromarray(grain).resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.mark.parametrize("as_item", [False, True])
@pytest.mark.slow
def test_pixels_of_a_batch_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_item: bool):
    paths, model = photographs(tmp_path), tiny_embedder()
    rows: list[Any] = [Item(image=path) if as_item else {"image": path} for path in paths]
    calls: list[list[int]] = []
    preprocess = SentenceTransformer.preprocess

    def watched(self: SentenceTransformer, inputs: list[Any], **options: Any) -> dict[str, Any]:
        sizes = [size for value in inputs for size in texts_and_sizes(value)[1]]
        calls.append([width * height for width, height in sizes])
        return preprocess(self, inputs, **options)

    monkeypatch.setattr(SentenceTransformer, "preprocess", watched)
    found = encode_items(model, rows, workers=2)
    batches = [pixels for pixels in calls if pixels]
    assert sum(map(len, batches)) == len(rows)
    plan, whole = BatchRunner(model), sum(map(sum, batches))
    limit = plan.pixel_limit(9_000_000)
    assert whole > 3 * limit and len(rows) * 16 < plan.budget, "by tokens alone it would be one batch"
    assert all(sum(pixels) <= limit or len(pixels) == 1 for pixels in batches)
    assert [9_000_000] in batches, "an image above the limit goes alone"
    assert len(batches) < 2 * whole / limit, "and batches are filled"
    alone = np.stack([model.encode([row.to_input() if as_item else row])[0] for row in rows])
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_images_that_are_large_for_their_model_share_a_batch():
    """One by one they would cost a pass each; together they may hold a bounded number of pixels."""
    plan = BatchRunner(tiny_embedder())
    small, photo, huge = (plan.pixel_limit(side**2) // side**2 for side in (56, 448, 1600))
    assert (small, photo, huge) == (318, 16, 3)
