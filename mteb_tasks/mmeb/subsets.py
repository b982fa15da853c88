"""The 36 subsets of MMEB: what every row must look like.

Jiang et al., VLM2Vec (arXiv:2410.05160), tables 1 and 9; instructions as they stand in the data, typing errors
included.
"""

from __future__ import annotations

from dataclasses import dataclass

BENCHMARK = "MMEB(eng, v1)"
"""Name of the benchmark; mteb's ``-b`` takes it, ``-t`` takes the aggregate task ``MMEB``."""
IMAGE_TOKEN = "<|image_1|>"
VIDEO_TOKEN = "<|video_1|>"
META_TASKS = ("classification", "vqa", "retrieval", "grounding")


@dataclass(frozen=True)
class Subset:
    """One subset.

    Args:
        name: Official name, also the folder name.
        meta: Meta-task, one of `META_TASKS`.
        out_of_domain: Whether its training split is absent from MMEB-train.
        category: mteb's modality code.
        candidates: Candidates of each query.
        query: Instruction of the query; ``{}`` stands for its body.
        target: Instruction of the candidates, "" for plain texts; ``{}`` stands for their body.
        stray_token: Whether the queries carry an image token although they have no image.

    Example:
        >>> subset_named("OK-VQA").body("query", "<|image_1|>\\nRepresent the given image with the following question: Why?\\n")
        'Why?'
    """

    name: str
    meta: str
    out_of_domain: bool
    category: str
    candidates: int
    query: str
    target: str = ""
    stray_token: bool = False

    @property
    def task_name(self) -> str:
        """Name of the mteb task."""
        return f"MMEB-{self.name}"

    @property
    def class_name(self) -> str:
        """Name of the task class; the grounding set on MSCOCO must not be taken for the retrieval sets."""
        name = "MSCOCOGrounding" if self.name == "MSCOCO" else self.name
        parts = name.replace("-", "_").split("_")
        return "MMEB" + "".join(part[:1].upper() + part[1:] for part in parts)

    def has_image(self, side: str) -> bool:
        """Whether the items of a side ("query" or "target") come with an image."""
        return "i" in self.category.split("2")[side == "target"]

    def body(self, side: str, text: str) -> str | None:
        """Take the official text of an item apart.

        Args:
            side: "query" or "target".
            text: The official text.

        Returns:
            What stands in place of ``{}`` in the instruction ("" when there is no body), or None when the text is not
            an instance of the instruction.
        """
        template = self.query if side == "query" else self.target
        if not template:
            return None if IMAGE_TOKEN in text else text
        rest = text.removeprefix(IMAGE_TOKEN).strip()
        before, _, after = template.partition("{}")
        before, end = before.strip(), len(rest) - len(after)
        if not rest.startswith(before) or not rest.endswith(after, len(before)):
            return None
        body = rest[len(before) : end]
        if "{}" not in template and body:
            return None
        expects_token = self.has_image(side) or (side == "query" and self.stray_token and IMAGE_TOKEN in text)
        if text.startswith(IMAGE_TOKEN) != expects_token:
            return None
        return body.strip()


_QUESTION = "Represent the given image with the following question: {}"
_CLASSIFY = "Represent the given image for classification"
_SCENE = "Identify the scene shown in the image"
_OBJECT = "Identify the object shown in the image"
_IMAGE = "Represent the given image."
_WIKIPEDIA = "Represent the given Wikipedia image with related text information: {}"
_CROP = "Represent the given cropped image of the object"


def _set(name: str, meta: str, category: str, candidates: int, query: str, target: str = "", *flags: str) -> Subset:
    return Subset(name, meta, "ood" in flags, category, candidates, query, target, "stray" in flags)


