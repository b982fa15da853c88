"""What takes no video refuses it by name: the text of such an item is never taken for the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from unime_st.data import Item, PairRecord
from unime_st.data.parquet_shards import ItemWriter
from unime_st.judging import Group
from unime_st.report.html import show_item
from unime_st.scoring.prompts import conversation

CLIP = Item("a red circle", video=[Image.new("RGB", (8, 8), color) for color in ("red", "blue")])


def test_records_and_indexes(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"takes texts and images, and Item\(text='a red circle', video=.*has a video"
    ):
        ItemWriter(tmp_path).add(CLIP)
    assert PairRecord(CLIP, Item("a")).query.video is not None


def test_judges_and_rerankers() -> None:
    for make in (
        lambda: Group(CLIP, [Item("a")]),
        lambda: Group("a", [CLIP]),
        lambda: conversation(Item("a"), [CLIP]),
    ):
        with pytest.raises(ValueError, match="a judge or reranker takes texts and images"):
            make()


def test_a_gallery_shows_a_strip_of_frames() -> None:
    shown = str(show_item(CLIP))
    assert shown.count("<img") == 2 and "a red circle" in shown
