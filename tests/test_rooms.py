"""The order of the rooms: imports lead to earlier rooms only, and no files import each other in a circle."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("unime_st", "mteb_tasks")
ROOMS = (
    (
        "_version",
        "paths",
        "private_names",
        "compat",
        "files",
        "memory",
        "_after_import",
        "declarations",
        "durations",
        "options",
        "former_names",
    ),
    ("data",),
    ("recipes",),
    ("backbones",),
    ("losses",),
    ("encoding",),
    ("retrieval",),
    ("checkpoints",),
    ("registry", "model"),
    ("scoring",),
    ("judging", "selection"),
    ("reranking",),
    ("training",),
    ("stages",),
    ("serving",),
    ("report",),
    ("cli", "search_commands", "serve_commands"),
    ("__init__", "__main__"),
)
"""From the ground floor up; every name is a file or a folder of ``unime_st``."""
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
MAY_REPEAT = 8
"""Names, besides ``__init__``, that files may share."""


@cache
def modules() -> dict[str, Path]:
    """Files of both packages by their dotted names."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, files)}


@cache
def imports(name: str) -> frozenset[str]:
    """Modules of ours that a module imports: at its top, inside functions and under ``TYPE_CHECKING`` alike."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules() else str(node.module))
    return frozenset(found & modules().keys() - {name})


def room(name: str) -> str:
    """Room of ``unime_st`` that a module belongs to."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_file_has_a_room() -> None:
    assert {room(name) for name in modules() if name.startswith("unime_st")} <= LEVEL.keys()


def test_imports_lead_down() -> None:
    up = [
        f"{name} -> {other}"
        for name in modules()
        if name.split(".")[0] == "unime_st"
        for other in sorted(imports(name))
        if other.startswith("mteb_tasks") or LEVEL[room(other)] > LEVEL[room(name)]
    ]
    assert not up


def circles() -> list[list[str]]:
    """Strongly connected groups of more than one module (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in imports(name):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in modules():
        if name not in order:
            visit(name)
    return sorted(found)


def test_no_circle_of_files() -> None:
    assert circles() == []


def test_names_of_files_are_unique() -> None:
    counts = Counter(path.stem for path in modules().values() if path.stem != "__init__")
    repeated = sorted(name for name, count in counts.items() if count > 1)
    assert len(repeated) <= MAY_REPEAT, repeated
