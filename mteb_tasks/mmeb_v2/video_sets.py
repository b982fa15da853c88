"""Table of the 18 video sets of MMEB-V2 with their instructions.

Meng et al., VLM2Vec-V2 (arXiv:2507.04590); names, folders, splits and strings as in the released evaluation code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Literal

Layout = Literal["classification", "listed_labels", "question", "retrieval", "moment", "moment_seeker"]
Options = Literal["lettered", "raw", "lines", "blank", "yes_no"]

VIDEO = "Understand the content of the provided video."
CLIP = "Understand the content of the provided video clip."
QUESTION = (
    "Given a video and a question, select the most accurate answer from the provided candidates. Return only the exact "
    "text of your chosen answer. Question: "
)
_MOMENT = "Find the clip that corresponds to the described scene in the given video:"


@dataclass(frozen=True)
class VideoSet:
    """One set.

    Args:
        key: Name on the leaderboard.
        layout: How rows are read, see `mteb_tasks.mmeb_v2.video_rows`.
        frames: Folder of the frames below ``video-tasks/frames/``.
        hub: Dataset of the rows.
        rows: Rows of the published run.
        query: Instruction of the queries.
        candidate: Instruction of candidates that are videos; None where candidates are texts.
        config: Config of the hub dataset.
        split: Split of the hub dataset.
        video: Column with the name of the video.
        text: Column with the text of a query.
        options: How the options of a question are shown.
        first: Rows that count, from the beginning; None for all.
    """

    key: str
    layout: Layout
    frames: str
    hub: str
    rows: int
    query: str
    candidate: str | None = None
    config: str = "default"
    split: str = "test"
    video: str = "video_id"
    text: str = ""
    options: Options = "raw"
    first: int | None = None

    @property
    def task_name(self) -> str:
        """Name of the mteb task."""
        return f"MMEB-V2-{self.key}"

    @property
    def category(self) -> str:
        """mteb's modality code; MomentSeeker, whose queries are of three kinds, has the nearest one."""
        return {"question": "vt2t", "retrieval": "t2v", "moment": "vt2v", "moment_seeker": "vt2v"}.get(
            self.layout, "v2t"
        )

    @property
    def most_frames(self) -> int | None:
        """Frames that a folder may hold; None for the set whose frames are those of its source."""
        return None if self.key == "MVBench" else 64


def _classes(key: str, folder: str, rows: int, query: str, hub: str = "") -> VideoSet:
    return VideoSet(key, "classification", f"video_cls/{folder}", f"VLM2Vec/{hub or key}", rows, query)


def _questions(
    key: str, video: str, rows: int, options: Options, config: str = "default", split: str = "test"
) -> VideoSet:
    return VideoSet(
        key, "question", f"video_qa/{key}", f"VLM2Vec/{key}", rows, QUESTION,
        config=config, split=split, video=video, text="question", options=options,
    )  # fmt: skip


def _retrieval(
    key: str, video: str, text: str, rows: int, query: str, config: str = "default", split: str = "test", hub: str = ""
) -> VideoSet:
    return VideoSet(
        key, "retrieval", f"video_ret/{key}", hub or f"VLM2Vec/{key}", rows, query, VIDEO,
        config=config, split=split, video=video, text=text,
    )  # fmt: skip


def _moments(key: str, folder: str, rows: int) -> VideoSet:
    return VideoSet(
        key, "moment", f"video_mret/{folder}", f"VLM2Vec/{key}", rows, _MOMENT, VIDEO, video="video_path", text="query"
    )


VIDEO_SETS: tuple[VideoSet, ...] = (
    _classes("K700", "K700", 1000, "Recognize the category of the video content.", "Kinetics-700"),
    VideoSet(
        "SmthSmthV2",
        "listed_labels",
        "video_cls/SSv2",
        "VLM2Vec/SmthSmthV2",
        1000,
        "What actions or object interactions are being performed by the person in the video?",
        first=1000,
    ),
    _classes(
        "HMDB51", "HMDB51", 1000, "What actions or objects interactions are the person in the video doing?"
    ),
    _classes(
        "UCF101", "UCF101", 1000, "What activities or sports are being performed by the person in the video?"
    ),
    _classes(
        "Breakfast", "Breakfast", 433, "Recognize the breakfast type that the person is cooking in the video. "
    ),
    _questions("MVBench", "video", 4000, "lettered", split="train"),
    _questions("Video-MME", "videoID", 2700, "lines"),
    _questions("NExTQA", "video", 8564, "raw", config="MC"),
    _questions("EgoSchema", "video_idx", 500, "blank", config="Subset"),
    _questions("ActivityNetQA", "video_name", 1000, "yes_no"),
    _retrieval(
        "DiDeMo", "video", "caption", 1004, "Find a video that includes the following described scenes:"
    ),
    _retrieval(
        "MSR-VTT", "video_id", "caption", 1000,
        "Find a video that contains the following visual content:", config="test_1k",
    ),
    _retrieval(
        "MSVD", "video_id", "caption", 670, "Find the video snippet that corresponds to the given summary:"
    ),
    _retrieval("VATEX", "videoID", "enCap", 4478, "Select a video that fits the description provided:"),
    _retrieval(
        "YouCook2", "id", "sentence", 3179,
        "Find a video that demonstrates the following action while making a recipe:",
        hub="lmms-lab/YouCook2", split="val",
    ),
    _moments("QVHighlight", "QVHighlight", 1083),
    _moments("Charades-STA", "Charades_STA", 727),
    VideoSet(
        "MomentSeeker",
        "moment_seeker",
        "video_mret/MomentSeeker",
        "VLM2Vec/MomentSeeker",
        1602,
        "Find the clip that corresponds to the given sentence and video segment:",
        CLIP,
        video="input_frames",
        text="query",
    ),
)  # fmt: skip
"""All sets in the order of the leaderboard."""

MOMENT_SEEKER_TEXT = "Find the clip that corresponds to the given text:"
MOMENT_SEEKER_IMAGE = "Select the video clip that aligns with the given text and image:"

MVBENCH_CONFIGS = (
    "episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action unexpected_action "
    "object_existence object_interaction object_shuffle moving_direction action_localization scene_transition "
    "action_count moving_count moving_attribute state_change fine_grained_pose character_order egocentric_navigation "
    "counterfactual_inference"
).split()
"""Configs of MVBench in the order of the released code, as far as it is known; the order decides ties only."""


@lru_cache(maxsize=1)
def video_labels() -> dict[str, list[str]]:
    """Labels of the classification sets, all of which are candidates of every query.

    Example:
        >>> {key: len(labels) for key, labels in video_labels().items()}
        {'K700': 700, 'UCF101': 101, 'HMDB51': 51, 'Breakfast': 10}
    """
    content = (files("mteb_tasks.mmeb_v2") / "video_labels.json").read_text(encoding="utf-8")
    return dict(json.loads(content))


def video_set(key: str) -> VideoSet:
    """Return a set by its leaderboard key.

    Raises:
        KeyError: If there is no such set.
    """
    return next(row for row in VIDEO_SETS if row.key == key)
