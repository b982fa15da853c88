"""The single checks of `unime verify`: each compares one property of a loaded model with its recipe."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.util import batch_to_device

from unime_st.backbones.video_frames import resize_frames, video_tokens
from unime_st.checkpoints.source import CheckpointError, read_source
from unime_st.encoding.model_inputs import Features
from unime_st.recipes import Demo, Recipe

Row = object
"""What ``encode`` or ``predict`` takes for one row."""

_LONG = "A long caption that goes on and on about the image. " * 400
_SMALL_FOLDER = 4 * 1024**3
"""Folders up to this many bytes are saved and loaded again by default."""
_SMALL_SIDE = 112
"""Side of the square, in pixels, that images are squashed to for a quick verification."""


@dataclass(frozen=True)
class Check:
    """Outcome of one check: its name, whether it passed (None: not run), and what was seen or why it was not run."""

    name: str
    passed: bool | None
    detail: str


def sample_image(width: int = 200, height: int = 140) -> Image.Image:
    """Test image with colors, edges and a gradient, the same on every machine.

    Example:
        >>> sample_image(40, 30).size
        (40, 30)
    """
    ramp = Image.linear_gradient("L").resize((width, height))
    image = Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.FLIP_TOP_BOTTOM), ramp))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 8, width // 2, height // 2), fill=(220, 30, 40))
    draw.rectangle((width // 2, height // 2, width - 5, height - 5), fill=(20, 60, 200))
    return image


class Subject:
    """A loaded model with one way of asking for features and outputs, whether it embeds or reranks."""

    def __init__(self, model: SentenceTransformer | CrossEncoder, reranker: bool) -> None:
        self.model: Any = model
        self.reranker = reranker
        self.transformer: Any = model[0]
        self.exact = next(model.parameters()).dtype == torch.float32
        self._alone: np.ndarray | None = None

    def use_small_images(self) -> None:
        """Squash images to a small square, where the processor has an image rule."""
        processor = self.transformer.processor
        if hasattr(processor, "set_image_rule"):
            processor.set_image_rule(processor.image_rule, _SMALL_SIDE, processor.image_backend)

    def row(self, text: str | None, image: Image.Image | None, video: list[Image.Image] | None = None) -> Row:
        """One row of input."""
        item: dict[str, object] = {"image": image} if image is not None else {}
        if video is not None:
            item["video"] = video
        if text is not None:
            item["text"] = text
        return (item, {"text": "a candidate"}) if self.reranker else item

    def features(self, rows: list[Row]) -> Features:
        """Features of rows, as the model gets them."""
        return dict(self.model.preprocess(rows))

    def outputs(self, rows: list[Row], batch_size: int) -> np.ndarray:
        """Embeddings, or logits in one column."""
        if self.reranker:
            scores = self.model.predict(rows, batch_size=batch_size, activation_fn=torch.nn.Identity())
            return np.asarray(scores, dtype=np.float32)[:, None]
        return np.asarray(self.model.encode(rows, batch_size=batch_size, convert_to_tensor=True).float().cpu())

    def samples(self) -> list[Row]:
        """A text, an image, and two images with texts, of several sizes."""
        return [
            self.row("A man is crossing the street.", None),
            self.row("What is this?", sample_image()),
            self.row(None, sample_image(90, 160)),
            self.row("Represent the given image with the following question: how many?\n", sample_image(240, 90)),
        ]

    def alone(self) -> np.ndarray:
        """Outputs of the samples, each in a batch of its own; computed once."""
        if self._alone is None:
            self._alone = np.concatenate([self.outputs([row], 1) for row in self.samples()])
        return self._alone

    def tokens(self) -> int:
        """Tokens of the samples."""
        return sum(int(self.features([row])["attention_mask"].sum()) for row in self.samples())

    def seconds_per_token(self) -> float:
        """Time of one forward pass of a text, for each of its tokens."""
        row = self.row("A man is crossing the street. " * 4, None)
        count = int(self.features([row])["attention_mask"].sum())
        start = time.perf_counter()
        self.outputs([row], 1)
        return (time.perf_counter() - start) / count


def files(folder: Path) -> Check:
    """Weight files are whole, and all modules are Sentence Transformers' own."""
    try:
        read_source(folder)
    except CheckpointError as error:
        return Check("files", False, str(error))
    if not (folder / "modules.json").is_file():
        return Check("files", False, f"{folder} has no modules.json; make a native folder with `unime convert`")
    types = [module["type"] for module in json.loads((folder / "modules.json").read_text(encoding="utf-8"))]
    foreign = [kind for kind in types if not kind.startswith("sentence_transformers.")]
    names = ", ".join(kind.rpartition(".")[2] for kind in types)
    return Check("files", not foreign, f"modules {names}" if not foreign else f"foreign modules {foreign}")


