"""Configurations of the stages: YAML files by name, read with the line of every option."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import yaml

from unime_st.former_names import current_names
from unime_st.options import Option, OptionError, unknown_option

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parents[1] / "configs"
"""Folder of the packaged configurations: ``<stage>/<name>.yaml``."""


def configs() -> dict[str, str]:
    """Packaged configurations by name, with the first line of each.

    Example:
        >>> configs()["soft_labels/tiny"]
        'UniME-V2 on the embedded default, for a laptop CPU.'
    """
    paths = sorted(FOLDER.glob("*/*.yaml"), key=lambda path: (path.parent.name, path.stem))
    return {f"{path.parent.name}/{path.stem}": _title(path) for path in paths}


def _title(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    end = first.find(". ")
    return first if end < 0 else first[: end + 1]


def find_config(name: str, stage: str | None = None) -> Path:
    """Path of a configuration.

    Args:
        name: A path; or the name of a packaged configuration, with or without its stage and ``.yaml``.
        stage: Stage that the name belongs to. Defaults to None: the name says it, or is the only one of its kind.

    Raises:
        OptionError: If there is none.

    Example:
        >>> find_config("tiny", "soft_labels").parts[-2:]
        ('soft_labels', 'tiny.yaml')
    """
    path = Path(name)
    if path.is_file():
        return path
    known = [key for key in configs() if stage in (None, key.partition("/")[0])]
    wanted = name.removesuffix(".yaml")
    found = [key for key in known if wanted in (key, key.partition("/")[2])]
    if not found and "configs" in path.parts:  # of the time when they lay beside the scripts
        found = [key for key in known if wanted.endswith(f"configs/{key}")]
        for key in found:
            logger.warning(
                "%s: the configuration is a part of the package now, write %s.", name, key.partition("/")[2]
            )
    if len(found) > 1:
        raise OptionError(f"{name}: which one of {', '.join(found)}?")
    if not found:
        choice = f" Packaged: {', '.join(key.partition('/')[2] for key in known)}." if stage and known else ""
        raise OptionError(f"{name}: no such configuration file.{choice}")
    return FOLDER / f"{found[0]}.yaml"


def read_config(path: Path, options: Mapping[str, Option]) -> dict[str, tuple[object, int]]:
    """Read a YAML file of ``option: value`` lines: value and line of every option.

    Raises:
        OptionError: If the file cannot be read, an option is unknown, or is given twice.
    """
    content, lines = _mapping(path)
    try:
        values, told = current_names(content, options)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None
    for sentence in told:
        logger.warning("%s: %s", path, sentence)
    for name in values:
        if name not in options:
            raise OptionError(f"{path}, line {lines.get(name, 1)}: {unknown_option(str(name), options)}")
    return {name: (value, lines.get(name, 1)) for name, value in values.items()}


def _mapping(path: Path) -> tuple[dict[str, object], dict[str, int]]:
    """Content of a YAML file, and the line of each key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{path}: expected UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise OptionError(
                f"{path}: expected `option: value` lines, found a {type(node).__name__.removesuffix('Node').lower()}."
            )
        _refuse_recursion(node, path)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise OptionError(f"{path}, line {line}: the name of an option must be a word.")
            if key.value in lines:
                raise OptionError(f"{path}, line {line}: {key.value} was given in line {lines[key.value]} already.")
            lines[key.value] = line
        return yaml.safe_load(text), lines
    except RecursionError:
        raise OptionError(f"{path}: lists or mappings are nested too deeply.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise OptionError(f"{path}{where}: expected YAML, but {getattr(error, 'problem', None) or error}.") from None


def _refuse_recursion(node: yaml.Node, path: Path, above: tuple[int, ...] = ()) -> None:
    if id(node) in above or len(above) > 20:
        raise OptionError(f"{path}, line {node.start_mark.line + 1}: the anchor contains itself, or is too deep.")
    if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)):
        for part in node.value:
            for child in part if isinstance(part, tuple) else (part,):
                _refuse_recursion(child, path, (*above, id(node)))
