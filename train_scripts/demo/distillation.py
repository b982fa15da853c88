"""What stage 1 is for: rank agreement with its teacher and retrieval of paraphrases, before and after later training."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from train_scripts.demo.pipeline import teacher_folder
from train_scripts.demo.results import DISTILLED
from train_scripts.demo.seed import Seed
from train_scripts.demo.settings import DemoArguments
from unime_st.data.scenes.language import short_caption
from unime_st.data.scenes.twins import twins
from unime_st.data.scenes.world import Description
from unime_st.files import write_json
from unime_st.model import UniME


def measure_distillation(arguments: DemoArguments, seed: int, results: Path) -> None:
    """Measure the models of a seed with and without stage 1 on texts alone.

    Args:
        arguments: The demo's options.
        seed: The seed.
        results: JSON file to write: rows of seed, model, metric, value and standard error over captions.
    """
    run = Seed(arguments, seed)
    first, second = paraphrases(5 * arguments.eval_size // 8, arguments.eval_seed)
    teacher = SentenceTransformer(teacher_folder(arguments.teacher))
    vectors = teacher.encode(first, normalize_embeddings=True)
    rows = []
    for name in DISTILLED:
        model = UniME("unime-tiny" if name == "base" else run.path(name))
        ours, others = (model.encode(texts, normalize_embeddings=True) for texts in (first, second))
        found = {"agreement": rank_agreement(ours @ ours.T, vectors @ vectors.T), "paraphrases": _hits(ours, others)}
        for metric, values in found.items():
            error = float(values.std(ddof=1) / math.sqrt(len(values)))
            rows.append({"seed": seed, "model": name, "metric": metric, "value": float(values.mean()), "error": error})
    write_json(results, {"rows": rows})


def paraphrases(size: int, seed: int) -> tuple[list[str], list[str]]:
    """Draw captions of held-out scenes, each in two wordings.

    Args:
        size: How many, no two of the same content.
        seed: Which held-out scenes are drawn.

    Returns:
        The first wordings, and in the same order the second ones.
    """
    rng = random.Random(f"paraphrases-{seed}")
    found: dict[Description, tuple[str, str]] = {}
    for member in twins("test", seed):
        other = short_caption(member.description, rng)
        if other != member.caption:
            found.setdefault(member.description, (member.caption, other))
        if len(found) == size:
            break
    return [caption for caption, _ in found.values()], [other for _, other in found.values()]


def rank_agreement(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each text's similarities to all other texts.

    Args:
        ours: Similarities of all texts with one another by one model (texts x texts).
        theirs: The same by another model.

    Returns:
        One correlation per text.
    """
    pairs = ((np.delete(one, index), np.delete(other, index)) for index, (one, other) in enumerate(zip(ours, theirs)))
    return np.array([spearmanr(one, other).statistic for one, other in pairs])


def _hits(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Whether the nearest document of each query is its own."""
    return ((queries @ documents.T).argmax(axis=1) == np.arange(len(queries))).astype(float)
