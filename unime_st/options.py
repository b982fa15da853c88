"""Options of commands: dataclass fields with type, range, choices, unit and help, checked wherever they are given.

An option is declared once, by :func:`option`, in the dataclass that the code reads. The YAML file, the command line and
the constructor in Python are checked against that declaration before anything is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import numbers
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unime_st.declarations import UNKNOWN, Declaration, declared_fields

_NONE = ("none", "null")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NAMES = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "text", "dict": "a mapping"}
_LIMIT = 1 << 63
"""Numbers beyond it do not fit into the integers of torch and Arrow."""
_SIGNED = ("max_steps", "local_rank")
"""Stock options whose value may be negative."""


class OptionError(ValueError):
    """An option has a value that it cannot have; the message names it, what was found and what is allowed."""


def option(
    default: object,
    help: str,
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    required: bool = False,
    unless: Sequence[str] = (),
    needs: str = "",
    repeats: bool = False,
    path: str = "",
    made_by: str = "",
    old: str = "",
) -> Any:
    """Declare an option as a dataclass field.

    The arguments must be literals or constants of a module: they are read from the source as well, see
    :mod:`unime_st.declarations`.

    Args:
        default: Default value.
        help: Noun phrase for ``--help``.
        unit: Unit of the value, for ``--help``.
        choices: Words that are allowed; where the type has numbers as well, a number or one of these.
        at_least: Smallest value, or
        above: largest value that is too small.
        at_most: Largest value, or
        below: smallest value that is too large.
        required: The command cannot do without it,
        unless: except where one of these options is set.
        needs: Option that must differ from its default, else this one has no effect.
        repeats: The same value may stand in a list more than once.
        path: ``file``, ``folder``, ``any`` (file or folder) or ``stage`` (folder of a finished stage): what the path
            must lead to.
        made_by: Command that makes the path.
        old: Former name, which works for one release; ``name=value`` where the former option had words for values.

    Returns:
        A field for :func:`dataclasses.dataclass`.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Arguments:
        ...     temperature: float = option(0.02, "Temperature of the similarities.", above=0)
        >>> Arguments().temperature
        0.02
    """
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Option:
    """A declared option, see :func:`option` for the fields that are not described here.

    Args:
        name: Its name.
        kinds: Types of its value, see :class:`~unime_st.declarations.Declaration`.
        stock: Declared by transformers or Sentence Transformers.
    """

    name: str
    kinds: tuple[str, ...]
    default: object
    help: str = ""
    unit: str = ""
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    required: bool = False
    unless: tuple[str, ...] = ()
    needs: str = ""
    repeats: bool = False
    path: str = ""
    made_by: str = ""
    old: str = ""
    stock: bool = False
    const: object = None

    @classmethod
    def of(cls, declared: Declaration) -> Option:
        """The option that a dataclass field declares."""
        stock = declared.package in ("transformers", "sentence_transformers")
        known = {entry.name for entry in dataclasses.fields(cls)}
        extra = {key: value for key, value in declared.metadata.items() if key in known}
        extra["choices"] = tuple(extra.get("choices") or declared.choices)
        if stock and declared.name not in _SIGNED:
            extra.setdefault("at_least", 0)
        default = None if declared.default is UNKNOWN else declared.default
        return cls(declared.name, declared.kinds, default, stock=stock, **extra)

    @property
    def is_list(self) -> bool:
        """Whether the value is a list."""
        return any(kind.startswith("list") for kind in self.kinds)

    @property
    def metavar(self) -> str:
        """Placeholder of the value in ``--help``."""
        if self.path or self.required or self.name.endswith("output"):
            return {"file": "FILE", "any": "PATH"}.get(
                self.path, "FOLDER" if self.path or "older" in self.help else "NAME"
            )
        if self.choices:
            words = "|".join(self.choices)
            words = words if len(words) <= 32 else "NAME"
            return words if not {"int", "float"} & {*self.kinds} else f"NUMBER|{words}"
        kinds = [kind.removeprefix("list[").removesuffix("]") for kind in self.kinds if kind != "None"]
        return {"bool": "true|false", "int": "INT", "float": "NUMBER", "dict": "JSON"}.get(kinds[0], "TEXT")

    @property
    def expected(self) -> str:
        """What is allowed, in words."""
        parts = [f"a list of {_plural(kind[5:-1])}" for kind in self.kinds if kind.startswith("list")]
        parts += [_NAMES[kind] for kind in self.kinds if kind in _NAMES and not (kind == "str" and self.choices)]
        limits = [
            f"{words} {limit:g}"
            for words, limit in (
                ("of at least", self.at_least),
                ("above", self.above),
                ("of at most", self.at_most),
                ("below", self.below),
            )
            if limit is not None and any(kind in ("int", "float", "list[int]", "list[float]") for kind in self.kinds)
        ]
        text = " or ".join(parts) + (" " + " and ".join(limits) if limits else "")
        if self.choices:
            text = f"{text}, or one of " if text else "one of "
            text += ", ".join(self.choices)
        return text + (" (or none)" if "None" in self.kinds else "")

    def convert(self, value: object, *, text: bool = False) -> Any:
        """Bring a value from YAML, Python or, with ``text``, the words of a command line into the declared type.

        Raises:
            OptionError: If the value is not allowed.
        """
        if self.is_list and not ("str" in self.kinds and isinstance(value, str) and not text):
            return self._list(value, text)
        if text and isinstance(value, (list, tuple)):
            if len(value) > 1:
                raise self._refused(" ".join(map(str, value)))
            value = value[0] if value else (True if "bool" in self.kinds or self.const is True else "")
        found = self._scalar(value, text)
        if isinstance(found, float) and not isinstance(found, bool) and not math.isfinite(found):
            raise self._refused(value)
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            if abs(found) >= _LIMIT:
                raise self._refused(value, "; numbers must lie between -2**63 and 2**63")
            if not self._within(found):
                raise self._refused(value)
        return found

    def _scalar(self, value: object, text: bool) -> object:
        if value is None or ("None" in self.kinds and isinstance(value, str) and value.lower() in _NONE):
            if "None" in self.kinds:
                return None
            raise self._refused("nothing" if value is None else value)
        if isinstance(value, bool):
            if "bool" in self.kinds or value is self.const:
                return value
            if value is False and "no" in self.choices:  # YAML reads `no` as false
                return "no"
            raise self._refused("true" if value else "false")
        if self.choices and isinstance(value, str) and str(value) in self.choices:
            return value
        words = value.strip() if isinstance(value, str) else None
        if "bool" in self.kinds and text and words and words.lower() in _TRUE + _FALSE:
            return words.lower() in _TRUE
        if "dict" in self.kinds and (isinstance(value, Mapping) or (words or "").startswith("{")):
            return self._mapping(value)
        for kind in ("int", "float"):
            if kind in self.kinds and (number := _number(value, kind)) is not None:
                return number
        if "str" in self.kinds and not self.choices:
            if isinstance(value, os.PathLike):
                return os.fspath(value)
            if isinstance(value, str):
                return value
        plain = type(value) in (str, int, float) or (isinstance(value, (list, tuple, Mapping)) and "str" in self.kinds)
        if ("object" in self.kinds and not plain) or (
            self.stock and not isinstance(value, (str, int, float, list, tuple, Mapping))
        ):
            return value  # made by code, and checked by the library that declares it
        raise self._refused(value)

    def _list(self, value: object, text: bool) -> object:
        inner = tuple(kind[5:-1] for kind in self.kinds if kind.startswith("list"))
        entry = dataclasses.replace(self, kinds=inner)
        words = [str(part).lower() for part in value] if isinstance(value, (list, tuple)) else []
        if "None" in self.kinds and (value is None or (text and words in ([name] for name in _NONE))):
            return None
        if not isinstance(value, (list, tuple)) or (not value and not self.stock):
            raise self._refused(value)
        found = [entry.convert(part, text=text) for part in value]
        once = not self.stock and not self.repeats
        if repeated := [part for index, part in enumerate(found) if once and part in found[:index]]:
            raise OptionError(f"{self.name}: expected each value once, found {repeated[0]} twice")
        return found

    def _mapping(self, value: object) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return dict(value)
        try:
            found = json.loads(str(value))
        except ValueError:
            raise self._refused(value) from None
        if not isinstance(found, dict):
            raise self._refused(value)
        return found

    def _within(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def _refused(self, value: object, hint: str = "") -> OptionError:
        shown = value if isinstance(value, str) else repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        if near := difflib.get_close_matches(str(value), self.choices, n=1):
            hint = f"; did you mean {near[0]}?"
        return OptionError(f"{self.name}: expected {self.expected}, found {shown or 'nothing'}{hint}")


def check_count(name: str, value: object, at_least: int = 1) -> None:
    """Refuse an argument of a function that has to be a count.

    Args:
        name: Name of the argument.
        value: Its value.
        at_least: Smallest count. Defaults to 1.

    Raises:
        ValueError: If it is not an integer, is a boolean, or is too small.

    Example:
        >>> check_count("batch_size", 32)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}; expected an integer")


