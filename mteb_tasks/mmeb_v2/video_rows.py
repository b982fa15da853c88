"""Rows of the video sets of MMEB-V2: texts, names of videos and candidates as the released code makes them of a row."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mteb_tasks.mmeb_v2.video_sets import MOMENT_SEEKER_IMAGE, MOMENT_SEEKER_TEXT, VideoSet

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ParsedRow:
    """A row without its media.

    Args:
        query: Instruction of the query.
        text: What follows the instruction; empty for nothing.
        video: Name of the folder of the query's video, relative to the frames of the set; None for none.
        image: The same for an image.
        names: Names of the candidates that the row lists; empty where the folder or the whole set does.
        texts: Texts of these candidates.
        folders: Folders of these candidates where they are videos.
        right: Names of the right candidates; empty where the folder tells.
    """

    query: str
    text: str = ""
    video: str | None = None
    image: str | None = None
    names: Sequence[str] = ()
    texts: Sequence[str] = ()
    folders: Sequence[str] = ()
    right: Sequence[str] = ()


def parse_row(row: VideoSet, found: Row) -> ParsedRow:
    """Make texts and names of a row as the released code does.

    Args:
        row: The set.
        found: The row; rows of MVBench have the column ``subset``.

    Raises:
        KeyError: If a column is missing.
        ValueError: If the right answer is none of the options.

    Example:
        >>> from mteb_tasks.mmeb_v2.video_sets import video_set
        >>> row = {"video_name": "a", "question": "is it night", "answer": "no"}
        >>> parse_row(video_set("ActivityNetQA"), row).text
        'is it night? (A) yes; (B) no.'
    """
    if row.layout == "question":
        return _question(row, found)
    if row.layout == "moment_seeker":
        return _moment_seeker(row, found)
    video = str(found[row.video])
    if row.layout == "retrieval":
        text = found[row.text]
        name = _stem(video) if row.key == "DiDeMo" else video
        return ParsedRow(row.query, text if isinstance(text, str) else text[0], folders=[name], right=[name])
    if row.layout == "moment":
        return ParsedRow(row.query, str(found[row.text]), video=_stem(video))
    label = str(found["pos_text"])
    listed = [str(name) for name in found["neg_text"]] if row.layout == "listed_labels" else []
    if listed and label not in listed:
        raise ValueError(f"pos_text {label!r} is not in neg_text")
    return ParsedRow(row.query, video=video, names=listed, texts=listed, right=[label])


def option_text(option: str) -> str:
    """Text of an option without its letter: what follows the first ``". "``, without outer dots and blanks.

    An option without ``". "`` gives its last character, as in the released code.

    Example:
        >>> option_text("C. J. Doe."), option_text("A.no blank")
        ('J. Doe', 'k')
    """
    return option[option.find(". ") :].strip(". ") if ". " in option else option[-1:].strip(". ")


def _question(row: VideoSet, found: Row) -> ParsedRow:
    video, question = str(found[row.video]), str(found[row.text])
    if row.options == "yes_no":
        names = texts = ["yes", "no"]
        text, right, video = f"{question}? (A) yes; (B) no.", str(found["answer"]), f"v_{video}"
    elif row.options in ("lines", "blank"):
        names = list(found["options" if row.options == "lines" else "option"])
        texts = [option_text(option) for option in names]
        text = f"{question}\n" + "\n".join(names) if row.options == "lines" else question + " ".join(names)
        right = names[_position(found["answer"])]
    else:
        listed = list(found["candidates"]) if row.options == "lettered" else [found[f"a{n}"] for n in range(5)]
        lettered = [f"({chr(ord('A') + n)}) {option}" for n, option in enumerate(listed)]
        text = "\n".join([question, "Options:", *lettered]).rstrip()
        names = texts = lettered if row.options == "lettered" else listed
        if row.options == "lettered":
            video = f"{found['subset']}/{video}"
            same = [name for name, option in zip(lettered, listed) if option == found["answer"]]
            right = same[-1] if same else f"(@) {found['answer']}"
        else:
            right = names[int(found["answer"])]
    if right not in names:
        raise ValueError(f"answer {found['answer']!r} is none of the options {names}")
    return ParsedRow(row.query, text, video, names=names, texts=texts, right=[right])


def _moment_seeker(row: VideoSet, found: Row) -> ParsedRow:
    media = str(found[row.video] or "")
    video = _clip_folder(media) if media.endswith(".mp4") else None
    image = f"query_{media}" if media.endswith(".jpg") else None
    query = row.query if video else MOMENT_SEEKER_IMAGE if image else MOMENT_SEEKER_TEXT
    right, wrong = (
        [_clip_folder(clip["output_path"]) for clip in found[f"{side}_frames"]] for side in ("positive", "negative")
    )
    return ParsedRow(query, str(found[row.text]), video, image, folders=[*right, *wrong], right=right)


def _clip_folder(path: str) -> str:
    """Folder of a clip of MomentSeeker: its path up to the first ``.mp4``, with ``_`` for ``/``."""
    return f"video_frames/{path.replace('/', '_').split('.mp4')[0]}"


def _position(answer: object) -> int:
    text = str(answer).strip()
    return int(text) if text.isdecimal() else ord(text) - ord("A")


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]