def template(subject: Subject, recipe: Recipe | None) -> Check:
    """The chat template is the recipe's."""
    found = subject.transformer.processor.chat_template
    if found is None:
        return Check("template", False, "there is no chat template")
    official = recipe.read_template() if recipe else None
    if recipe is None or official is None:
        return Check("template", True, "of the checkpoint")
    same = found.strip() == official.strip()
    return Check("template", same, f"{recipe.template}" + ("" if same else " differs from the recipe"))


def padding(subject: Subject, recipe: Recipe | None) -> Check:
    """Short rows are padded on the recipe's side."""
    side = subject.transformer.tokenizer.padding_side
    expected = recipe.padding_side if recipe else "left"
    mask = subject.features([subject.row("a", None), subject.row("a longer text than that", None)])["attention_mask"]
    real = bool(mask[:, -1].all()) if side == "left" else bool(mask[:, 0].all())
    return Check("padding", side == expected and real, side)


def truncation(subject: Subject) -> Check:
    """An over-long row with an image keeps the end of its prompt and its image tokens, or is refused."""
    tokenizer, image = subject.transformer.tokenizer, sample_image()
    short = [subject.features([subject.row(text, image)])["input_ids"][0].tolist() for text in ("0", "1 2 3 4")]
    tail = 0
    while tail < min(map(len, short)) and short[0][-1 - tail] == short[1][-1 - tail]:
        tail += 1
    before = tokenizer.model_max_length
    try:
        tokenizer.model_max_length = len(short[1]) + 16  # what `max_seq_length` sets
        ids = subject.features([subject.row(_LONG, image)])["input_ids"][0]
    except ValueError as error:
        return Check("truncation", True, f"refused: {str(error)[:60]}...")
    finally:
        tokenizer.model_max_length = before
    kept = ids[len(ids) - tail :].tolist() == short[0][len(short[0]) - tail :]
    same_images = int(_image_mask(subject, ids).sum()) == int(_image_mask(subject, torch.tensor(short[0])).sum())
    what = f"{tail} tokens after the text kept in {len(ids)}" if kept else f"the last {tail} tokens were lost"
    return Check("truncation", kept and same_images, what)


def positions(subject: Subject, recipe: Recipe | None) -> Check:
    """Image tokens have the recipe's positions: one per token, or height and width."""
    backbone = subject.transformer.model
    backbone = getattr(backbone, "model", backbone)
    if not hasattr(backbone, "get_rope_index"):
        return Check("positions", recipe is None or recipe.positions == "native", "one per token")
    features = batch_to_device(subject.features([subject.row("x", sample_image())]), subject.model.device)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    found, _ = backbone.get_rope_index(**{name: features[name] for name in names if name in features})
    flat = bool((found == torch.arange(found.shape[-1], device=found.device)).all())
    expected = recipe.positions if recipe else "native"
    return Check("positions", flat == (expected == "1d"), "one per token" if flat else "height and width for images")


def pooling(subject: Subject) -> Check:
    """The last token is pooled, and embeddings have length 1; a reranker has its scoring module."""
    kinds = [type(module).__name__ for module in subject.model]
    if subject.reranker:
        return Check("pooling", "LogitScore" in kinds, " + ".join(kinds))
    mode = getattr(subject.model[1], "pooling_mode", "?")
    norms = np.linalg.norm(subject.alone(), axis=1)
    unit = bool(np.abs(norms - 1).max() < (1e-5 if subject.exact else 1e-2))
    return Check("pooling", mode == "lasttoken" and unit, f"{mode}, lengths {norms.min():.4f} to {norms.max():.4f}")


