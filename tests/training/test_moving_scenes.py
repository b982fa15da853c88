"""Order of frames: a small model that is trained on drawn clips that move is lost when their frames are shuffled."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from train_scripts.moving_scenes import MotionArguments, run_motion
from unime_st.data.scenes.motion import DIRECTIONS, _draw, motion_records


def test_directions_of_an_axis_have_the_same_frames() -> None:
    """Only their order tells: the frames of a clip backwards are those of a clip in the other direction."""
    for record in motion_records(8):
        assert record.query.video is not None and record.query.video.shape() == (4, 84, 84)
        first, last = (record.query.video.frames[index].open() for index in (0, -1))
        assert first.tobytes() != last.tobytes() and record.positive not in record.negatives
    for pair in (("left", "right"), ("up", "down")):
        clips = [_draw("red", "circle", DIRECTIONS[name], 4, random.Random(0)) for name in pair]
        one, other = ([frame.tobytes() for frame in clip] for clip in clips)
        assert one == other[::-1] != other


@pytest.mark.slow
def test_shuffled_frames_score_lower(tmp_path: Path) -> None:
    options = MotionArguments(output=str(tmp_path), clips=200, held_out=100, max_steps=120)
    scores = run_motion(options)
    assert scores["ordered"] > 0.7 and scores["ordered"] > scores["shuffled"] + 0.2 > scores["reversed"]
