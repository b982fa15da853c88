"""SugarCrepe by its seven categories, with the strict comparison of the original."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mteb_tasks.captions import CAPTION_PROMPT
from mteb_tasks.local_data import (
    EVAL_FOLDER_VARIABLE,
    evaluation_folder,
    folder_digest,
    image_fault,
    read_json,
    resolve_within,
    with_digest,
    without_digest,
)
from mteb_tasks.metadata import task_metadata
from mteb_tasks.preference_task import CaptionPreferenceTask
from unime_st.data.items import Item
from unime_st.data.scenes import Foil

CATEGORIES = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")


def read_category(folder: Path, category: str) -> list[Foil]:
    """Read one category.

    Args:
        folder: Holds ``data/<category>.json`` (the original's files) and COCO's ``val2017/``.
        category: One of `CATEGORIES`.

    Returns:
        The pairs, in the order of their numbers.

    Raises:
        FileNotFoundError: If the file or an image is missing; names the pair.
        ValueError: If the file, a pair or an image is damaged; names the pair.
    """
    file = folder / "data" / f"{category}.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it belongs to github.com/RAIVNLab/sugar-crepe")
    pairs, found, whole = read_json(file), [], set[Path]()
    for number in sorted(pairs, key=int):
        try:
            name, caption, foil = (pairs[number][key] for key in ("filename", "caption", "negative_caption"))
        except (LookupError, TypeError) as error:
            raise ValueError(f"{file}: pair {number} lacks a field ({error!r})") from error
        image = resolve_within(folder / "val2017", name)
        if image is None:
            raise FileNotFoundError(f"{file}: the image {name} of pair {number} is not in {folder / 'val2017'}")
        if image not in whole and (fault := image_fault(image)):
            raise ValueError(f"{file}: the image {name} of pair {number} {fault}")
        whole.add(image)
        found.append(Foil(Item(image=image), caption, foil, category))
    return found


class SugarCrepeByCategory(CaptionPreferenceTask):
    """Tell the caption of a COCO image from a foil; one subset per category, a tie is wrong."""

    image_prompt = CAPTION_PROMPT
    metadata = task_metadata(
        name="SugarCrepeByCategory",
        description=(
            "Tell the caption of an image from a foil that replaces, swaps or adds an object, attribute or relation. "
            "Strict comparison as in the original, seven categories, 7511 pairs."
        ),
        category="i2t",
        dataset={"path": "RAIVNLab/sugar-crepe", "revision": "546eb51ecd55859f1d1888636bb9399a8df4cd92"},
        reference="https://arxiv.org/abs/2306.14610",
        type="Compositionality",
        eval_langs={category: ["eng-Latn"] for category in CATEGORIES},
        main_score="text_acc",
        date=("2022-01-01", "2022-12-31"),
        domains=["Encyclopaedic"],
        task_subtypes=["Caption Pairing"],
        license="mit",
        annotations_creators="expert-annotated",
        bibtex_citation=r"""
@article{hsieh2024sugarcrepe,
  author = {Hsieh, Cheng-Yu and Zhang, Jieyu and Ma, Zixian and Kembhavi, Aniruddha and Krishna, Ranjay},
  journal = {Advances in neural information processing systems},
  title = {Sugarcrepe: Fixing hackable benchmarks for vision-language compositionality},
  volume = {36},
  year = {2024},
}
""",
    )

    follows_environment = True

    def __init__(self, **kwargs: Any) -> None:
        if os.environ.get(EVAL_FOLDER_VARIABLE):
            try:
                folder = evaluation_folder("sugarcrepe", "sugar-crepe")
                revision = folder_digest(folder / "data", folder / "val2017")
            except FileNotFoundError:
                revision = "missing"  # the error comes when the data are needed
            self.metadata = with_digest(self.metadata, revision)
        super().__init__(**kwargs)

    def foils(self, category: str, split: str) -> Sequence[Foil]:
        """Read the pairs of one category."""
        return read_category(evaluation_folder("sugarcrepe", "sugar-crepe"), without_digest(category))
