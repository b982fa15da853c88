"""Rows and frames of the video sets of MMEB-V2 in a local folder, and their check before anything is encoded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mteb_tasks.local_data import image_fault, stat_signature
from mteb_tasks.mmeb.content_digest import files_digest
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb_v2.data_folder import DataFolder, archive_parts, unpacked
from mteb_tasks.mmeb_v2.video_rows import ParsedRow, parse_row
from mteb_tasks.mmeb_v2.video_sets import MVBENCH_CONFIGS, VideoSet
from unime_st.data.images import BadImageError
from unime_st.data.videos import MAX_FRAMES, VideoRef, frame_names, missing_frame
from unime_st.files import digest

_THREADS = 8


@dataclass(frozen=True)
class VideoRows:
    """A set with its rows parsed and its folders found.

    Args:
        row: The set.
        rows: The rows.
        where: File and number of each row, for messages.
        frames: Folder of the frames of the set.
        configs: Configs of the hub dataset that are there.
    """

    row: VideoSet
    rows: list[ParsedRow]
    where: list[str]
    frames: Path
    configs: int = 1

    def clips(self, number: int) -> tuple[list[str], list[str]]:
        """Folders of the candidates of a row, and the right ones among them.

        Raises:
            MMEBDataError: If the folder of a moment row does not hold exactly one right clip.
        """
        found = self.rows[number]
        if self.row.layout != "moment":
            return list(found.folders), list(found.right)
        folder = self.frames / str(found.video)
        if not folder.is_dir():
            raise MMEBDataError(f"{self.where[number]}: the folder {folder} is missing")
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name != "query")
        right = [name for name in names if name.startswith("positive")]
        if len(right) != 1:
            raise MMEBDataError(f"{self.where[number]}: {folder} has {len(right)} folders positive*, expected one")
        return [f"{found.video}/{name}" for name in names], [f"{found.video}/{right[0]}"]

    def query_video(self, number: int) -> str | None:
        """Folder of the query's video."""
        video = self.rows[number].video
        return f"{video}/query" if video is not None and self.row.layout == "moment" else video

    def name(self, folder: str) -> str:
        """Name of a candidate that is a video, as the released code has it."""
        return folder if self.row.layout == "retrieval" else f"video-tasks/frames/{self.row.frames}/{folder}"

    def video(self, folder: str, num_frames: int) -> VideoRef:
        """Frames of a video that the protocol takes: of MomentSeeker all, up to 64."""
        most = MAX_FRAMES if self.row.layout == "moment_seeker" else num_frames
        return VideoRef.of_folder(self.frames / folder, most)


def tables_of(root: Path, row: VideoSet) -> dict[str, list[Path]]:
    """Find the tables of a set.

    Args:
        root: Folder of the data.
        row: The set.

    Returns:
        Parquet files by config; empty where there are none.
    """
    found = {}
    for config in MVBENCH_CONFIGS if row.key == "MVBench" else [row.config]:
        inner = [config, f"data/{config}", *([".", "data"] if config == row.config else [])]
        folders = [base / row.hub / name for base in (root / "annotations", root) for name in inner]
        tables = (sorted(folder.glob(f"{row.split}*.parquet")) for folder in folders)
        if files := next(filter(None, tables), None):
            found[config] = files
    return found


def frames_folder(root: Path, row: VideoSet, *, unpack: bool = True) -> Path | None:
    """Find the folder of the frames of a set, in the archive that holds it if need be.

    Args:
        root: Folder of the data.
        row: The set.
        unpack: Whether an archive may be unpacked.

    Returns:
        The folder; None where there is none.
    """
    bases = [root / "video-tasks" / "frames", root / "frames", root / "video-tasks", root]
    for base in bases:
        if (base / row.frames).is_dir():
            return base / row.frames
    group, _, name = row.frames.partition("/")
    for base in bases if unpack else []:
        if parts := archive_parts(base / f"{group}.tar.gz"):
            folder = unpacked(parts)
            return next((found for found in (folder / row.frames, folder / name) if found.is_dir()), None)
    return None


def data_digest(root: Path, row: VideoSet) -> str:
    """Digest of the tables, and of names, sizes and times of the frames of a set; nothing is unpacked.

    Args:
        root: Folder of the data.
        row: The set.

    Returns:
        12 hexadecimal digits; ``"missing"`` where there are no tables.
    """
    tables = {f"{config} {file.name}": file for config, files in tables_of(root, row).items() for file in files}
    if not tables:
        return "missing"
    try:
        folder = frames_folder(root, row, unpack=False)
        parts = [] if folder else archive_parts(root / "video-tasks" / "frames" / f"{row.frames.split('/')[0]}.tar.gz")
    except MMEBDataError:
        return "missing"  # said aloud when the data are needed
    states = (
        _frame_states(str(folder), _folder_states(folder))
        if folder
        else repr([(part.name, stat_signature(part.stat())) for part in parts])
    )
    return digest(files_digest(tables), states, length=12)


