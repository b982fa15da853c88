"""`unime pull` against a hub on this machine, in a process of its own."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from local_hub import COMMIT, Hub, local_hub

from unime_st.checkpoints import pull
from unime_st.paths import AliasError

pytestmark = pytest.mark.slow

REPOSITORY = "TianchengGu/UniME-V2-Qwen2VL-2B"


@pytest.fixture(scope="module")
def repository(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen2-vl")


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    with local_hub(REPOSITORY, repository) as running:
        yield running


COMMAND = [sys.executable, "-m", "unime_st.cli", "pull", "unime-v2-2b"]


def environment(endpoint: str, home: Path) -> dict[str, str]:
    ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "UNIME_HOME": str(home / "unime")}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **ours, **quiet}


def run(endpoint: str, home: Path, *, file_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.run(
        COMMAND, env=environment(endpoint, home), capture_output=True, text=True, preexec_fn=limit, check=False
    )


def models_left(home: Path) -> list[str]:
    """Everything in the folder of models but the lock, which a killed process leaves and nobody minds."""
    return [name for name in os.listdir(home / "unime" / "models") if not name.endswith(".lock")]


def test_a_killed_download_leaves_nothing_and_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.hold = True
    with subprocess.Popen(COMMAND, env=environment(hub.url, tmp_path), stderr=subprocess.DEVNULL) as process:
        assert hub.half_sent.wait(300)
        small = {path.name for path in hub.files()} - {"model.safetensors"}
        deadline = time.monotonic() + 300
        while (complete := {path.name for path in (tmp_path / "hf").rglob("snapshots/*/*")}) != small:
            assert time.monotonic() < deadline, complete
            time.sleep(0.05)
        process.kill()
    assert models_left(tmp_path) == []

    hub.hold = False
    hub.requests.clear()
    second = run(hub.url, tmp_path)
    assert second.returncode == 0, second.stderr
    assert 'SentenceTransformer("unime-v2-2b")' in second.stdout
    fetched = {request.rsplit("/", 1)[1] for request in hub.requests if request.startswith("GET /Tiancheng")}
    assert fetched == {"model.safetensors"}, "files that were complete are not fetched again"
    folder = tmp_path / "unime" / "models" / "unime-v2-2b"
    cached = next((tmp_path / "hf").rglob("snapshots/*/model.safetensors"))
    assert (folder / "model.safetensors").samefile(cached), "a link, not a copy"
    assert (folder / "model.safetensors").read_bytes() == (hub.folder / "model.safetensors").read_bytes()
    assert f'"revision": "{COMMIT}"' in (folder / "unime.json").read_text()


def test_a_half_fetched_file_is_continued_and_a_damaged_one_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    weights = (hub.folder / "model.safetensors").read_bytes()
    blobs = tmp_path / "hf" / "hub" / ("models--" + hub.repository.replace("/", "--")) / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{hashlib.sha256(weights).hexdigest()}.unime-part"
    half = len(weights) // 2
    part.write_bytes(bytes(half))  # of another file: the checksum tells
    broken = run(hub.url, tmp_path)
    assert broken.returncode == 1 and "model.safetensors arrived damaged" in broken.stderr
    assert not part.exists() and models_left(tmp_path) == []
    part.write_bytes(weights[:half])
    hub.requests.clear()
    result = run(hub.url, tmp_path)
    assert result.returncode == 0, result.stderr
    (fetched,) = [request for request in hub.requests if request.startswith("GET") and ".safetensors" in request]
    assert fetched.endswith(f"[from {half}]")
    assert (tmp_path / "unime" / "models" / "unime-v2-2b" / "model.safetensors").read_bytes() == weights


def test_no_network(tmp_path: Path) -> None:
    result = run("http://127.0.0.1:9", tmp_path)  # the discard port: nobody listens
    assert result.returncode == 1
    assert "could not be fetched from TianchengGu/UniME-V2-Qwen2VL-2B" in result.stderr
    assert "`unime pull unime-v2-2b` fetches it" in result.stderr
    assert "unime convert FOLDER --recipe unime-v2-2b --alias unime-v2-2b" in result.stderr


def test_too_little_space_is_said_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.claimed_size = 10**15
    result = run(hub.url, tmp_path)
    assert result.returncode == 1
    assert "needs 1000000.0 GB more in" in result.stderr
    assert "Nothing has been downloaded" in result.stderr
    assert not [request for request in hub.requests if request.startswith("GET /Tiancheng")]


def test_a_full_disk_is_named(hub: Hub, tmp_path: Path) -> None:
    result = run(hub.url, tmp_path, file_limit=(hub.folder / "model.safetensors").stat().st_size // 2)
    assert result.returncode == 1
    assert "failed: File too large. Free some space or set HF_HUB_CACHE" in result.stderr
    assert "Traceback" not in result.stderr
    assert models_left(tmp_path) == []


def test_what_is_there_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIME_HOME", str(tmp_path))
    folder = tmp_path / "models" / "unime-v2"
    folder.mkdir(parents=True)
    assert pull("unime-v2", local_files_only=True) == folder


def test_offline_and_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIME_HOME", str(tmp_path))
    with pytest.raises(AliasError, match=r"may not be asked .offline.*`unime pull unime-v1-phi3.5`.*--alias"):
        pull("unime-v1-phi3.5", local_files_only=True)
    with pytest.raises(AliasError, match=r"'unime-v9' is not a released model. Released: unime-v2, "):
        pull("unime-v9")
