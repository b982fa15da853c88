"""`unime verify`: does a folder do what its recipe says, on this machine?"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from sentence_transformers import CrossEncoder, SentenceTransformer

from unime_st.checkpoints.folder import MANIFEST, quiet
from unime_st.checkpoints.source import CheckpointError, read_source
from unime_st.paths import AliasError, find_model
from unime_st.recipes import RECIPES, Demo, Recipe

_LONG = "A long caption that goes on and on about the image. " * 400
_SMALL = 4 * 1024**3
"""Folders up to this many bytes are saved and loaded again without being asked to."""


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    Args:
        name: What was checked.
        passed: True, False, or None when it was not run.
        detail: What was seen, or why it was not run.
    """

    name: str
    passed: bool | None
    detail: str


def verify(
    alias_or_folder: str,
    *,
    demo_image: str | Path | None = None,
    full: bool = False,
    device: str | None = None,
) -> list[Check]:
    """Check a model: files, pooling, padding, template, image tokens, positions, truncation, batches, saving.

    Args:
        alias_or_folder: What would be given to ``SentenceTransformer`` or ``CrossEncoder``.
        demo_image: The image of the authors' demo; with it the published score of a released model is checked too.
        full: Save and load again however large the model is.
        device: Where to run, e.g. ``"cuda"``; default as Sentence Transformers chooses.

    Returns:
        One entry per check, in the order in which they ran.

    Raises:
        CheckpointError: The folder is no model.
        unime_st.paths.AliasError: The alias stands for nothing here.

    Example:
        >>> all(check.passed for check in verify("unime-tiny"))
        True
    """
    folder = find_model(alias_or_folder)
    if folder is None:
        raise AliasError(f"{alias_or_folder!r} is neither a folder nor an alias of a model on this machine.")
    recipe = _recipe_of(folder, alias_or_folder)
    checks = [_check_files(folder)]
    if not checks[0].passed:
        return checks
    settings = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    reranker = settings.get("model_type") == "CrossEncoder"
    load: Callable[[str], Any] = lambda path: (CrossEncoder if reranker else SentenceTransformer)(path, device=device)
    subject = _Subject(load(str(folder)), reranker)
    steps: list[tuple[str, Callable[[], Check]]] = [
        ("pooling", lambda: _check_pooling(subject)),
        ("padding", lambda: _check_padding(subject, recipe)),
        ("template", lambda: _check_template(subject, recipe)),
        ("image tokens", lambda: _check_image_tokens(subject)),
        ("positions", lambda: _check_positions(subject, recipe)),
        ("truncation", lambda: _check_truncation(subject)),
        ("batch = single", lambda: _check_batches(subject)),
        ("save = load", lambda: _check_saving(subject, load, folder, full)),
    ]
    if recipe is not None and (demo := recipe.demo) is not None:
        steps.append(("demo score", lambda: _check_demo(subject, demo, demo_image)))
    for name, step in steps:
        try:
            with quiet():
                checks.append(step())
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError, OSError, AttributeError) as error:
            checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
    return checks


def _recipe_of(folder: Path, name: str) -> Recipe | None:
    manifest = folder / MANIFEST
    if manifest.is_file():
        name = json.loads(manifest.read_text(encoding="utf-8")).get("recipe", name)
    return RECIPES.get(name)


