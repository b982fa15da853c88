"""What takes no video refuses it by name: the text of such an item is never taken for the whole."""

from __future__ import annotations

import re

from PIL import Image

from unime_st.data import Item
from unime_st.judging import Group, HttpJudge, PairError
from unime_st.report.html import show_item

CLIP = Item("a red circle", video=[Image.new("RGB", (8, 8), color) for color in ("red", "blue")])


def test_a_judge_behind_a_server() -> None:
    judge = HttpJudge("http://127.0.0.1:9/v1", "m")
    errors: list[PairError] = []
    judge.score([Group("a", [CLIP]), Group(CLIP, ["a"])], errors=errors)
    assert len(errors) == 2
    for error in errors:
        assert re.search(
            r"a judge behind a server takes texts and images, and Item\(text='a red .* a video", error.reason
        )


def test_a_gallery_shows_a_strip_of_frames() -> None:
    shown = str(show_item(CLIP))
    assert shown.count("<img") == 2 and "a red circle" in shown
