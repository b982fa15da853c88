"""Video benchmark: `UniME.encode` and `SentenceTransformer.encode` on the same frames, shared by questions and not.

python benchmarks/video.py [--videos 12 --frames 8 --side 168 --size mid]

Frames are stored as JPEG files of a size that no processor changes, so that both sides compute the same vectors. Each
input is a question about a video: three questions of every video as in Video-MME, or one.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from workloads import SIZES, random_qwen2_vl

from unime_st import Item, UniME

STOCK, ENGINE = "SentenceTransformer.encode", "UniME.encode"
QUESTIONS = 3
_LEAST_SIDE = 56  # in pixels; a multiple of 28, as all sides must be


def write_videos(folder: Path, count: int, frames: int, side: int) -> list[Path]:
    """Write videos as folders of JPEG frames: noise of a low frequency that moves."""
    found = []
    for number in range(count):
        (folder / str(number)).mkdir(parents=True)
        rng = np.random.default_rng(number)
        field = Image.fromarray(rng.integers(0, 255, (12, 24, 3), dtype=np.uint8)).resize((2 * side, side))
        for frame in range(frames):
            left = side * frame // max(1, frames - 1)
            field.crop((left, 0, left + side, side)).save(folder / str(number) / f"{frame:03d}.jpg", quality=90)
        found.append(folder / str(number))
    return found


def stock_input(video: Path, text: str) -> dict[str, object]:
    """What the stock class takes: frames in memory, opened for each input."""
    return {"video": [Image.open(path).convert("RGB") for path in sorted(video.iterdir())], "text": text}


def main() -> None:
    """Write ``benchmarks/results/video_{shared,not_shared}.{json,md,png}``."""
    parser = harness.options(__doc__, repeats=5)
    parser.add_argument("--videos", type=int, default=12, help="number of videos")
    parser.add_argument("--frames", type=int, default=8, help="frames of a video")
    parser.add_argument("--side", type=int, default=168, help="side of the square frames in pixels, a multiple of 28")
    parser.add_argument("--size", choices=tuple(SIZES), default="mid", help="size of the random model")
    chosen = parser.parse_args()
    if chosen.side % 28 or chosen.side < _LEAST_SIDE:
        parser.error(f"--side must be a multiple of 28 of at least {_LEAST_SIDE}, got {chosen.side}")
    options: dict[str, Any] = {"model_kwargs": {"dtype": torch.bfloat16}} if chosen.device == "cuda" else {}
    with tempfile.TemporaryDirectory() as work:
        folder = random_qwen2_vl(Path(work) / "model", chosen.size, pixels=chosen.side**2, device=chosen.device)
        classes = {STOCK: SentenceTransformer, ENGINE: UniME}
        models: dict[str, Any] = {
            label: load(str(folder), device=chosen.device, **options) for label, load in classes.items()
        }
        videos = write_videos(Path(work) / "videos", chosen.videos, chosen.frames, chosen.side)
        for name, questions in (("video_shared", QUESTIONS), ("video_not_shared", 1)):
            rows = [(video, f"question {number}: what happens?") for video in videos for number in range(questions)]
            runs = {
                STOCK: partial(_run_stock, models[STOCK], rows),
                ENGINE: partial(_run_engine, models[ENGINE], rows),
            }
            vectors = {label: run() for label, run in runs.items()}
            cosine = float((vectors[STOCK] * vectors[ENGINE]).sum(1).min())
            facts = {**vars(chosen), "questions": questions, "least_cosine": cosine}
            result = harness.compare(name, runs, repeats=chosen.repeats, facts=facts)
            rates = {label: f"{len(rows) / median:.2f}" for label, median in result["median"].items()}
            lines = [harness.table(result), f"Inputs with a video per second: {rates}; least cosine {cosine:.7f}."]
            harness.save(result, "\n".join(lines) + "\n")
            sys.stdout.write(f"{name}, {len(rows)} inputs\n" + "\n".join(lines) + "\n")


def _run_stock(model: SentenceTransformer, rows: list[tuple[Path, str]]) -> np.ndarray:
    return model.encode([stock_input(video, text) for video, text in rows])


def _run_engine(model: UniME, rows: list[tuple[Path, str]]) -> np.ndarray:
    return np.asarray(model.encode([Item(text, video=video) for video, text in rows]))


if __name__ == "__main__":
    main()
