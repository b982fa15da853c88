"""Dataclass fields read from source code, without importing it.

The options of a training stage inherit transformers' ``TrainingArguments``, whose import takes 15 seconds on a small
machine. ``--help`` and the check of a command line need the names, types, defaults and help of the fields only, and
those stand in the source as literals.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

UNKNOWN = object()
"""Stands for a default that is computed when the module is imported."""

_PLAIN = ("bool", "int", "float", "str", "dict")


@dataclass(frozen=True)
class Declaration:
    """A dataclass field as its source declares it.

    Args:
        name: Name of the field.
        kinds: What its annotation allows, of ``bool, int, float, str, dict, None, list[int], ..., object``; the last one
            is anything else.
        default: Default value, or :data:`UNKNOWN`.
        metadata: Literal entries of the field's metadata.
        choices: Values of the enumeration in the annotation, if there is one.
        package: Top-level package that declares it.
    """

    name: str
    kinds: tuple[str, ...]
    default: object
    metadata: dict[str, Any]
    choices: tuple[str, ...]
    package: str


@dataclass
class _Module:
    """Parsed source of a module: its classes, constants and imports by name."""

    name: str
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    constants: dict[str, ast.expr] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)


@lru_cache(maxsize=64)
def declared_fields(module: str, name: str, path: Path | None = None) -> dict[str, Declaration]:
    """Fields of a dataclass and of the dataclasses that it inherits, those of base classes first.

    ``path`` is the source file of a module that is not found by its name.

    Raises:
        LookupError: If the module or the class is not found.
    """
    parsed = _parsed(module, path or locate(module))
    if name not in parsed.classes:
        raise LookupError(f"{module} has no class {name}.")
    return _fields(parsed, parsed.classes[name])


def docstring(module: str, name: str | None = None) -> str:
    """Docstring of a module, or of a class in it; empty where there is none."""
    path = locate(module)
    node = ast.parse(path.read_bytes()) if name is None else _parsed(module, path).classes[name]
    return ast.get_docstring(node) or ""


def locate(module: str) -> Path:
    """Source file of a module, found without importing its package; LookupError if there is none."""
    if module in sys.modules and (file := getattr(sys.modules[module], "__file__", None)):
        return Path(file)
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        base = Path(folder, *parts)
        for path in (base.with_suffix(".py") if parts else base / "__init__.py", base / "__init__.py"):
            if path.is_file():
                return path
    raise LookupError(f"no source file of {module} was found.")


@lru_cache(maxsize=64)
def _parsed(module: str, path: Path) -> _Module:
    parsed = _Module(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ClassDef):
            parsed.classes.setdefault(node.name, node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            parsed.constants[node.targets[0].id] = node.value  # the last one counts, as it does when it is imported
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            for alias in node.names:
                parsed.imports.setdefault(
                    alias.asname or alias.name, (f"{above}{node.module or ''}".strip("."), alias.name)
                )
    return parsed


def _find(module: _Module, name: str, depth: int = 8) -> tuple[_Module, ast.ClassDef] | None:
    """Class of that name, where it is defined."""
    if name in module.classes:
        return module, module.classes[name]
    if name not in module.imports or not depth:
        return None
    source, original = module.imports[name]
    try:
        return _find(_parsed(source, locate(source)), original, depth - 1)
    except LookupError:
        return None


def _fields(module: _Module, node: ast.ClassDef) -> dict[str, Declaration]:
    found: dict[str, Declaration] = {}
    for base in reversed(node.bases):
        name = base.id if isinstance(base, ast.Name) else ""
        if parent := _find(module, name):
            found.update(_fields(*parent))
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            if not name.startswith("_") and not ast.unparse(statement.annotation).startswith("ClassVar"):
                declared = _declaration(module, name, statement)
                if name in found and found[name].package != declared.package:
                    del found[name]  # so that options stand in the order of the class that redeclares them
                found[name] = declared
    return found


def _declaration(module: _Module, name: str, statement: ast.AnnAssign) -> Declaration:
    default: object = UNKNOWN
    metadata: dict[str, Any] = {}
    value = statement.value
    if isinstance(value, ast.Call):
        given = {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg}
        if isinstance(value.func, ast.Name) and value.func.id == "option":
            default = _value(module, value.args[0])
            metadata = {"help": _value(module, value.args[1])}
            metadata |= {key: _value(module, node) for key, node in given.items()}
        else:
            default = _value(module, given["default"]) if "default" in given else UNKNOWN
            entries = given.get("metadata")
            if isinstance(entries, ast.Dict):
                metadata = {
                    str(_value(module, key)): _value(module, node)
                    for key, node in zip(entries.keys, entries.values, strict=True)
                    if key is not None
                }
    elif value is not None:
        default = _value(module, value)
    metadata = {key: entry for key, entry in metadata.items() if entry is not UNKNOWN}
    kinds, choices = _kinds(module, statement.annotation)
    return Declaration(name, tuple(dict.fromkeys(kinds)), default, metadata, choices, module.name.split(".")[0])


def _value(module: _Module, node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, ast.Name):
        if node.id in module.constants:
            return _value(module, module.constants[node.id])
        if node.id in module.imports:
            source, original = module.imports[node.id]
            try:
                return _value(_parsed(source, locate(source)), ast.Name(original))
            except LookupError:
                return UNKNOWN
    return UNKNOWN


def _kinds(module: _Module, node: ast.expr) -> tuple[list[str], tuple[str, ...]]:
    """What an annotation allows, and the values of an enumeration in it."""
    if isinstance(node, ast.Constant):
        return (["None"], ()) if node.value is None else _kinds(module, ast.parse(str(node.value), mode="eval").body)
    if isinstance(node, ast.BinOp):
        return _joined(_kinds(module, part) for part in (node.left, node.right))
    if isinstance(node, ast.Subscript):
        outer = ast.unparse(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer in ("Union", "Optional"):
            kinds, choices = _joined(_kinds(module, part) for part in parts)
            return ([*kinds, "None"] if outer == "Optional" else kinds), choices
        if outer in ("list", "Sequence"):
            return [f"list[{kind}]" for kind in _kinds(module, parts[0])[0]], ()
        if outer == "Literal":
            words = tuple(
                part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)
            )
            return (["str"] if words else ["object"]), words
        return (["dict"] if outer == "dict" else ["object"]), ()
    if isinstance(node, ast.Name):
        if node.id in _PLAIN:
            return [node.id], ()
        if found := _find(module, node.id):
            members = _members(found[1])
            return (["str"], members) if members else (["object"], ())
    return ["object"], ()


def _joined(parts: Iterator[tuple[list[str], tuple[str, ...]]]) -> tuple[list[str], tuple[str, ...]]:
    kinds: list[str] = []
    choices: tuple[str, ...] = ()
    for more, values in parts:
        kinds += more
        choices += values
    return kinds, choices


def _members(node: ast.ClassDef) -> tuple[str, ...]:
    """Values of an enumeration of strings."""
    if not any("Enum" in ast.unparse(base) for base in node.bases):
        return ()
    values = [statement.value for statement in node.body if isinstance(statement, ast.Assign)]
    return tuple(value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str))
