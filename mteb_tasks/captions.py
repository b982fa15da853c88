"""Short and long captions: Flickr30k, COCO 5k, ShareGPT4V and Urban1K, in both directions.

Data lie in ``$UNIME_EVAL_DIR``, in the layouts they are published in. The score is hit@1: whether a right answer
stands first. mteb's recall@1 divides by all right answers, so that an image with five captions cannot exceed 0.2.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from mteb_tasks.local_data import (
    EVAL_FOLDER_VARIABLE,
    evaluation_folder,
    folder_digest,
    image_fault,
    read_json,
    resolve_within,
    stat_signature,
    with_digest,
)
from mteb_tasks.metadata import task_metadata
from mteb_tasks.retrieval_task import ItemRetrievalTask, retrieval_split
from unime_st.data.items import Item
from unime_st.data.scenes import RetrievalData
from unime_st.files import digest, make_once

if TYPE_CHECKING:
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

CAPTION_PROMPT = "find_caption"
"""Name of the prompt that UniME-V2 puts to images here; UniME v1 has none, its template does it."""
CAPTIONS_PER_IMAGE = 5
LONG_CAPTION_RECORDS = 1000


@dataclass(frozen=True)
class Captioned:
    """An image with its captions."""

    image: Path
    captions: tuple[str, ...]


def read_karpathy(folder: Path) -> Iterator[Captioned]:
    """Read a set of images with five captions each (``royokong/flickr30k_test``, ``royokong/coco_test``).

    Args:
        folder: Holds ``data/*.parquet`` or ``*.parquet`` with the columns ``image`` and ``text``.

    Yields:
        Images with their first five captions. Images are written to files once, so that memory does not grow with
        their number.

    Raises:
        ValueError: If a file cannot be read, or a row has no whole image or fewer captions; names file and row.
    """
    files = sorted(folder.glob("data/*.parquet")) or sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} has no parquet file")
    images = _extracted(files)
    for number, (location, texts) in enumerate(_values(files, "text")):
        captions = tuple((texts or ())[:CAPTIONS_PER_IMAGE])
        if len(captions) < CAPTIONS_PER_IMAGE or not all(text and text.strip() for text in captions):
            raise ValueError(f"{location} has fewer than {CAPTIONS_PER_IMAGE} captions, or an empty one")
        yield Captioned(images / f"{number}.image", captions)


def _values(files: Sequence[Path], column: str) -> Iterator[tuple[str, Any]]:
    """Values of a column, each with the location of its row for messages."""
    for file in files:
        row = 0
        try:
            opened = pq.ParquetFile(file)
            if column not in opened.schema_arrow.names:
                raise ValueError(f"it has no column {column}")
            for batch in opened.iter_batches(batch_size=64, columns=[column]):
                for value in batch[column].to_pylist():
                    yield f"{file}: row {row}", value
                    row += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read ({error}): download it again") from error


def _extracted(files: Sequence[Path]) -> Path:
    """Write the images of parquet files to a folder of the cache, once, and return it."""
    from unime_st.paths import home

    states = [(str(file.resolve()), stat_signature(file.stat())) for file in files]

    def write_images(folder: Path) -> None:
        for number, (where, image) in enumerate(_values(files, "image")):
            file = folder / f"{number}.image"
            if not image or not image.get("bytes"):
                raise ValueError(f"{where} has no image")
            file.write_bytes(image["bytes"])
            if fault := image_fault(file):
                raise ValueError(f"{where}: its image {fault}")

    return make_once(home() / "images" / digest(repr(states), length=16), write_images)


def read_urban1k(folder: Path) -> Iterator[Captioned]:
    """Read ``BeichenZhang/Urban1k``: ``image/<name>.jpg`` with ``caption/<name>.txt``, first line.

    Args:
        folder: Holds ``image`` and ``caption``.

    Yields:
        One image with one caption each, sorted by name.

    Raises:
        ValueError: If an image is broken or has no caption.
    """
    images = sorted((folder / "image").iterdir(), key=lambda path: (len(path.stem), path.stem))
    for image in images:
        caption = folder / "caption" / f"{image.stem}.txt"
        # The official reader keeps the line break of a first line that is not the last one; models see it.
        first = caption.read_text(encoding="utf-8").partition("\n") if caption.is_file() else ("", "", "")
        if not first[0].strip():
            raise ValueError(f"{image} has no caption in {caption}")
        if fault := image_fault(image):
            raise ValueError(f"{image} {fault}")
        yield Captioned(image, (first[0] + first[1],))


def read_sharegpt4v(folder: Path) -> Iterator[Captioned]:
    """Read the first 1000 records of ``share-captioner_coco_lcs_sam_1246k_1107.json``.

    Args:
        folder: Holds the file and, below it, the images it names.

    Yields:
        One image with one long caption each.

    Raises:
        FileNotFoundError: If the file or an image is missing.
        ValueError: If the file, a record or an image is damaged; names the record.
    """
    found = sorted(folder.glob("share-captioner*.json"))
    if not found:
        raise FileNotFoundError(f"{folder} has no share-captioner_coco_lcs_sam_1246k_1107.json")
    for number, record in enumerate(read_json(found[0])[:LONG_CAPTION_RECORDS]):
        try:
            name, caption = record["image"], record["conversations"][1]["value"].replace("\n", " ")
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{found[0]}: record {number} has no image or no second turn ({error!r})") from error
        image = resolve_within(folder, name) or resolve_within(folder / "data", name)
        if image is None:
            raise FileNotFoundError(f"{found[0]}: record {number} names {name}, which is not in {folder}")
        if not caption.strip():
            raise ValueError(f"{found[0]}: record {number} has an empty caption")
        if fault := image_fault(image):
            raise ValueError(f"{found[0]}: record {number}: image {name} {fault}")
        yield Captioned(image, (caption,))


class CaptionRetrieval(ItemRetrievalTask):
    """Images and captions, each to be found by the other.

    Args:
        **kwargs: mteb's task arguments.
    """

    follows_environment = True
    folder_names: ClassVar[tuple[str, ...]]
    read: ClassVar[Callable[[Path], Iterator[Captioned]]]
    to_image: ClassVar[bool]

    def __init__(self, **kwargs: object) -> None:
        if os.environ.get(EVAL_FOLDER_VARIABLE):
            try:
                revision = folder_digest(evaluation_folder(*self.folder_names))
            except FileNotFoundError:
                revision = "missing"  # the error comes when the data are needed
            self.metadata = with_digest(self.metadata, revision)
        super().__init__(**kwargs)

    def retrieval_data(self, subset: str, split: str) -> RetrievalData:
        """Read the pairs: a caption looks for its own image, an image for any text that is one of its captions."""
        images: dict[str, Item] = {}
        captions: dict[str, Item] = {}
        own: dict[str, str] = {}
        for number, one in enumerate(type(self).read(evaluation_folder(*self.folder_names))):
            images[f"i{number}"] = Item(image=one.image)
            for index, text in enumerate(one.captions):
                captions[f"t{number}-{index}"] = Item(text=text)
                own[f"t{number}-{index}"] = f"i{number}"
        if self.to_image:
            return RetrievalData(captions, images, {caption: {image} for caption, image in own.items()})
        by_text: dict[str | None, list[str]] = {}
        for caption, item in captions.items():
            by_text.setdefault(item.text, []).append(caption)
        relevant: dict[str, set[str]] = {}
        for caption, image in own.items():
            relevant.setdefault(image, set()).update(by_text[captions[caption].text])
        return RetrievalData(images, captions, relevant)

    def split_tables(self, data: RetrievalData) -> RetrievalSplitData:
        """Build the tables; our models put their caption prompt to images."""
        return retrieval_split(data, self.metadata.category or "t2i", image_prompt=CAPTION_PROMPT)


@dataclass(frozen=True)
class _Source:
    name: str
    folders: tuple[str, ...]
    read: Callable[[Path], Iterator[Captioned]]
    path: str
    text: str
    reference: str
    bibtex: str
    license: str = "not specified"


_SOURCES = (
    _Source(
        "Flickr30k1k",
        ("flickr30k_test",),
        read_karpathy,
        "royokong/flickr30k_test",
        "short captions; the 1000 test images of Karpathy's split with five captions each",
        "https://aclanthology.org/Q14-1006/",
        r"""
@article{young2014image,
  author = {Young, Peter and Lai, Alice and Hodosh, Micah and Hockenmaier, Julia},
  journal = {Transactions of the Association for Computational Linguistics},
  title = {From image descriptions to visual denotations: New similarity metrics for semantic inference over event descriptions},
  volume = {2},
  year = {2014},
}
""",
    ),
    _Source(
        "COCO5k",
        ("coco_test",),
        read_karpathy,
        "royokong/coco_test",
        "short captions; the 5000 test images of Karpathy's split with their first five captions each",
        "https://arxiv.org/abs/1405.0312",
        r"""
@inproceedings{lin2014microsoft,
  author = {Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James and Perona, Pietro and Ramanan, Deva and Doll{\'a}r, Piotr and Zitnick, C. Lawrence},
  booktitle = {European Conference on Computer Vision},
  title = {Microsoft COCO: Common Objects in Context},
  year = {2014},
}
""",
    ),
    _Source(
        "ShareGPT4V",
        ("shareGPT4v", "ShareGPT4V"),
        read_sharegpt4v,
        "Lin-Chen/ShareGPT4V",
        "long captions; the first 1000 records of the dataset",
        "https://arxiv.org/abs/2311.12793",
        r"""
@article{chen2023sharegpt4v,
  author = {Chen, Lin and Li, Jinsong and Dong, Xiaoyi and Zhang, Pan and He, Conghui and Wang, Jiaqi and Zhao, Feng and Lin, Dahua},
  journal = {arXiv preprint arXiv:2311.12793},
  title = {ShareGPT4V: Improving Large Multi-Modal Models with Better Captions},
  year = {2023},
}
""",
        "cc-by-nc-4.0",
    ),
    _Source(
        "Urban1K",
        ("Urban1k", "Urban1K", "urban1k"),
        read_urban1k,
        "BeichenZhang/Urban1k",
        "long captions; 1000 images of streets",
        "https://arxiv.org/abs/2403.15378",
        r"""
@article{zhang2024long,
  author = {Zhang, Beichen and Zhang, Pan and Dong, Xiaoyi and Zang, Yuhang and Wang, Jiaqi},
  journal = {arXiv preprint arXiv:2403.15378},
  title = {Long-CLIP: Unlocking the Long-Text Capability of CLIP},
  year = {2024},
}
""",
    ),
)


def _task_class(source: _Source, to_image: bool) -> type[CaptionRetrieval]:
    direction = "T2I" if to_image else "I2T"
    name = f"{source.name}{direction}Retrieval"
    metadata = task_metadata(
        name=name,
        description=f"Find the {'image of a caption' if to_image else 'caption of an image'} ({source.text}).",
        category="t2i" if to_image else "i2t",
        dataset={"path": source.path, "revision": "main"},
        reference=source.reference,
        date=("2014-01-01", "2024-12-31"),
        domains=["Web"],
        license=source.license,
        sample_creation="found",
        bibtex_citation=source.bibtex,
    )
    fields = {
        "__doc__": metadata.description,
        "__module__": __name__,
        "metadata": metadata,
        "folder_names": source.folders,
        "read": staticmethod(source.read),
        "to_image": to_image,
    }
    return type(name, (CaptionRetrieval,), fields)


CAPTION_TASKS: tuple[type[CaptionRetrieval], ...] = tuple(
    _task_class(source, to_image) for source in _SOURCES for to_image in (False, True)
)
"""Both directions of the four datasets."""
