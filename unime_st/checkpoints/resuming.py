"""Resumable downloads of single files from the hub.

The hub's client deletes a file that it could not finish, which for weights is gigabytes. Here a partial file keeps its
name, is continued from its end, checked against the hub's checksum, and only then moved to the client's cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlparse

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from unime_st.files import commit_file, content_digest

_PART = ".unime-part"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def partial_bytes(repo: str) -> int:
    """Bytes that earlier, unfinished downloads of a repository left, and that need not be fetched again.

    Example:
        >>> partial_bytes("nobody/nothing")
        0
    """
    return sum(path.stat().st_size for path in _blobs(repo).glob(f"*{_PART}"))


def fetch_files(repo: str, commit: str, names: Iterable[str]) -> None:
    """Download files of a commit into the hub's cache, each from where it stopped; a complete one costs one request.

    Raises:
        OSError: The disk is full, or what arrived is not what the hub announced.
    """
    for name in names:
        url = hf_hub_url(repo, name, revision=commit)
        found = get_hf_file_metadata(url)
        if found.etag is None:
            continue  # without a checksum there is no name for a partial file: left to the client
        blob = _blobs(repo) / found.etag
        blob.parent.mkdir(parents=True, exist_ok=True)
        part = blob.with_name(found.etag + _PART)
        with WeakFileLock(part.with_name(part.name + ".lock")):
            if blob.exists():
                continue
            headers = build_hf_headers()
            if urlparse(found.location).netloc != urlparse(url).netloc:
                headers.pop("authorization", None)  # not for the storage that the hub redirects to
            with part.open("r+b" if part.exists() else "w+b") as file:
                start = file.seek(0, os.SEEK_END)
                size = found.size
                if size is not None and start > size:  # the hub would refuse that range every time
                    start = file.seek(0)
                    file.truncate()
                http_get(
                    found.location,
                    file,
                    resume_size=start,
                    headers=headers,
                    expected_size=size,
                    displayed_filename=name,
                )
            _check(part, found.etag, name)
            commit_file(part, blob)


def _blobs(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"


def _check(part: Path, etag: str, name: str) -> None:
    """Compare with the hub's checksum, which is the name of large files in its cache."""
    if not _SHA256.fullmatch(etag):
        return
    if content_digest(part, length=64) != etag:
        part.unlink()
        raise ConnectionError(f"{name} arrived damaged and was deleted")
