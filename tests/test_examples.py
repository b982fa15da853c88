"""Examples: every script and notebook of examples/ runs on `unime-tiny` and prints what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from benchmarks.synthetic_mmeb import write_synthetic_mmeb
from mteb_tasks.mmeb.subsets import subset_named

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Run = Callable[..., str]
FRAMEWORKS = ("langchain_search.py", "llamaindex_search.py", "haystack_search.py")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script as a user would, in an empty folder, and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIME_HOME", str(tmp_path / "home"))

    def begin(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return begin


def test_all_are_short_and_listed() -> None:
    listed = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text()))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path
    for path in EXAMPLES.glob("*.ipynb"):
        cells = nbformat.read(path, 4).cells
        assert sum(len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code") < 60, path
        assert not any(cell.get("outputs") for cell in cells), f"{path}: clear the outputs"


def test_short_vectors(run: Run) -> None:
    printed = run("short_vectors.py", "--size", "60")
    recalls = dict(re.findall(r"^(\S.*\S) +\d+ bytes +recall@10 ([\d.]+)$", printed, re.M))
    assert float(recalls["float32, 128 dimensions"]) == 1
    assert float(recalls["int8"]) > 0.9
    assert float(recalls["binary, rescored 4x"]) >= float(recalls["binary"])


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_frameworks(run: Run, name: str) -> None:
    """With the framework the nearest image is the right one; without it the vectors are there."""
    printed = run(name)
    assert "blue-triangle" in printed.splitlines()[0] or "36 vectors of 128 dimensions" in printed


def test_evaluate_mmeb(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subsets = ("OK-VQA", "MSCOCO_t2i")
    folder = write_synthetic_mmeb(tmp_path / "mmeb", subsets=map(subset_named, subsets))
    monkeypatch.setenv("MMEB_EVAL_DIR", str(folder))
    printed = run("evaluate_mmeb.py", "--subsets", *subsets)
    assert re.search(r"^OK-VQA +[\d.]+ +UniME \(LLaVA-1.6\): 68.3$", printed, re.M)
    assert re.search(r"^MSCOCO_t2i +[\d.]+ +UniME \(LLaVA-1.6\): 74.9$", printed, re.M)


@pytest.mark.slow
def test_judge_server(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "judging"))
    from chat_server import Model, serve

    port = tmp_path / "port"
    server = get_context("fork").Process(target=serve, args=(Model(), port, [], 1), daemon=True)
    server.start()
    try:
        while not port.exists():
            assert server.is_alive()
        printed = run("judge_server.py", "--url", f"http://127.0.0.1:{port.read_text()}/v1", "--model", "tiny")
    finally:
        server.kill()
        server.join()
    assert len(re.findall(r"^  [01]\.\d\d  ", printed, re.M)) == 10
    assert "not judged" not in printed


@pytest.mark.slow
def test_mine_judge_train(run: Run) -> None:
    printed = run("mine_judge_train.py", "--rows", "150", "--steps", "4")
    assert len(re.findall(r"hit@1 0\.\d+, mean of \d tasks$", printed, re.M)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.ipynb"))])
def test_notebooks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIME_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(EXAMPLES / name, 4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stdout"
    )
    if name == "finetune_csv.ipynb":
        before, after = (float(value) for value in re.findall(r"hit@1 of all ([\d.]+)", printed))
        assert before < 0.5 < after
    else:
        assert "blue triangle [('blue-triangle'" in printed
