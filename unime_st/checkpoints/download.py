"""Download of a released checkpoint from the hub and its conversion (`unime pull`)."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HTTPError

from unime_st.checkpoints import resuming
from unime_st.files import folder_lock
from unime_st.paths import AliasError, local_folder
from unime_st.recipes import RELEASED, Recipe, get_recipe

logger = logging.getLogger(__name__)

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_RESERVE = 512 * 1024**2
"""Bytes that must stay free on the disk beside the download; the converted folder needs some of them."""


def pull(
    alias: str,
    *,
    revision: str | None = None,
    image_size: str | int | None = None,
    local_files_only: bool = False,
    overwrite: bool = False,
) -> Path:
    """Download a released checkpoint at its pinned commit and convert it to ``$UNIME_HOME/models/<alias>``.

    The download goes to the hub's own cache and continues where an earlier one stopped, in the middle of a file if
    need be. The new folder links to the weights in that cache. Of several processes that ask at once, one downloads
    and the others wait.

    Args:
        alias: Alias of a released model, e.g. ``"unime-v2"``.
        revision: Commit, tag or branch instead of the pinned one.
        image_size: See :func:`unime_st.checkpoints.convert`.
        local_files_only: Use only what is already in the hub's cache.
        overwrite: Convert again and replace an existing folder.

    Returns:
        Path: The native folder.

    Raises:
        AliasError: There is no such released model, no network, not enough disk space, or the download failed; the
            message says what to do.

    Example:
        >>> pull("unime-v2-2b")                                                      # doctest: +SKIP
        PosixPath('.../unime/models/unime-v2-2b')
    """
    if alias not in RELEASED:
        raise AliasError(f"{alias!r} is not a released model. Released: {', '.join(RELEASED)}.")
    recipe = get_recipe(alias)
    target = local_folder(alias)
    if target.is_dir() and not overwrite:
        return target
    with folder_lock(target):
        if target.is_dir() and not overwrite:  # made by another process in the meantime
            return target
        return _pull(recipe, target, revision or recipe.revision, image_size, local_files_only, overwrite)


def _pull(
    recipe: Recipe,
    target: Path,
    revision: str | None,
    image_size: str | int | None,
    local_files_only: bool,
    overwrite: bool,
) -> Path:
    offline = local_files_only or constants.HF_HUB_OFFLINE
    weights, commit = _fetch(recipe, str(recipe.hub_id), revision, offline, with_weights=True)
    processor = None
    if recipe.processor_hub_id is not None and not (weights / "preprocessor_config.json").is_file():
        processor, _ = _fetch(recipe, recipe.processor_hub_id, None, offline, with_weights=False)
    from unime_st.checkpoints.conversion import Options, convert_to

    options = Options(alias=recipe.name, processor=processor, image_size=image_size, revision=commit)
    return convert_to(target, weights, recipe, options, overwrite=overwrite)


def _fetch(recipe: Recipe, repo: str, revision: str | None, offline: bool, *, with_weights: bool) -> tuple[Path, str]:
    """Download one repository into the hub's cache; return its folder and its commit."""
    patterns = [*_SMALL_FILES, "*.safetensors"] if with_weights else _SMALL_FILES
    options: dict[str, Any] = {"repo_id": repo, "revision": revision, "allow_patterns": patterns}
    try:
        if offline:
            found = Path(snapshot_download(**options, local_files_only=True))
            return found, found.name
        commit = HfApi().model_info(repo, revision=revision).sha or str(revision)
        options["revision"] = commit
        weights = _missing_weights(recipe, options)
        logger.info("downloading %s at %s", repo, commit)
        snapshot_download(**{**options, "allow_patterns": _SMALL_FILES})
        resuming.fetch_files(repo, commit, weights)
        return Path(snapshot_download(**options)), commit
    except AliasError:
        raise
    except (HTTPError, OSError, ValueError) as error:
        logger.debug("download of %s failed", repo, exc_info=True)
        raise AliasError(_failure(recipe, repo, offline, error)) from None  # the message holds all a user can act on


def _missing_weights(recipe: Recipe, options: dict[str, Any]) -> list[str]:
    """Check that the disk has space for what is missing, and return the weight files among it."""
    listed = snapshot_download(**options, dry_run=True)
    wanted = [info for info in listed if info.will_download]
    missing = sum(info.file_size or 0 for info in wanted) - resuming.partial_bytes(options["repo_id"])
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if missing + _RESERVE > free:
        raise AliasError(
            f"{recipe.name} needs {missing / 1e9:.1f} GB more in {cache}, where {free / 1e9:.1f} GB are free. Free some "
            "space, or set HF_HUB_CACHE to a folder on a larger disk. Nothing has been downloaded."
        )
    return [info.filename for info in wanted if info.filename.endswith(".safetensors")]


def _failure(recipe: Recipe, repo: str, offline: bool, error: Exception) -> str:
    convert = f"`unime convert FOLDER --recipe {recipe.name} --alias {recipe.name}`"
    by_hand = f"If you have the files of {repo} already, run {convert}."
    if offline:
        return (
            f"{recipe.name!r} is not on this machine, and the hub may not be asked (offline). Run "
            f"`unime pull {recipe.name}` with network. {by_hand}"
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return (
            f"Writing {repo} to {constants.HF_HUB_CACHE} failed: {os.strerror(error.errno)}. Free some space or set "
            f"HF_HUB_CACHE to another disk, then run `unime pull {recipe.name}` again; it continues where it stopped."
        )
    return (
        f"{recipe.name!r} is not on this machine and could not be fetched from {repo} ({type(error).__name__}: "
        f"{error}). With network, `unime pull {recipe.name}` fetches it and continues a download that broke off. "
        f"{by_hand}"
    )
