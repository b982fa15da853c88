"""Verification of a native folder on this machine: what its recipe says against what it does (`unime verify`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from unime_st.backbones.video_frames import accepts_video
from unime_st.checkpoints import checks
from unime_st.checkpoints.checks import Check, Subject
from unime_st.checkpoints.native_folder import CONVERSION_RECORD, quiet_transformers
from unime_st.durations import format_duration
from unime_st.files import read_json
from unime_st.paths import AliasError, find_model
from unime_st.recipes import RECIPES, Recipe

logger = logging.getLogger(__name__)

_ANNOUNCED_SECONDS = 60.0
"""A verification that is estimated to take longer is announced before it begins."""


def verify(
    alias_or_folder: str,
    *,
    demo_image: str | Path | None = None,
    full: bool = False,
    quick: bool = False,
    device: str | None = None,
) -> list[Check]:
    """Check a model: files, template, padding, truncation, positions, pooling, image tokens,
    batches, saving, and videos where there is a slot for them.

    On a CPU, weights stored in 16 bits are checked in float32, which is several times faster there, if memory allows.

    Args:
        alias_or_folder: A folder, or the alias of a model on this machine.
        demo_image: The image of the authors' demo; with it the published score of a released model is checked too.
        full: Save and load again however large the model is.
        quick: Squash images to a small square and leave saving out.
        device: Where to run, e.g. ``"cuda"``; default as Sentence Transformers chooses.

    Returns:
        list[Check]: One entry per check, in the order in which they ran.

    Raises:
        CheckpointError: The folder is not a model.
        AliasError: The alias stands for no folder on this machine.

    Example:
        >>> all(check.passed for check in verify("unime-tiny"))
        True
    """
    return list(run_checks(alias_or_folder, demo_image=demo_image, full=full, quick=quick, device=device))


def run_checks(
    alias_or_folder: str,
    *,
    demo_image: str | Path | None = None,
    full: bool = False,
    quick: bool = False,
    device: str | None = None,
) -> Iterator[Check]:
    """Check a model as :func:`verify` does, and yield every check as soon as it has finished.

    A check that raises has failed; the rest still run.
    """
    folder = find_model(alias_or_folder)
    if folder is None:
        raise AliasError(
            f"Unknown model {alias_or_folder!r}: neither a folder nor the alias of a model on this machine. "
            "`unime pull ALIAS` fetches a released model, `unime convert FOLDER --alias ALIAS` converts your own."
        )
    recipe = _recipe_of(folder, alias_or_folder)
    first = checks.files(folder)
    yield first
    if not first.passed:
        return
    load = _Loader(folder, device, quick)
    subject = load(folder)
    yield from _attempt("template", lambda: checks.template(subject, recipe))
    yield from _attempt("padding", lambda: checks.padding(subject, recipe))
    yield from _attempt("truncation", lambda: checks.truncation(subject))
    yield from _attempt("positions", lambda: checks.positions(subject, recipe))
    _announce(subject, saved=not quick)
    yield from _attempt("pooling", lambda: checks.pooling(subject))
    yield from _attempt("image tokens", lambda: checks.image_tokens(subject))
    yield from _attempt("batch = single", lambda: checks.batches(subject))
    if quick:
        yield Check("save = load", None, "left out by --quick")
    else:
        yield from _attempt("save = load", lambda: checks.saving(subject, load, folder, full))
    if accepts_video(subject.transformer.processor):
        yield from _attempt("videos", lambda: checks.videos(subject))
    if recipe is not None and (demo := recipe.demo) is not None:
        yield from _attempt("demo score", lambda: checks.demo_score(subject, demo, demo_image))


def _attempt(name: str, check: Callable[[], Check]) -> Iterator[Check]:
    try:
        with quiet_transformers():
            found: Check = check()
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError, OSError, AttributeError) as error:
        found = Check(name, False, f"{type(error).__name__}: {error}")
    yield found


def _recipe_of(folder: Path, name: str) -> Recipe | None:
    record = folder / CONVERSION_RECORD
    return RECIPES.get(read_json(record).get("recipe", name) if record.is_file() else name)


@dataclass(frozen=True)
class _Loader:
    """Loads the model, or what it saved, always in the same way."""

    folder: Path
    device: str | None
    quick: bool

    def __call__(self, folder: Path) -> Subject:
        """Load a folder for the checks."""
        settings = json.loads((self.folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
        reranker = settings.get("model_type") == "CrossEncoder"
        kind: type[CrossEncoder | SentenceTransformer] = CrossEncoder if reranker else SentenceTransformer
        model = kind(
            str(folder), device=self.device, model_kwargs={"dtype": "float32"} if self._in_float32() else None
        )
        subject = Subject(model, reranker)
        if self.quick:
            subject.use_small_images()
        return subject

    def _in_float32(self) -> bool:
        on_cpu = self.device == "cpu" or (self.device is None and not torch.accelerator.is_available())
        size = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        return on_cpu and 2.5 * size < psutil.virtual_memory().available


def _announce(subject: Subject, *, saved: bool) -> None:
    """Log an estimate of the time if it is long: tokens of all passes over the speed on a short text."""
    tokens = subject.tokens() * (3 if saved else 2)
    seconds = tokens * subject.seconds_per_token()
    if seconds > _ANNOUNCED_SECONDS:
        logger.warning(
            "about %s on %s: %s tokens, most of them of images; --quick takes small images",
            format_duration(seconds),
            subject.model.device,
            f"{tokens:,}",
        )


def line(check: Check) -> str:
    """One check as a line of text.

    Example:
        >>> line(Check("save = load", None, "left out"))
        'not run  save = load     left out'
    """
    mark = {True: "ok", False: "FAILED", None: "not run"}[check.passed]
    return f"{mark:<8} {check.name:<15} {check.detail}".rstrip()
