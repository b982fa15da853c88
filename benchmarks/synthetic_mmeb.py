"""A synthetic MMEB in the official layout: what tests and measurements run on where the real data are not at hand."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mteb_tasks.mmeb.subsets import IMAGE_TOKEN, SUBSETS, Subset

_WORDS = "red blue green round square small large left right near far old new wet dry tall cat dog car tree".split()


def write_synthetic_mmeb(
    folder: str | Path,
    *,
    subsets: Iterable[Subset] = SUBSETS,
    queries: int = 10,
    candidates: int = 8,
    documents: int = 24,
    side: int | tuple[int, int] = 32,
    layout: Literal["v1", "v2"] = "v1",
    duplicates: bool = True,
    shared: bool = False,
    seed: int = 0,
) -> Path:
    """Write subsets with random words and random images.

    Every modality combination, the image tokens without an image (WebQA, EDIS) and, on request, a second copy of the
    positive among its candidates occur.

    Args:
        folder: Where to write; parquet files and ``images/``.
        subsets: Which subsets.
        queries: Rows of each subset.
        candidates: Candidates of each row (capped by what the subset allows).
        documents: Distinct candidates of each subset, among which the rows draw theirs.
        side: Side of the images in pixels; shortest and longest side of photos, which are JPEG files of any shape.
        layout: Fields of ``TIGER-Lab/MMEB-eval`` ("v1") or of VLM2Vec-V2 ("v2").
        duplicates: Repeat the positive at the end of every fifth row.
        shared: Share candidates as the real data do: all rows of a classification set have its labels, ImageNet-1K and
            ImageNet-A the same ones, and VQA sets draw their answers from one vocabulary of twice `documents`.
        seed: Seed of words and images.

    Returns:
        The folder.

    Example:
        >>> import tempfile
        >>> from mteb_tasks.mmeb.subsets import subset_named
        >>> root = write_synthetic_mmeb(tempfile.mkdtemp(), subsets=[subset_named("OK-VQA")])
        >>> sorted(path.name for path in root.iterdir())
        ['OK-VQA', 'images']
    """
    root = Path(folder)
    for subset in subsets:
        rng = random.Random(f"{seed}-{subset.name}")
        pool = _shared_candidates(subset, documents, rng, seed) if shared else []
        pool = pool or [
            _side(root, subset, "target", f"t{number}", rng, side) for number in range(max(documents, candidates))
        ]
        distinct = list(dict.fromkeys(pool))
        rows = []
        for number in range(queries):
            listed = rng.sample(distinct, min(candidates, subset.candidates, len(distinct)))
            if duplicates and number % 5 == 3 and len(listed) > 2:
                listed[-1] = listed[0]
            rows.append((_side(root, subset, "query", f"q{number}", rng, side), listed))
        (root / subset.name).mkdir(parents=True, exist_ok=True)
        table = _v1(subset, rows) if layout == "v1" else _v2(subset, rows)
        pq.write_table(table, root / subset.name / "test-00000-of-00001.parquet")
    return root


def _shared_candidates(subset: Subset, documents: int, rng: random.Random, seed: int) -> list[tuple[str, str]]:
    """Labels of a classification set, answers of a VQA set; nothing for the others."""
    if subset.meta == "classification":
        return [(f"{subset.name.replace('-A', '-1K')} label {number}", "") for number in range(subset.candidates)]
    if subset.meta == "vqa":
        words = random.Random(f"{seed}-answers")
        answers = [f"{words.choice(_WORDS)} {words.choice(_WORDS)} {number}" for number in range(2 * documents)]
        return [(answer, "") for answer in rng.sample(answers, documents)]
    return []


def _side(
    root: Path, subset: Subset, side: str, name: str, rng: random.Random, size: int | tuple[int, int]
) -> tuple[str, str]:
    """Body and image path of one item; the image is written."""
    template = subset.query if side == "query" else subset.target
    plain = side == "target" and not template
    body = " ".join(rng.choice(_WORDS) for _ in range(4)) if plain or "{}" in template else ""
    if not subset.has_image(side):
        return body, ""
    pixels = Image.frombytes("RGB", (4, 4), rng.randbytes(48))
    if isinstance(size, int):
        relative, image = f"{subset.name}/{name}.png", pixels.resize((size, size), Image.Resampling.NEAREST)
    else:
        relative, image = f"{subset.name}/{name}.jpg", pixels.resize((rng.randint(*size), rng.randint(*size)))
    (root / "images" / subset.name).mkdir(parents=True, exist_ok=True)
    image.save(root / "images" / relative)
    return body, relative


def _official(subset: Subset, side: str, body: str) -> str:
    template = subset.query if side == "query" else subset.target
    if not template:
        return body
    token = f"{IMAGE_TOKEN}\n" if subset.has_image(side) or (side == "query" and subset.stray_token) else ""
    end = "" if side == "target" and subset.meta == "grounding" else "\n"
    return token + template.replace("{}", body) + end


def _v1(subset: Subset, rows: list[tuple[tuple[str, str], list[tuple[str, str]]]]) -> pa.Table:
    return pa.table(
        {
            "qry_text": [_official(subset, "query", query[0]) for query, _ in rows],
            "qry_img_path": [query[1] for query, _ in rows],
            "tgt_text": [[_official(subset, "target", body) for body, _ in listed] for _, listed in rows],
            "tgt_img_path": [[image for _, image in listed] for _, listed in rows],
        }
    )


def _v2(subset: Subset, rows: list[tuple[tuple[str, str], list[tuple[str, str]]]]) -> pa.Table:
    def apart(side: str, body: str) -> tuple[str, str]:
        """Instruction and text; quoted bodies keep their quotes in the text."""
        before, mark, after = (subset.query if side == "query" else subset.target).partition("{}")
        token = f"{IMAGE_TOKEN}\n" if subset.has_image(side) else ""
        if not before:
            return "", body
        quote = before[-1] if before.endswith('"') else ""
        return token + before.removesuffix(quote).strip(), (quote + body + after) if mark else ""

    queries = [apart("query", query[0]) for query, _ in rows]
    targets = [[apart("target", body) for body, _ in listed] for _, listed in rows]
    return pa.table(
        {
            "qry_inst": [instruction for instruction, _ in queries],
            "qry_text": [text for _, text in queries],
            "qry_img_path": [query[1] for query, _ in rows],
            "tgt_inst": [listed[0][0] for listed in targets],
            "tgt_text": [[text for _, text in listed] for listed in targets],
            "tgt_img_path": [[image for _, image in listed] for _, listed in rows],
        }
    )
