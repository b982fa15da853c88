"""The examples in the docstrings of the losses run as they are printed."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from unime_st import losses


@pytest.mark.parametrize("name", losses.__all__)
@pytest.mark.slow
def test_the_example_of_the_docstring_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documented = getattr(losses, name).__init__.__doc__
    block = re.search(r"Example:\n +::\n(.*)", documented, re.DOTALL)
    assert block is not None
    # A teacher that needs no download; any embedding model can be one.
    code = textwrap.dedent(block[1]).replace("sentence-transformers/all-MiniLM-L6-v2", "unime-tiny")
    monkeypatch.chdir(tmp_path)  # the trainer makes a folder for its checkpoints
    names: dict[str, Any] = {}
    exec(compile(code, name, "exec"), names)
    assert names["trainer"].state.global_step == 3