def check_weights(weights: Sequence[float]) -> None:
    """Refuse weights of an average that do not sum to 1.

    Raises:
        OptionError: If they do not.

    Example:
        >>> check_weights([0.7, 0.3])
    """
    if not abs(math.fsum(weights) - 1) <= 1e-6:  # NaN included
        raise OptionError(f"the weights must sum to 1, got {' + '.join(map(str, weights))} = {math.fsum(weights):.6g}")


def _plural(kind: str) -> str:
    return {"int": "integers", "float": "numbers", "str": "texts", "dict": "mappings"}.get(kind, "values")


def _number(value: object, kind: str) -> int | float | None:
    """The number that a value stands for; YAML 1.1 reads 1e-4 as text."""
    if isinstance(value, str):
        try:
            value = float(value) if kind == "float" or any(letter in value for letter in ".eE") else int(value)
        except ValueError:
            return None
    if not isinstance(value, numbers.Real):
        return None
    if kind == "float":
        return float(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return int(float(value)) if float(value).is_integer() else None


def read_options(module: str, name: str, path: Path | None = None) -> dict[str, Option]:
    """Options of a dataclass by name, read from its source: nothing is imported.

    Example:
        >>> read_options("unime_st.stages.mine", "MineArguments")["num_candidates"].default
        50
    """
    return {key: Option.of(declared) for key, declared in declared_fields(module, name, path).items()}


def options_of(kind: type) -> dict[str, Option]:
    """Options of an imported dataclass by name; those of a class without source file are left out."""
    for base in kind.__mro__:
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        with contextlib.suppress(LookupError):
            if dataclasses.is_dataclass(base) and file is not None:
                return read_options(base.__module__, base.__name__, Path(file))
    return {}


def check_options(arguments: object) -> None:
    """Bring every option of a dataclass instance into its declared type, in place; OptionError if one cannot be."""
    for name, declared in options_of(type(arguments)).items():
        value = getattr(arguments, name)
        if value != declared.default or isinstance(value, (bool, float)):
            setattr(arguments, name, declared.convert(value))
    check_needs(vars(arguments), options_of(type(arguments)))


def require_options(arguments: object) -> None:
    """Refuse the options of a command whose paths are missing or lead nowhere, see :func:`check_required`."""
    check_required(vars(arguments), options_of(type(arguments)))


def check_needs(values: Mapping[str, object], options: Mapping[str, Option]) -> None:
    """Refuse options that have no effect, because the option that they need has its default."""
    changed = {name for name, declared in options.items() if values.get(name, declared.default) != declared.default}
    for name, declared in options.items():
        if name in changed and declared.needs and declared.needs not in changed:
            raise OptionError(
                f"{name} has no effect without {declared.needs}: set {declared.needs}, or leave out {name}."
            )


def check_required(values: Mapping[str, object], options: Mapping[str, Option]) -> None:
    """Refuse options that are missing, have no effect or lead nowhere, in an OptionError that says what to do."""
    check_needs(values, options)
    for name, declared in options.items():
        value = values.get(name, declared.default)
        advice = f" Make it with `{declared.made_by}`." if declared.made_by else ""
        if declared.required and not value and not any(values.get(other) for other in declared.unless):
            what = declared.help.partition(";")[0].partition(":")[0].rstrip(".")
            what = what[:1].lower() + what[1:]
            raise OptionError(f"{name} is missing: give the {what} (--{name} {declared.metavar}).{advice}")
        if declared.path and value:
            _require_path(name, Path(str(value)), declared.path, advice)


def _require_path(name: str, path: Path, kind: str, advice: str) -> None:
    if not path.exists():
        raise OptionError(f"{name}: {path} does not exist.{advice}")
    if kind == "file" and not path.is_file():
        raise OptionError(f"{name}: expected a file, found the folder {path}.")
    if kind in ("folder", "stage") and not path.is_dir():
        raise OptionError(f"{name}: expected a folder, found the file {path}.{advice}")
    if kind == "stage" and not (path / "manifest.json").is_file():
        if (path / "stage.json").is_file():
            raise OptionError(f"{name}: the stage that writes {path} has not finished. Run it again.")
        raise OptionError(f"{name}: {path} has no manifest.json, so no stage wrote it.{advice}")


def unknown_option(name: str, options: Mapping[str, Option]) -> OptionError:
    """Error that names an unknown option and the nearest known one."""
    near = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "--help lists the options."
    return OptionError(f"unknown option {name!r}; {hint}")
