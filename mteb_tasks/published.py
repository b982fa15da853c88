"""Published scores, to stand beside one's own.

UniME (arXiv:2504.17432) and UniME-V2 (arXiv:2510.13515), precision at 1 in per cent. Retrieval columns carry the
direction that the numbers belong to (the papers' tables swap them).
"""

from __future__ import annotations

MMEB: dict[str, dict[str, float]] = {
    "unime-v1-phi3.5": {
        "classification": 54.8,
        "vqa": 55.9,
        "retrieval": 64.5,
        "grounding": 81.8,
        "ind": 68.2,
        "ood": 52.7,
        "mean": 64.2,
    },
    "unime-v1-llava1.6": {
        "classification": 60.6,
        "vqa": 52.9,
        "retrieval": 67.9,
        "grounding": 85.1,
        "ind": 68.4,
        "ood": 57.9,
        "mean": 66.6,
    },
    "unime-v1-llava-ov": {
        "classification": 66.8,
        "vqa": 66.6,
        "retrieval": 70.5,
        "grounding": 90.9,
        "ind": 74.6,
        "ood": 65.8,
        "mean": 70.7,
    },
    "unime-v2-2b": {
        "classification": 62.1,
        "vqa": 56.3,
        "retrieval": 68.0,
        "grounding": 72.7,
        "ind": 67.4,
        "ood": 58.9,
        "mean": 63.6,
    },
    "unime-v2-7b": {
        "classification": 64.0,
        "vqa": 60.1,
        "retrieval": 73.1,
        "grounding": 82.8,
        "ind": 72.0,
        "ood": 63.0,
        "mean": 68.0,
    },
    "unime-v2": {
        "classification": 65.3,
        "vqa": 67.6,
        "retrieval": 72.9,
        "grounding": 90.2,
        "ind": 74.8,
        "ood": 66.7,
        "mean": 71.2,
    },
    "unime-v2-2b+reranker": {"mean": 67.6},
    "unime-v2-7b+reranker": {"mean": 69.6},
}
"""Means over MMEB, by alias and by the names of `mteb_tasks.mmeb.tasks.mean_scores`."""

MMEB_TASKS: dict[str, dict[str, float]] = {
    "unime-v1-llava1.6": dict(
        zip(
            (
                "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet Country211 "
                "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA "
                "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA FashionIQ Wiki-SS-NQ "
                "OVEN EDIS MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing"
            ).split(),
            (
                71.3,
                79.5,
                64.6,
                90.4,
                75.9,
                45.6,
                45.5,
                78.4,
                36.4,
                18.7,
                68.3,
                58.7,
                67.6,
                37.0,
                33.4,
                51.7,
                40.5,
                42.7,
                63.6,
                65.2,
                79.7,
                52.2,
                74.8,
                78.8,
                74.9,
                73.8,
                66.2,
                89.8,
                16.5,
                66.6,
                55.7,
                86.2,
                76.5,
                89.3,
                90.6,
                84.1,
            ),
        )
    )
}
"""Scores of single subsets, where a paper's table could be verified."""

_CAPTION_TASKS = (
    "Flickr30k1kT2IRetrieval",
    "Flickr30k1kI2TRetrieval",
    "COCO5kT2IRetrieval",
    "COCO5kI2TRetrieval",
    "ShareGPT4VT2IRetrieval",
    "ShareGPT4VI2TRetrieval",
    "Urban1KT2IRetrieval",
    "Urban1KI2TRetrieval",
)
CAPTIONS: dict[str, dict[str, float]] = {
    alias: dict(zip(_CAPTION_TASKS, scores))
    for alias, scores in {
        "unime-v1-phi3.5": (77.0, 88.2, 49.8, 66.8, 92.1, 96.4, 92.7, 95.1),
        "unime-v1-llava1.6": (81.9, 93.4, 53.7, 70.1, 93.9, 97.2, 95.2, 95.9),
        "unime-v1-llava-ov": (83.3, 94.4, 54.8, 74.0, 93.9, 89.3, 94.3, 95.5),
        "unime-v2-2b": (79.8, 89.9, 53.7, 65.1, 91.6, 94.2, 95.6, 92.2),
        "unime-v2-7b": (84.6, 93.5, 57.3, 70.3, 94.3, 95.2, 97.2, 96.3),
        "unime-v2": (85.5, 93.7, 60.9, 74.1, 95.1, 94.1, 96.3, 96.7),
    }.items()
}
"""Share of queries with a right answer at rank 1, by alias and task."""

COMPOSITION: dict[str, dict[str, float]] = {
    "unime-v1-phi3.5": {"replace": 90.1, "swap": 70.9, "add": 93.3},
    "unime-v1-llava1.6": {"replace": 89.0, "swap": 71.5, "add": 94.4},
    "unime-v1-llava-ov": {"replace": 80.5, "swap": 65.5, "add": 82.2},
    "unime-v2-2b": {"replace": 70.9, "swap": 51.2, "add": 70.2},
    "unime-v2-7b": {"replace": 77.8, "swap": 62.2, "add": 79.0},
    "unime-v2": {"replace": 88.6, "swap": 73.7, "add": 90.5},
}
"""SugarCrepe's group means, by alias."""
