"""Token counts before decoding, and batching by length and pixels."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unime_st import Item, UniME
from unime_st.data.images import ImageRef
from unime_st.encoding import TokenCounter, pack, split_by_pixels
from unime_st.encoding.model_inputs import texts_and_sizes
from unime_st.encoding.token_counts import even_budget

FAMILIES = ["qwen2-vl", "qwen2.5-vl", "llava-1.6", "llava-onevision", "unime-v2-2b", "unime-v2", "unime-v1-phi3.5"]
SIZES = [(90, 60), (60, 140), (300, 40), (28, 28), (5000, 10)]


def make_image(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, "red")


@pytest.mark.parametrize("name", FAMILIES)
def test_cost_is_the_length_after_the_processor(embedder: Callable[[str], UniME], name: str):
    model = embedder(name)
    items = [Item("a red circle"), Item("words" + " words" * 30), *(Item(image=make_image(size)) for size in SIZES)]
    items += [Item("both of them", make_image((90, 60)))]
    for prompt in (None, "Find: "):
        expected = [int(model.preprocess([item.to_input()], prompt=prompt)["attention_mask"].sum()) for item in items]
        costs = TokenCounter(model, prompt)(items)
        assert costs[:2].tolist() == expected[:2]
        # Templates say "image" where they say "sentence", and frame images: letters are tokens here.
        assert np.abs(costs[2:] - expected[2:]).max() <= 24
        apart = costs[3:7] - np.array(expected[3:7])
        assert (apart == apart[0]).all(), "images are counted exactly"


def test_parts_of_every_kind_of_input(tmp_path):
    file = tmp_path / "a.png"
    make_image((7, 5)).save(file)
    chat = [{"role": "user", "content": [{"type": "image", "image": str(file)}, {"type": "text", "text": "what"}]}]
    for value in (make_image((7, 5)), str(file), {"image": str(file)}, np.zeros((5, 7, 3), dtype=np.uint8)):
        assert texts_and_sizes(value) == ([], [(7, 5)])
    assert texts_and_sizes(Item("x", file)) == (["x"], [(7, 5)])
    assert texts_and_sizes({"text": str(file)}) == ([str(file)], [])
    assert texts_and_sizes(chat) == (["what"], [(7, 5)])
    assert texts_and_sizes({"role": "user", "content": "what"}) == (["what"], [])
    assert texts_and_sizes({"text": ["a", "b"], "image": [str(file), make_image((1, 2))]}) == (
        ["a", "b"],
        [(7, 5), (1, 2)],
    )
    assert texts_and_sizes("https://example.org/a.png")[1] == [(512, 512)]
    buffer = io.BytesIO()
    make_image((7, 5)).save(buffer, "PNG")
    assert texts_and_sizes(Item(image=buffer.getvalue())) == ([], [(7, 5)])
    assert texts_and_sizes(Item(image=ImageRef(path="absent.png"))) == ([], [])
    assert texts_and_sizes({"image": "absent.png"}) == ([], [])


@given(st.lists(st.integers(0, 3000), max_size=60), st.integers(1, 5000), st.integers(1, 600))
def test_batches_hold_every_row_once_within_the_budget(costs: list[int], budget: int, least: int):
    batches = pack(costs, budget, least=least)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(costs)))
    longest = [costs[batch[0]] for batch in batches]
    assert longest == sorted(costs, reverse=True)[:1] + longest[1:] and longest == sorted(longest, reverse=True)
    for batch in batches:
        lengths = np.array([costs[row] for row in batch])
        assert lengths[0] == lengths.max()
        assert len(batch) == 1 or len(batch) * lengths.max() <= budget
        if len(batch) * lengths.max() >= least + lengths.max():
            assert (lengths >= 0.8 * np.maximum(lengths.max(), 1) - 1).all()


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), max_size=9), st.integers(0, 20))
def test_batches_are_cut_where_their_images_are_too_large(batches: list[list[int]], most: int):
    pixels = [count for batch in batches for count in batch]
    starts = np.cumsum([0, *map(len, batches)])
    rows = [np.arange(start, end) for start, end in itertools.pairwise(starts)]
    parts = split_by_pixels(rows, pixels, most)
    assert [row for part in parts for row in part.tolist()] == list(range(len(pixels)))
    for part, after in zip(parts, [*parts[1:], np.array([], dtype=int)]):
        assert len(part) == 1 or sum(pixels[row] for row in part) <= most
        # Cut only between batches and where one row more would be too much.
        assert part[-1] + 1 in starts or sum(pixels[row] for row in (*part, after[0])) > most


def test_budget_must_be_positive():
    with pytest.raises(ValueError, match="budget must be at least 1 token, got 0"):
        pack([1], 0)
    assert pack([], 10) == []


@pytest.mark.parametrize("count", [5, 6, 7, 12, 13, 40])
@pytest.mark.parametrize("turns", [2, 4])
def test_batches_that_run_side_by_side_are_even(count: int, turns: int) -> None:
    costs = [74] * count
    batches = [len(batch) for batch in pack(costs, even_budget(costs, 1024, turns))]
    assert max(batches) == -(-count // len(batches)) and len(batches) >= min(turns, 3)


def test_small_batches_stay_whole() -> None:
    assert even_budget([10] * 5, 1024, 2) == 1024
    assert even_budget([0] * 5, 1024, 2) == 1024
    assert even_budget([5000] * 5, 1024, 2) == 1024