def sample_image(width: int = 200, height: int = 140) -> Image.Image:
    """Return a test image with colours, edges and a gradient, the same on every machine.

    Args:
        width: In pixels.
        height: In pixels.

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


class _Subject:
    """A loaded model behind one way of asking for features and outputs, whether it embeds or reranks."""

    def __init__(self, model: Any, reranker: bool) -> None:
        self.model, self.reranker = model, reranker
        self.transformer = model[0]
        self.exact = next(model.parameters()).dtype == torch.float32

    def row(self, text: str | None, image: Image.Image | None) -> Any:
        item: dict[str, Any] = {"image": image} if image is not None else {}
        if text is not None:
            item["text"] = text
        return (item, {"text": "a candidate"}) if self.reranker else item

    def features(self, rows: list[Any]) -> dict[str, Any]:
        return dict(self.model.preprocess(rows))

    def outputs(self, rows: list[Any], batch_size: int) -> np.ndarray:
        if self.reranker:
            scores = self.model.predict(rows, batch_size=batch_size, activation_fn=torch.nn.Identity())
            return np.asarray(scores, dtype=np.float32)[:, None]
        return np.asarray(self.model.encode(rows, batch_size=batch_size, convert_to_tensor=True).float().cpu())

    def samples(self) -> list[Any]:
        return [
            self.row("A man is crossing the street.", None),
            self.row("What is this?", sample_image()),
            self.row(None, sample_image(90, 160)),
            self.row("Represent the given image with the following question: how many?\n", sample_image(240, 90)),
        ]


def _check_files(folder: Path) -> Check:
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


def _check_pooling(subject: _Subject) -> Check:
    kinds = [type(module).__name__ for module in subject.model]
    if subject.reranker:
        return Check("pooling", "LogitScore" in kinds, " + ".join(kinds))
    mode = getattr(subject.model[1], "pooling_mode", "?")
    norms = np.linalg.norm(subject.outputs(subject.samples(), 1), axis=1)
    unit = bool(np.abs(norms - 1).max() < (1e-5 if subject.exact else 1e-2))
    return Check("pooling", mode == "lasttoken" and unit, f"{mode}, lengths {norms.min():.4f} to {norms.max():.4f}")


def _check_padding(subject: _Subject, recipe: Recipe | None) -> Check:
    side = subject.transformer.tokenizer.padding_side
    expected = recipe.padding_side if recipe else "left"
    mask = subject.features([subject.row("a", None), subject.row("a longer text than that", None)])["attention_mask"]
    real = bool(mask[:, -1].all()) if side == "left" else bool(mask[:, 0].all())
    return Check("padding", side == expected and real, side)


def _check_template(subject: _Subject, recipe: Recipe | None) -> Check:
    mine = subject.transformer.processor.chat_template
    if mine is None:
        return Check("template", False, "there is no chat template")
    official = recipe.read_template() if recipe else None
    if official is None:
        return Check("template", True, "of the checkpoint")
    same = mine.strip() == official.strip()
    return Check("template", same, f"{recipe.template}" + ("" if same else " differs from the recipe"))  # type: ignore[union-attr]


def _check_image_tokens(subject: _Subject) -> Check:
    counts = []
    for size in ((200, 140), (90, 160)):
        with_image = subject.features([subject.row("x", sample_image(*size))])
        counts.append(int(_image_mask(subject, with_image["input_ids"]).sum()))
        with torch.no_grad():  # the model compares the number of tokens with the number of image features itself
            subject.model(_to_device(subject.model, with_image))
    return Check("image tokens", min(counts) > 0, f"{counts[0]} for 200 x 140 pixels, {counts[1]} for 90 x 160")


def _image_mask(subject: _Subject, ids: torch.Tensor) -> torch.Tensor:
    processor = subject.transformer.processor
    if hasattr(processor, "image_mask"):
        mask: torch.Tensor = processor.image_mask(ids)
        return mask
    return ids == processor.image_token_id


def _to_device(model: Any, features: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(model.device) if hasattr(value, "to") else value for key, value in features.items()}


def _check_positions(subject: _Subject, recipe: Recipe | None) -> Check:
    backbone = subject.transformer.model
    backbone = getattr(backbone, "model", backbone)
    if not hasattr(backbone, "get_rope_index"):
        return Check("positions", recipe is None or recipe.positions == "native", "one per token")
    features = _to_device(subject.model, subject.features([subject.row("x", sample_image())]))
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    positions, _ = backbone.get_rope_index(**{name: features[name] for name in names if name in features})
    flat = bool((positions == torch.arange(positions.shape[-1], device=positions.device)).all())
    expected = recipe.positions if recipe else "native"
    return Check("positions", flat == (expected == "1d"), "one per token" if flat else "height and width for images")


def _check_truncation(subject: _Subject) -> Check:
    """Cut an over-long row with an image: the end of the prompt must stay, or the processor must refuse."""
    model, image = subject.model, sample_image()
    short = [subject.features([subject.row(text, image)])["input_ids"][0].tolist() for text in ("0", "1 2 3 4")]
    tail = 0
    while tail < min(map(len, short)) and short[0][-1 - tail] == short[1][-1 - tail]:
        tail += 1
    before = model.max_seq_length
    try:
        model.max_seq_length = len(short[1]) + 16
        ids = subject.features([subject.row(_LONG, image)])["input_ids"][0]
    except ValueError as error:
        return Check("truncation", True, f"refused: {str(error)[:60]}...")
    finally:
        model.max_seq_length = before
    kept = ids[len(ids) - tail :].tolist() == short[0][len(short[0]) - tail :]
    same_images = int(_image_mask(subject, ids).sum()) == int(_image_mask(subject, torch.tensor(short[0])).sum())
    what = f"{tail} tokens after the text kept in {len(ids)}" if kept else f"the last {tail} tokens were lost"
    return Check("truncation", kept and same_images, what)


def _check_batches(subject: _Subject) -> Check:
    rows = subject.samples()
    together, alone = subject.outputs(rows, len(rows)), np.concatenate([subject.outputs([row], 1) for row in rows])
    worst = float(np.abs(together - alone).max())
    scale = max(1.0, float(np.abs(alone).max()))
    return Check(
        "batch = single", worst <= (1e-5 if subject.exact else 5e-2) * scale, f"largest difference {worst:.1e}"
    )


def _check_saving(subject: _Subject, load: Callable[[str], Any], folder: Path, full: bool) -> Check:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if size > _SMALL and not full:
        return Check("save = load", None, f"it would write {size / 1e9:.0f} GB; ask for it with --full")
    rows = subject.samples()
    with _room_for(size) as parent:
        subject.model.save_pretrained(str(parent))
        again = _Subject(load(str(parent)), subject.reranker)
        worst = float(np.abs(again.outputs(rows, 2) - subject.outputs(rows, 2)).max())
    return Check("save = load", worst == 0.0, f"largest difference {worst:.1e}")


@contextmanager
def _room_for(size: int) -> Iterator[Path]:
    """Give a temporary folder on a disk with enough space."""
    with tempfile.TemporaryDirectory(prefix="unime-verify-") as folder:
        free = shutil.disk_usage(folder).free
        if free < 1.1 * size:
            where = Path(folder).parent
            raise OSError(f"{size / 1e9:.1f} GB are needed in {where}, {free / 1e9:.1f} GB are free; set TMPDIR")
        yield Path(folder)


def _check_demo(subject: _Subject, demo: Demo, image: str | Path | None) -> Check:
    if image is None:
        return Check("demo score", None, f"give the authors' image {demo.image} with --demo-image")
    query = subject.row(demo.image_text, Image.open(image))
    vectors = subject.outputs([query, subject.row(demo.text, None)], 1)
    score = float(vectors[0] @ vectors[1])
    return Check("demo score", abs(score - demo.score) <= demo.tolerance, f"{score:.4f}, published {demo.score:.4f}")


def table(checks: list[Check]) -> str:
    """Return checks as a table for people.

    Example:
        >>> print(table([Check("pooling", True, "lasttoken")]))
        ok       pooling         lasttoken
    """
    return "\n".join(_lines(checks))


def _lines(checks: list[Check]) -> Iterator[str]:
    for check in checks:
        mark = {True: "ok", False: "FAILED", None: "not run"}[check.passed]
        yield f"{mark:<8} {check.name:<15} {check.detail}".rstrip()
