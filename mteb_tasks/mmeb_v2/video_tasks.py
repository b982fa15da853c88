"""The 18 video tasks of MMEB-V2: classification, question answering, retrieval, moment retrieval; hit rate at 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mteb_tasks.metadata import task_metadata
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb.subsets import IMAGE_TOKEN, VIDEO_TOKEN
from mteb_tasks.mmeb_v2.citations import MMEB_V2_BIBTEX
from mteb_tasks.mmeb_v2.data_folder import MEDIA_DATASET, MEDIA_REVISION, MMEB_V2_FOLDER_VARIABLE, local_root
from mteb_tasks.mmeb_v2.profiles import joined, spoken
from mteb_tasks.mmeb_v2.v2_task import MMEBV2Task
from mteb_tasks.mmeb_v2.video_folder import VideoRows, check_video_set, data_digest, read_rows, tables_of
from mteb_tasks.mmeb_v2.video_rows import ParsedRow
from mteb_tasks.mmeb_v2.video_sets import MOMENT_SEEKER_IMAGE, MOMENT_SEEKER_TEXT, VIDEO_SETS, VideoSet, video_labels
from mteb_tasks.retrieval_task import retrieval_split
from unime_st.data.items import Item
from unime_st.data.scenes import RetrievalData

if TYPE_CHECKING:
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    from mteb_tasks.mmeb.base_tasks import BenchmarkTask


class VideoTask(MMEBV2Task):
    """A video set of MMEB-V2. Frames come from ``$MMEB_V2_DIR``; they are not fetched from the hub."""

    row: ClassVar[VideoSet]

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        asks = {"query": self._asked(self.row.query), "document": self.profile.candidates or self.row.candidate or ""}
        self.metadata = self.metadata.model_copy(update={"prompt": asks})

    def local_root(self) -> Path | None:
        """See `BenchmarkTask.local_root`."""
        return local_root()

    def hub_root(self, run: Sequence[BenchmarkTask]) -> Path:
        """Refuse: the frames of all sets take more than 100 GB; see `BenchmarkTask.hub_root`."""
        raise MMEBDataError(
            f"{self.row.key}: frames are not fetched from the hub. Download video-tasks/frames of {MEDIA_DATASET} and "
            f"{self.row.hub}, and set {MMEB_V2_FOLDER_VARIABLE} (see docs/mmeb_v2.md)"
        )

    def data_digest(self, root: Path) -> str:
        """See `BenchmarkTask.data_digest`."""
        return data_digest(root, self.row)

    def is_missing(self, root: Path) -> bool:
        """See `BenchmarkTask.is_missing`."""
        return not tables_of(root, self.row)

    def check_data(self, root: Path) -> str:
        """See `BenchmarkTask.check_data`."""
        return check_video_set(root, self.row, self.profile.frames)

    def retrieval_data(self, subset: str, split: str) -> RetrievalData:
        """Read queries and candidates; candidates of one name are one candidate, as in the released code."""
        data = read_rows(self.checked_root(), self.row)
        queries, corpus = {}, {}
        relevant: dict[str, set[str]] = {}
        candidates: dict[str, list[str]] = {}
        for number, found in enumerate(data.rows):
            query = str(number)
            queries[query] = self._query(data, number, found)
            clips, right = data.clips(number)
            for folder in clips:
                name = data.name(folder)
                if name not in corpus:
                    text = self._text(self.row.candidate or "", video=True)
                    corpus[name] = Item(text, video=data.video(folder, self.profile.frames))
            for name, text in zip(found.names, found.texts):
                corpus.setdefault(name, Item(text))
            if self.row.layout == "classification":
                corpus.setdefault(found.right[0], Item(found.right[0]))
            relevant[query] = {data.name(folder) for folder in right} if clips else set(found.right)
            candidates[query] = [data.name(folder) for folder in clips] or list(found.names)
        for label in video_labels().get(self.row.key, ()):
            corpus.setdefault(label, Item(label))
        ranks_all = self.row.layout in ("classification", "retrieval")
        return RetrievalData(queries, corpus, relevant, None if ranks_all else candidates)

    def split_tables(self, data: RetrievalData) -> RetrievalSplitData:
        """Build the tables; foreign models read texts without the instruction, which mteb gives them apart."""
        settings = self.profile.video_encoding(self._asked(self.row.query))
        in_text = self.profile.instruction_in == "text"
        return retrieval_split(
            data,
            self.row.category,
            query_body=_body if in_text else None,
            document_body=_body if in_text and self.row.candidate else None,
            setting=settings[0],
            document_setting=settings[1],
        )

    def protocol(self) -> dict[str, str]:
        """See `MMEBV2Task.protocol`; with the number of frames."""
        facts = self.profile.facts(self.row.query, self.row.candidate or "")
        return {**facts, "profile": self.profile.video_name, "frames": str(self.profile.frames)}

    def _asked(self, instruction: str) -> str:
        return spoken(instruction) if self.profile.instruction_in == "system" else instruction

    def _query(self, data: VideoRows, number: int, found: ParsedRow) -> Item:
        folder = data.query_video(number)
        video = None if folder is None else data.video(folder, self.profile.frames)
        image = None if found.image is None else data.frames / found.image
        text = self._text(found.query, found.text, image=image is not None, video=video is not None)
        return Item(text, image, video)

    def _text(self, instruction: str, text: str = "", *, image: bool = False, video: bool = False) -> str | None:
        if self.profile.instruction_in == "text":
            return joined(instruction, text, image=image, video=video)
        return text or (None if image or video else instruction)


_INSTRUCTIONS = (
    *sorted({row.query for row in VIDEO_SETS} | {row.candidate for row in VIDEO_SETS if row.candidate}),
    MOMENT_SEEKER_TEXT,
    MOMENT_SEEKER_IMAGE,
)


def _body(text: str) -> str:
    """Text of an item without its media token and instruction."""
    bare = text.removeprefix(f"{VIDEO_TOKEN} ").removeprefix(f"{IMAGE_TOKEN} ")
    for instruction in _INSTRUCTIONS:
        if bare.startswith(instruction):
            return bare.removeprefix(instruction).removeprefix(" ")
    return bare


def _task_class(row: VideoSet) -> type[VideoTask]:
    metadata = task_metadata(
        name=row.task_name,
        description=(
            f"The video set {row.key} of MMEB-V2 by the protocol of VLM2Vec-V2: rank the candidates of each query; the "
            "share of queries whose positive comes first."
        ),
        category=row.category,
        reference="https://arxiv.org/abs/2507.04590",
        date=("2010-01-01", "2025-07-07"),
        domains=["Web"],
        license="not specified",
        sample_creation="found",
        task_subtypes=[],
        dataset={"path": MEDIA_DATASET, "revision": MEDIA_REVISION},
        bibtex_citation=MMEB_V2_BIBTEX,
        prompt={"query": row.query, "document": row.candidate or ""},
    )
    members = {"__doc__": metadata.description, "__module__": __name__, "key": row.key, "row": row}
    return type(f"MMEBV2{row.key.replace('-', '')}", (VideoTask,), {**members, "metadata": metadata})


VIDEO_TASKS: tuple[type[VideoTask], ...] = tuple(map(_task_class, VIDEO_SETS))
"""One class for each set, in the order of the leaderboard."""
