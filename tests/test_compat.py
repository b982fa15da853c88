"""Every private or patched name of another library is used in `unime_st.compat` or listed, and still exists."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from unime_st import compat
from unime_st.private_names import CHECKED, PRIVATE_NAMES, PrivateName

ROOT = Path(__file__).parents[1]
STABLE = {"_modules", "_forward_hooks", "_version", "_initializing", "_exit"}
"""Underscored attributes of torch's modules and tensors, of module specs and of `os`, as old as these themselves."""


@pytest.mark.parametrize("private", PRIVATE_NAMES, ids=lambda private: private.path)
def test_the_name_exists_with_its_parameters(private: PrivateName) -> None:
    module, _, attributes = private.path.partition(":")
    found: Any = importlib.import_module(module)
    # `mteb.get_tasks` and its like are hidden by functions of the same name.
    found = sys.modules[module] if inspect.ismodule(found) else found
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    if private.parameters:
        known = inspect.signature(found).parameters
        assert [name for name in private.parameters if name not in known] == []


def test_the_commit_of_a_configuration_has_its_name() -> None:
    config = PreTrainedConfig()
    config._commit_hash = "abc"
    assert compat.hub_commit(config) == "abc" and compat.hub_commit(object()) is None
    assert "_commit_hash" in inspect.getsource(PreTrainedConfig)


def test_the_conversions_of_a_loaded_model_have_their_name() -> None:
    from transformers import core_model_loading

    model = nn.Module()
    compat.forget_adapter_names(model)
    assert model._weight_conversions is None
    assert 'getattr(model, "_weight_conversions", None)' in inspect.getsource(core_model_loading)


@pytest.mark.parametrize("library", CHECKED)
def test_the_checked_version_is_one_that_may_be_installed(library: str) -> None:
    name = library.replace("_", "-")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bound = re.search(rf'"{name}(?:\[[\w,]+\])?>=([\d.]+)', pyproject)
    checked = tuple(map(int, CHECKED[library].split(".")[:2]))
    if bound is not None:
        assert tuple(map(int, bound[1].split(".")[:2])) <= checked
    assert version(name).split(".")[0] == CHECKED[library].split(".")[0], (
        f"check private_names.py on {name} {version(name)}"
    )


def _foreign_private_names(path: Path, ours: set[str]) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("unime_st", "mteb_tasks")):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]  # type: ignore[misc]
        found += [
            name for name in names if isinstance(name, str) and re.match(r"_[a-zA-Z]", name) and name not in ours
        ]
    return found


@pytest.mark.slow
def test_no_other_file_uses_private_names_of_other_libraries() -> None:
    files = [path for package in ("unime_st", "mteb_tasks") for path in (ROOT / package).rglob("*.py")]
    ours: set[str] = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
    listed = {name for private in PRIVATE_NAMES for name in private.path.rpartition(":")[2].split(".")}
    used = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        if path != ROOT / "unime_st" / "compat.py"
        for name in _foreign_private_names(path, ours | STABLE | listed)
    }
    assert used == set()


def test_importing_compat_imports_no_library() -> None:
    code = "import sys, unime_st.compat; print(sorted({'torch', 'transformers', 'mteb', 'peft'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout.strip() == "[]", run.stderr


def test_recorded_outputs_survive_pickle_and_deepcopy() -> None:
    from transformers.utils.output_capturing import install_output_capuring_hook

    layer = nn.Linear(2, 2)
    install_output_capuring_hook(layer, "hidden_states", 0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        (hook,) = twin._forward_hooks.values()
        assert isinstance(hook, compat.OutputHook)
        assert torch.equal(twin(torch.ones(1, 2)), layer(torch.ones(1, 2)))


def test_hooks_record_what_transformers_records() -> None:
    from transformers.utils.output_capturing import _active_collector, install_output_capuring_hook

    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    install_output_capuring_hook(layer, "hidden_states", 0)
    twin, seen = pickle.loads(pickle.dumps(layer)), {"hidden_states": []}
    token = _active_collector.set(seen)
    out = twin(x)
    _active_collector.reset(token)
    assert len(seen["hidden_states"]) == 2
    assert torch.equal(seen["hidden_states"][0], x) and torch.equal(seen["hidden_states"][1], out)