SUBSETS: tuple[Subset, ...] = (
    _set("ImageNet-1K", "classification", "i2t", 1000, _CLASSIFY),
    _set(
        "N24News",
        "classification",
        "it2t",
        24,
        "Represent the given news image with the following caption for domain classification: {}",
    ),
    _set(
        "HatefulMemes",
        "classification",
        "i2t",
        2,
        "Represent the given image for binary classification to determine whether it constitutes hateful speech or not",
    ),
    _set("VOC2007", "classification", "i2t", 20, _OBJECT),
    _set("SUN397", "classification", "i2t", 397, _SCENE),
    _set("Place365", "classification", "i2t", 365, _SCENE, "", "ood"),
    _set("ImageNet-A", "classification", "i2t", 1000, _CLASSIFY, "", "ood"),
    _set("ImageNet-R", "classification", "i2t", 200, _CLASSIFY, "", "ood"),
    _set("ObjectNet", "classification", "i2t", 313, _OBJECT, "", "ood"),
    _set("Country211", "classification", "i2t", 211, "Identify the country depicted in the image", "", "ood"),
    _set("OK-VQA", "vqa", "it2t", 1000, _QUESTION),
    _set("A-OKVQA", "vqa", "it2t", 1000, _QUESTION),
    _set("DocVQA", "vqa", "it2t", 1000, _QUESTION),
    _set("InfographicsVQA", "vqa", "it2t", 1000, _QUESTION),
    _set("ChartQA", "vqa", "it2t", 1000, _QUESTION),
    _set("Visual7W", "vqa", "it2t", 1000, _QUESTION),
    _set("ScienceQA", "vqa", "it2t", 1000, _QUESTION, "", "ood"),
    _set("VizWiz", "vqa", "it2t", 1000, _QUESTION, "", "ood"),
    _set("GQA", "vqa", "it2t", 1000, _QUESTION, "", "ood"),
    _set("TextVQA", "vqa", "it2t", 1000, _QUESTION, "", "ood"),
    _set(
        "VisDial",
        "retrieval",
        "t2i",
        1000,
        "Represent the given dialogue about an image, which is used for image retrieval: {}",
        "Represent the given image",
    ),
    _set(
        "CIRR",
        "retrieval",
        "it2i",
        1000,
        "Given an image, find a similar everyday image with the described changes: {}",
        _IMAGE,
    ),
    _set("VisualNews_t2i", "retrieval", "t2i", 1000, "Retrieve an image of this news caption. {}", _IMAGE),
    _set("VisualNews_i2t", "retrieval", "i2t", 1000, "Find a caption for the news in the given photo."),
    _set(
        "MSCOCO_t2i",
        "retrieval",
        "t2i",
        1000,
        "Find me an everyday image that matches the given caption: {}",
        _IMAGE,
    ),
    _set("MSCOCO_i2t", "retrieval", "i2t", 1000, "Find an image caption describing the given everyday image."),
    _set(
        "NIGHTS", "retrieval", "i2i", 1000, "Find a day-to-day image that looks similar to the provided image.", _IMAGE
    ),
    _set(
        "WebQA",
        "retrieval",
        "t2it",
        1000,
        "Find a Wikipedia image that answers this question: {}",
        _WIKIPEDIA,
        "stray",
    ),
    _set(
        "FashionIQ",
        "retrieval",
        "it2i",
        1000,
        "Find an image to match the fashion image and style note: {}",
        _IMAGE,
        "ood",
    ),
    _set(
        "Wiki-SS-NQ",
        "retrieval",
        "t2i",
        1000,
        "Find the document image that can answer the given query: {}",
        "Represent the given image",
        "ood",
    ),
    _set(
        "OVEN",
        "retrieval",
        "it2it",
        1000,
        "Retrieve a Wikipedia image-description pair that provides evidence for the question of this image: {}",
        _WIKIPEDIA,
        "ood",
    ),
    _set(
        "EDIS",
        "retrieval",
        "t2it",
        1000,
        "Find a news image that matches the provided caption: {}",
        "Represent the given image with related text information: {}",
        "ood",
        "stray",
    ),
    _set("MSCOCO", "grounding", "it2i", 1000, 'Crop the image to to isolate the object labeled as "{}"', _CROP),
    _set(
        "RefCOCO",
        "grounding",
        "it2i",
        1000,
        'Select the portion of the image that follows the language expressions. "{}"',
        _CROP,
        "ood",
    ),
    _set(
        "RefCOCO-Matching",
        "grounding",
        "it2it",
        1000,
        'Select the portion of the image that follows the language expressions: "{}"',
        'Select the portion of the image that follows the language expressions: "{}"',
        "ood",
    ),
    _set(
        "Visual7W-Pointing",
        "grounding",
        "it2i",
        1000,
        'Select the portion of the image that answers the question "{}"',
        _CROP,
        "ood",
    ),
)
"""All subsets, in the order of the papers' tables."""


def subset_named(name: str) -> Subset:
    """Look a subset up by its official name.

    Args:
        name: For instance ``"OK-VQA"``.

    Returns:
        The subset.

    Raises:
        KeyError: If MMEB has no subset of that name.
    """
    for subset in SUBSETS:
        if subset.name == name:
            return subset
    raise KeyError(f"MMEB has no subset {name!r}; it has {', '.join(subset.name for subset in SUBSETS)}")
