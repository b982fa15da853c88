"""Contents of the wheel: both packages with their data files and the start-up hook, and nothing of the repository."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import unime_st

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.parametrize("package", ["unime_st", "mteb_tasks"])
def test_every_file_of_the_packages_is_inside(wheel: zipfile.ZipFile, package: str) -> None:
    """Python files, configurations, templates, statistics, published results and the weights of `unime-tiny`."""
    files = [path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 50
    for path in files:
        name = str(path.relative_to(ROOT))
        assert wheel.getinfo(name).file_size == path.stat().st_size, name


def test_nothing_else_is_inside(wheel: zipfile.ZipFile) -> None:
    """The demo, the making of `unime-tiny`, tests and benchmarks stay in the repository."""
    folders = {name.split("/")[0] for name in wheel.namelist() if "/" in name}
    assert folders == {"unime_st", "mteb_tasks", f"unime_st-{unime_st.__version__}.dist-info"}
    assert {name for name in wheel.namelist() if "/" not in name} == {
        "_unime_st_hook.py",
        "unime_st.pth",
        "unime_st.start",
    }


def test_commands_and_plugins_are_declared(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"unime_st-{unime_st.__version__}.dist-info/entry_points.txt").decode()
    for line in ("unime = unime_st.cli:main", "unime-mteb = mteb_tasks.cli:main", "unime = mteb_tasks:register"):
        assert line in text.splitlines()


@pytest.mark.slow
def test_the_source_distribution_has_docs_and_examples(tmp_path: Path) -> None:
    """Everything that its README, tests and `make docs` need."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    left_out = {name for name in tracked if name and name not in inside}
    assert left_out <= {".ci/run", ".pre-commit-config.yaml"}, left_out
    assert {"docs/index.md", "examples/README.md", "mkdocs.yml", "constraints-lowest.txt"} <= inside