def image_tokens(subject: Subject) -> Check:
    """Images become tokens, as many as the model makes features of them (it compares the two itself)."""
    counts = []
    for size in ((200, 140), (90, 160)):
        ids = subject.features([subject.row("x", sample_image(*size))])["input_ids"]
        counts.append(int(_image_mask(subject, ids).sum()))
    subject.alone()
    return Check("image tokens", min(counts) > 0, f"{counts[0]} for 200 x 140 pixels, {counts[1]} for 90 x 160")


def videos(subject: Subject) -> Check:
    """Frames become as many tokens as were counted before, their order matters, and batches change nothing."""
    processor = resize_frames(subject.transformer.processor)
    frames = [sample_image(90, 60), sample_image(90, 60).rotate(180), Image.new("RGB", (90, 60))]
    rows = [subject.row("x", None, video) for video in (frames, frames[::-1])]
    ids = subject.features(rows[:1])["input_ids"][0]
    found, expected = int((ids == processor.video_token_id).sum()), video_tokens(processor, (len(frames), 90, 60))
    alone = np.concatenate([subject.outputs([row], 1) for row in rows])
    worst = float(np.abs(subject.outputs([*rows, subject.row("a longer text", None)], 3)[:2] - alone).max())
    order = float(np.abs(alone[0] - alone[1]).max())
    scale = max(1.0, float(np.abs(alone).max()))
    passed = found == expected and worst <= (1e-5 if subject.exact else 5e-2) * scale and order > 0
    return Check("videos", passed, f"{found} tokens of 3 frames, {expected} counted; largest difference {worst:.1e}")


def batches(subject: Subject) -> Check:
    """Rows in one batch have the outputs that they have alone."""
    rows, alone = subject.samples(), subject.alone()
    worst = float(np.abs(subject.outputs(rows, len(rows)) - alone).max())
    allowed = (1e-5 if subject.exact else 5e-2) * max(1.0, float(np.abs(alone).max()))
    return Check("batch = single", worst <= allowed, f"largest difference {worst:.1e}")


def saving(subject: Subject, load: Callable[[Path], Subject], folder: Path, full: bool) -> Check:
    """The saved model has the same outputs to the last bit."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if size > _SMALL_FOLDER and not full:
        return Check("save = load", None, f"it would write {size / 1e9:.0f} GB; ask for it with --full")
    with _temporary_folder(size) as parent:
        subject.model.save_pretrained(str(parent))
        worst = float(np.abs(load(parent).alone() - subject.alone()).max())
    return Check("save = load", worst == 0.0, f"largest difference {worst:.1e}")


def demo_score(subject: Subject, demo: Demo, image: str | Path | None) -> Check:
    """The cosine similarity of the authors' demo is the published one."""
    if image is None:
        return Check("demo score", None, f"give the authors' image {demo.image} with --demo-image")
    query = subject.row(demo.image_text, Image.open(image))
    vectors = subject.outputs([query, subject.row(demo.text, None)], 1)
    score = float(vectors[0] @ vectors[1])
    return Check("demo score", abs(score - demo.score) <= demo.tolerance, f"{score:.4f}, published {demo.score:.4f}")


def _image_mask(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    processor = subject.transformer.processor
    if hasattr(processor, "image_mask"):
        mask: torch.Tensor = processor.image_mask(ids)
        return mask
    return ids == processor.image_token_id


@contextmanager
def _temporary_folder(size: int) -> Iterator[Path]:
    """Make a temporary folder on a disk with enough space."""
    with tempfile.TemporaryDirectory(prefix="unime-verify-") as folder:
        free = shutil.disk_usage(folder).free
        if free < 1.1 * size:
            where = Path(folder).parent
            raise OSError(f"{size / 1e9:.1f} GB are needed in {where}, {free / 1e9:.1f} GB are free; set TMPDIR")
        yield Path(folder)
