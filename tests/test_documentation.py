"""Code blocks of README.md, CONTRIBUTING.md and docs/: Python runs and prints what its comments say, commands run.

A comment in the line before a block says what the block needs that a test does not have:

    <!-- needs: weights -->

Such a block is compiled (Python), or its subcommands and options are looked up in the help (commands). Python blocks of
one page share their names, as a reader who pastes them one after the other would.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests import programs
from unime_st import cli
from unime_st.cli import main
from unime_st.data.scenes import write_example_images

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = ("data", "docker", "gpu", "install", "network", "server", "weights")
_BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>[\w, ]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
_PRINTED = re.compile(r"^print\(.*\)  # (.+)$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, line, language, code, and what it needs beyond the repository."""

    page: Path
    line: int
    language: str
    code: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """All fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        yield Block(page, line, found["language"], found["code"], found["needs"])


ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [block for block in ALL if block.language in ("bash", "console")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the pages speak of, and an empty `UNIME_HOME`."""
    for name in ("train_scripts", "benchmarks", "examples"):
        if (ROOT / name).is_dir():
            (tmp_path / name).symlink_to(ROOT / name)
    Image.new("RGB", (64, 48), "red").save(tmp_path / "photo.jpg")
    write_example_images(tmp_path / "images")
    (tmp_path / "captions.txt").write_text("a red ring\na blue star\n")
    things = [
        f"{color} {shape} number {n}" for color in ("red", "green") for shape in ("ring", "star") for n in range(18)
    ]
    rows = [{"query_text": f"find a {thing}", "positive_text": f"a {thing}"} for thing in things]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIME_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def commands(block: Block) -> list[str]:
    """The commands of a block, one string each, without prompts and continuation lines."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_every_block_is_known() -> None:
    """No block escapes this test by its language or by a comment that nothing reads."""
    for block in ALL:
        assert block.language in ("python", "bash", "console", "text", "yaml", "json", "bibtex"), block
        assert block.needs is None or set(re.split(", ?", block.needs)) <= set(NEEDS), block
    for page in PAGES:
        marked = len(re.findall("<!-- needs:", page.read_text(encoding="utf-8")))
        assert marked == sum(block.needs is not None for block in blocks(page)), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.slow
def test_python_blocks_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line `print(...)  # value` prints that value; a text block after a Python block is its whole output."""
    names: dict[str, object] = {"__name__": "__main__"}
    end, printed = 0, []
    for block in blocks(page):
        if block.language == "text" and block.line == end + 3:
            assert block.code.splitlines() == printed, block
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if block.needs is None:
            exec(code, names)
            end, printed = block.line + block.code.count("\n"), capsys.readouterr().out.splitlines()
            for value in _PRINTED.findall(block.code):
                assert value in printed, f"{block}: expected {value!r} among {printed}"


def known_options(program: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Help text of a subcommand of `unime`."""
    with suppress(SystemExit):
        main([program, "--help" if program in cli.COMMANDS else "--help_all"])
    return capsys.readouterr().out


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_options_of_commands_exist(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(block):
        words = shlex.split(command, comments=True)
        script = next((Path(word).stem for word in words if re.fullmatch(r"train_scripts/\w+\.py", word)), None)
        subcommand = script or (words[1] if words[0] == "unime" and len(words) > 1 else None)
        if subcommand is not None:
            text = known_options(subcommand, capsys)
            options = [word.split("=")[0] for word in words if word.startswith("--")]
            if script:
                options = options[
                    sum(word.startswith("--") for word in words[: words.index(f"train_scripts/{script}.py")]) :
                ]
            assert [option for option in options if option not in text] == [], command


def program(command: str) -> list[str] | None:
    """What `python` would be given for a command; None if it needs a shell or starts another program."""
    words = shlex.split(command, comments=True)
    if set(command) & set("$&|<>*;") or len(words) < 2:
        return None
    if words[0] == "unime":
        return ["-m", "unime_st.cli", *words[1:]]
    return words[1:] if words[0] == "python" and words[1].endswith(".py") else None


def run_in_shell(command: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euc", command], env={**os.environ, "PATH": search}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in COMMANDS if block.needs is None], ids=str)
def test_commands_run(block: Block, folder: Path) -> None:
    """Those of README.md as a shell runs them; of the other pages all that do not need one as forks, which is faster."""
    in_shell = block.page == ROOT / "README.md"
    for command in commands(block):
        words = None if in_shell else program(command)
        done = run_in_shell(command) if words is None else programs.run(words)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


def test_troubleshooting_quotes_real_messages() -> None:
    """Each heading of docs/troubleshooting.md is a part of a message of this package."""
    source = "".join(path.read_text() for name in ("unime_st", "mteb_tasks") for path in (ROOT / name).rglob("*.py"))
    headings = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    transformers = {"model type ... not recognized"}
    assert len(headings) >= 20
    assert [heading for heading in headings if heading not in source and heading not in transformers] == []


def test_links_of_the_readme_are_absolute_and_exist() -> None:
    """They also work on a package index. Those into the project name files of this checkout."""
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    assert [link for link in links if not link.startswith("https://")] == []
    raw = project.replace("https://github.com", "https://raw.githubusercontent.com")
    ours = [re.sub(rf"^({project}/blob|{raw})/main/", "", link) for link in links if "unime-st/unime-st" in link]
    assert [link for link in ours if not (ROOT / link).is_file()] == []
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
