"""The hook that the wheel installs, run as the interpreter would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unime_st._after_import import AfterImport
from unime_st.checkpoints import convert

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"


def run(code: str, *, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter after the line of the .pth file, with nothing else of ours imported."""
    line = (PACKAGING / "unime_st.pth").read_text().strip()
    search = os.pathsep.join(str(part) for part in (path, PACKAGING, ROOT) if part)
    # A measured run starts coverage in every subprocess, which imports what the tests look for.
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("UNIME_ST_AUTOLOAD", "COV"))}
    return subprocess.run(
        [sys.executable, "-c", f"{line}\n{code}"],
        env={**clean, "PYTHONPATH": search, "HF_HUB_OFFLINE": "1", **environment},
        cwd=PACKAGING,  # the current folder comes first on the path of `python -c`
        capture_output=True,
        text=True,
        check=False,
    )


def test_literal_command(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIME_HOME", str(tmp_path / "home"))
    convert(checkpoint("qwen2-vl"), "unime-v2-2b", alias="unime-v2-2b", image_size=56)
    code = "from sentence_transformers import SentenceTransformer as S; print(S('unime-v2-2b').encode('a cat').shape)"
    result = run(code)
    assert result.stdout.strip() == "(32,)", result.stderr


def test_programs_that_use_neither_package_are_left_alone() -> None:
    code = (
        "import sys\nbefore = {m for m in sys.modules if m.split('.')[0] in ('unime_st', 'importlib_metadata', 'typing')}\n"
        "import json, decimal\nprint('unime_st' in sys.modules, before)\n"
        "print([type(finder).__name__ for finder in sys.meta_path].count('Finder'))"
    )
    result = run(code)
    assert result.stdout.split("\n")[:2] == ["False set()", "1"], result.stderr
    assert run(code, UNIME_ST_AUTOLOAD="0").stdout.split("\n")[1] == "0"


def test_start_up_cost() -> None:
    code = (
        "import time, sys, _unime_st_hook\nfinders = list(sys.meta_path)\nbest = 1.0\n"
        "for _ in range(20):\n"
        "    sys.meta_path[:] = [f for f in finders if type(f).__name__ != 'Finder']; sys.modules.pop('_unime_st_hook')\n"
        "    start = time.perf_counter(); import _unime_st_hook; _unime_st_hook.install()\n"
        "    best = min(best, time.perf_counter() - start)\nprint(best)"
    )
    assert float(run(code).stdout) < 1e-3


def test_an_error_becomes_one_warning(tmp_path: Path) -> None:
    for name, content in (("unime_st", "raise RuntimeError('broken')"), ("mteb", "value = 1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(content)
    result = run("import mteb; print(mteb.value)", path=tmp_path)
    assert result.stdout.strip() == "1"
    assert result.stderr.count("RuntimeWarning") == 1
    assert "RuntimeError: broken" in result.stderr
    assert "UNIME_ST_AUTOLOAD=0 turns this hook off" in result.stderr


def test_looking_without_importing_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mteb").mkdir()
    (tmp_path / "mteb" / "__init__.py").write_text("value = 2")
    code = (
        "import importlib.util, sys\nprint(importlib.util.find_spec('mteb').name, 'mteb' in sys.modules)\n"
        "import unime_st.registry as r\nprint(sorted(r._registered))"
    )
    assert run(code, path=tmp_path).stdout.split("\n")[:2] == ["mteb False", "[]"]


def test_installing_twice_or_too_late() -> None:
    code = (
        "import sys\n_unime_st_hook.install()\nprint([type(f).__name__ for f in sys.meta_path].count('Finder'))\n"
        "sys.meta_path = [f for f in sys.meta_path if type(f).__name__ != 'Finder']\nsys.modules['mteb'] = sys\n"
        "_unime_st_hook.install()\nprint([type(f).__name__ for f in sys.meta_path].count('Finder'))"
    )
    assert run(code).stdout.split() == ["1", "0"]


def test_the_wheel_contains_the_hook() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for source, target in (
        ("packaging/_unime_st_hook.py", "_unime_st_hook.py"),
        ("packaging/unime_st.pth", "unime_st.pth"),
        ("packaging/unime_st.start", "unime_st.start"),
    ):
        assert f'"{source}" = "{target}"' in project
        assert (ROOT / source).is_file()
    assert (PACKAGING / "unime_st.start").read_text().strip() == "_unime_st_hook:install"
    assert "\n" not in (PACKAGING / "unime_st.pth").read_text().strip(), "one line"


def test_after_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "watched_one.py").write_text("import watched_two\nstate = 'whole'")
    (tmp_path / "watched_two.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    actions = {
        "watched_one": lambda: seen.append(sys.modules["watched_one"].state),
        "watched_two": lambda: 1 / 0,
        "watched_three": lambda: None,
    }
    finder = AfterImport(actions)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    with pytest.warns(RuntimeWarning, match="could not register itself with watched_two .ZeroDivisionError"):
        import watched_one
    assert seen == ["whole"], "the action runs after the whole module"
    assert watched_one.state == "whole"
    assert finder.watched == ("watched_three",)
    for name in ("watched_one", "watched_two"):
        del sys.modules[name]
