"""The 36 image tasks of MMEB-V2: the rows of MMEB, images in their native shape; hit rate at 1.

MMEB itself squashes images to a square: its scores are those of another setting, so these tasks have their own names.
"""

from __future__ import annotations

import unicodedata
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mteb_tasks.mmeb.content_digest import files_digest
from mteb_tasks.mmeb.location import ImageFolders, MMEBDataError, parquet_files
from mteb_tasks.mmeb.subsets import IMAGE_TOKEN, SUBSETS, Subset
from mteb_tasks.mmeb.tasks import MMEB_STYLE, MMEB_TASKS, MMEBTask, SubsetTask, official_body
from mteb_tasks.mmeb_v2.citations import MMEB_V2_BIBTEX
from mteb_tasks.mmeb_v2.data_folder import DataFolder, local_root
from mteb_tasks.mmeb_v2.v2_task import MMEBV2Task
from mteb_tasks.retrieval_task import retrieval_split
from unime_st.data.items import Item
from unime_st.files import digest

if TYPE_CHECKING:
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    from unime_st.data.scenes import RetrievalData


class MMEBV2ImageTask(MMEBV2Task, SubsetTask):
    """A subset of MMEB under the settings of MMEB-V2.

    Data come from ``$MMEB_V2_DIR``; where that has no image tasks, from ``$MMEB_EVAL_DIR``; else from the hub.
    """

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        if self.profile.instruction_in == "system":
            asks = {"query": system_turn(self.subset), "document": self.profile.candidates}
            self.metadata = self.metadata.model_copy(update={"prompt": asks})

    def local_root(self) -> Path | None:
        """See `BenchmarkTask.local_root`."""
        root, of_mmeb = local_root(), super().local_root()
        if root is None or of_mmeb is None:
            return root or of_mmeb
        return root if any(parquet_files(root, subset.name) for subset in SUBSETS) else of_mmeb

    def data_digest(self, root: Path) -> str:
        """See `BenchmarkTask.data_digest`."""
        found = super().data_digest(root)
        if found == "missing" or (root / "image-tasks" / self.subset.name).is_dir():
            return found
        try:
            archives = DataFolder(root, unpack=False).image_archives()
        except MMEBDataError:
            return "missing"
        parts = files_digest({part.name: part for part in archives})
        return digest(found, parts, length=12) if archives else found

    def image_folders(self, root: Path) -> ImageFolders:
        """Images of MMEB-V2 may also lie in its archive."""
        unpacked = DataFolder(root).unpacked_images()
        return ImageFolders(root, extra=[root / "image-tasks" / "MMEB", *([unpacked] if unpacked else [])])

    def retrieval_data(self, subset: str, split: str) -> RetrievalData:
        """See `SubsetTask.retrieval_data`; instructions that stand in the system turn are taken off."""
        data = super().retrieval_data(subset, split)
        if self.profile.instruction_in == "system":
            data.queries = {name: self._bare("query", item) for name, item in data.queries.items()}
            data.corpus = {name: self._bare("target", item) for name, item in data.corpus.items()}
        return data

    def split_tables(self, data: RetrievalData) -> RetrievalSplitData:
        """Build the tables; foreign models read texts without the instruction, which mteb gives them apart."""
        queries, candidates = self.profile.encoding(system_turn(self.subset), MMEB_STYLE)
        in_text = self.profile.instruction_in == "text"
        query, target = (
            partial(official_body, self.subset, side) if in_text else None for side in ("query", "target")
        )
        return retrieval_split(
            data,
            self.subset.category,
            query_body=query,
            document_body=target,
            setting=queries,
            document_setting=candidates,
        )

    def protocol(self) -> dict[str, str]:
        """See `MMEBV2Task.protocol`."""
        return self.profile.facts(self.subset.query, self.subset.target)

    def _bare(self, side: str, item: Item) -> Item:
        text = text_alone(self.subset, side, item.text or "")
        return Item(text=text or None, image=item.image)


def instruction(subset: Subset, side: str) -> str:
    """Instruction of a side without its text, as the data of MMEB-V2 store it.

    Args:
        subset: The subset.
        side: ``"query"`` or ``"target"``.

    Example:
        >>> from mteb_tasks.mmeb.subsets import subset_named
        >>> instruction(subset_named("MSCOCO"), "query")
        'Crop the image to to isolate the object labeled as'
    """
    template = subset.query if side == "query" else subset.target
    return template.partition("{}")[0].strip(' "')


def system_turn(subset: Subset) -> str:
    """Instruction of the queries as a system turn: ended by a full stop where it has no punctuation of its own.

    Args:
        subset: The subset.
    """
    asked = instruction(subset, "query")
    return asked if unicodedata.category(asked[-1]).startswith("P") else f"{asked}."


def text_alone(subset: Subset, side: str, text: str) -> str:
    """Take image token and instruction off an official text; the rest is kept verbatim.

    Args:
        subset: The subset.
        side: ``"query"`` or ``"target"``.
        text: The official text.

    Example:
        >>> from mteb_tasks.mmeb.subsets import subset_named
        >>> text_alone(subset_named("OK-VQA"), "query", "<|image_1|>\\nRepresent the given image with the following question: Why?\\n")
        'Why?'
    """
    asked = instruction(subset, side)
    if not asked:
        return text
    return text.removeprefix(IMAGE_TOKEN).strip().removeprefix(asked).strip()


def _task_class(of_mmeb: type[MMEBTask]) -> type[MMEBV2ImageTask]:
    subset = of_mmeb.subset
    metadata = of_mmeb.metadata.model_copy(
        update={
            "name": f"MMEB-V2-{subset.name}",
            "description": (
                f"The {subset.name} subset of MMEB under the settings of MMEB-V2 (images in their native shape): rank the "
                "candidates of each query; the share of queries whose positive comes first."
            ),
            "reference": "https://arxiv.org/abs/2507.04590",
            "bibtex_citation": MMEB_V2_BIBTEX,
        }
    )
    members = {"__doc__": metadata.description, "__module__": __name__, "metadata": metadata}
    members |= {"key": subset.name, "subset": subset}
    return type(subset.class_name.replace("MMEB", "MMEBV2", 1), (MMEBV2ImageTask,), members)


IMAGE_TASKS: tuple[type[MMEBV2ImageTask], ...] = tuple(map(_task_class, MMEB_TASKS))
"""One class for each subset, in the order of the leaderboard."""