def read_rows(root: Path, row: VideoSet) -> VideoRows:
    """Read and parse the rows of a set.

    Args:
        root: Folder of the data.
        row: The set.

    Raises:
        MMEBDataError: If tables or frames are missing, or a row is faulty; the message names the file and the row.
    """
    DataFolder(root)  # says that it is not a folder
    tables = tables_of(root, row)
    if not tables:
        wanted = root / "annotations" / row.hub / row.config / f"{row.split}.parquet"
        raise MMEBDataError(f"{row.key} is missing: expected {wanted} (docs/mmeb_v2.md lists other layouts)")
    frames = frames_folder(root, row)
    if frames is None:
        raise MMEBDataError(f"{row.key}: the folder {root / 'video-tasks' / 'frames' / row.frames} is missing")
    rows: list[ParsedRow] = []
    where: list[str] = []
    for source, found in _rows(tables):
        if row.first is not None and len(rows) == row.first:
            break
        try:
            parsed = parse_row(row, found)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            reason = f"column {error} is missing" if isinstance(error, KeyError) else str(error)
            raise MMEBDataError(f"{source}: {reason}") from error
        if any(not text.strip() for text in parsed.texts):
            raise MMEBDataError(f"{source}: an option has no text: {list(parsed.names)}")
        rows.append(parsed)
        where.append(source)
    if not rows:
        raise MMEBDataError(f"{next(iter(tables.values()))[0]}: the table has no rows")
    return VideoRows(row, rows, where, frames, len(tables))


def check_video_set(root: Path, row: VideoSet, num_frames: int) -> str:
    """Check the rows of a set and all videos that they name.

    Args:
        root: Folder of the data.
        row: The set.
        num_frames: Number of frames that are sampled of a video.

    Returns:
        Its sizes, and what differs from the published data.

    Raises:
        MMEBDataError: If a row or a video is faulty; the message names the file, the row and the frame.
    """
    data = read_rows(root, row)
    first: dict[str, int] = {}
    for number in range(len(data.rows)):
        query = data.query_video(number)
        for folder in [*([query] if query is not None else []), *data.clips(number)[0]]:
            first.setdefault(folder, number)
        image = data.rows[number].image
        if image is not None and (fault := image_fault(data.frames / image)):
            raise MMEBDataError(f"{data.where[number]}: image {data.frames / image} {fault}")
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = pool.map(lambda folder: _video_fault(data, folder, num_frames), first)
        for (folder, number), fault in zip(first.items(), faults):
            if fault:
                raise MMEBDataError(f"{data.where[number]}: video {data.frames / folder}: {fault}")
    published = f" (published: {row.rows:,})" if len(data.rows) != row.rows else ""
    facts = [f"{len(data.rows):,} rows{published}", f"{len(first):,} videos"]
    if row.key == "MVBench" and data.configs < len(MVBENCH_CONFIGS):
        facts.append(f"{data.configs} of {len(MVBENCH_CONFIGS)} configs")
    return f"{row.key}: " + ", ".join(facts)


def _video_fault(data: VideoRows, folder: str, num_frames: int) -> str | None:
    path, most = data.frames / folder, data.row.most_frames
    if not path.is_dir():
        return "the folder is missing"
    try:
        names = frame_names(path)
        if not names:
            return "the folder has no frames"
        if most is not None and len(names) > most:
            return f"{len(names)} frames are more than {most}"
        start = re.search(r"(\d+)\.\w+$", names[0])
        if start and int(start[1]) > 1:
            return f"the first frame is {names[0]}, so earlier ones are missing"
        if (missing := missing_frame(names)) is not None:
            return f"frame {missing} is missing"
        if data.row.layout == "retrieval" and len(names) < 8:
            return f"{len(names)} frames; the released code takes no video of less than 8 here"
        video = data.video(folder, num_frames)
        video.shape()
    except BadImageError as error:
        return str(error)
    files = (Path(frame.label) for frame in video.frames)
    return next((f"frame {file.name} {fault}" for file in files if (fault := image_fault(file))), None)


def _rows(tables: Mapping[str, list[Path]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """File and number of each row, and the row; those of several configs have a column ``subset``."""
    for config, files in tables.items():
        for file in files:
            try:
                table = pq.read_table(file)
            except (pa.ArrowException, OSError) as error:
                raise MMEBDataError(f"{file}: cannot be read ({error}): download it again") from error
            for number, found in enumerate(table.to_pylist()):
                yield f"{file}: row {number}", {"subset": config, **found}


def _folder_states(folder: Path) -> str:
    """What changes when files come or go in a folder of frames."""
    return repr([(path, os.stat(path).st_mtime_ns) for path, _, _ in os.walk(folder)])


@lru_cache(maxsize=64)
def _frame_states(folder: str, folder_states: str) -> str:
    """Names, sizes and times of all frames; read once in a process for each state of the folders."""
    states = []
    for path, _, names in sorted(os.walk(folder)):
        relative = os.path.relpath(path, folder)
        states += [(relative, name, *stat_signature(os.stat(os.path.join(path, name)))[:2]) for name in sorted(names)]
    return digest(repr(states))
