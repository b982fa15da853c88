"""Former names of options: they work for one release, with a warning each."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

from unime_st.options import Option, OptionError, options_of


def current_names(values: Mapping[str, object], options: Mapping[str, Option]) -> tuple[dict[str, object], list[str]]:
    """Replace former names of options by their present ones.

    Returns:
        Values by present name, and a sentence for each name that was replaced.

    Raises:
        OptionError: If an option is given under both names.
    """
    former = {declared.old.partition("=")[0]: name for name, declared in options.items() if declared.old}
    switches = {declared.old: name for name, declared in options.items() if "=" in declared.old}
    found, told = dict(values), []
    for name, value in values.items():
        if name not in former or (name in options and value is None):
            continue
        del found[name]
        present = _switched(name, value, switches) if any(key.startswith(f"{name}=") for key in switches) else None
        for new, entry in (present if present is not None else {former[name]: value}).items():
            if new in values:
                raise OptionError(f"{name} is the former name of {new}: leave out {name}.")
            found[new] = entry
        shown = former[name] if present is None else " and ".join(present)
        told.append(f"{name} is now {shown}; the former name works for one more release.")
    return found, told


def _switched(name: str, value: object, switches: Mapping[str, str]) -> dict[str, object]:
    """Options that stand for the words of a former one, such as bf16 and fp16 for precision."""
    words = {key.partition("=")[2]: new for key, new in switches.items() if key.startswith(f"{name}=")}
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if value not in (*words, "fp32"):
        raise OptionError(f"{name}: expected one of fp32, {', '.join(words)}, found {value}")
    return {new: value == word for word, new in words.items()}


class FormerNames(type):
    """Metaclass of dataclasses of options: the constructor takes former names, with one warning each."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an instance."""
        options = options_of(cls)
        kwargs, told = current_names(kwargs, options)
        for sentence in told:
            warnings.warn(sentence, FutureWarning, stacklevel=2)
        for name in kwargs:
            if name not in options and name not in cls.__dataclass_fields__:  # type: ignore[attr-defined]
                near = difflib.get_close_matches(name, options, n=1)
                hint = f", or did you mean {near[0]}?" if near else "."
                raise OptionError(f"{name} is not an option of {cls.__name__}: leave it out{hint}")
        return super().__call__(*args, **kwargs)
