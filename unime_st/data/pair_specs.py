"""How columns of somebody's data become queries and positives."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unime_st.data.images import ImageRef, resolve_inside
from unime_st.data.items import Item
from unime_st.data.parquet_shards import split_zip_path

Row = Mapping[str, Any]
DEFAULT_COLUMNS = frozenset(
    [f"{side}{part}" for side in ("query", "positive") for part in ("", "_text", "_image")]
    + ["negatives", "scores", "dataset"]
)
"""What :func:`default_pairs` recognises."""

_WORD = re.compile(r"[\w.\-]+\??")


@dataclass(frozen=True)
class SideSpec:
    """Where the image and the text of one side of a pair come from.

    Args:
        image: Column of images. A trailing "?" allows rows without one.
        text: Column of texts (a trailing "?" as above), or a text with columns in braces, such as
            "What is {name}?"; lists are joined by ", ". In a join, {query.column} and {positive.column} name the row.
        item: Column whose values are whole items: a text, an image, or {"text": ..., "image": ...}.
    """

    image: str | None = None
    text: str | None = None
    item: str | None = None


@dataclass(frozen=True)
class JoinSpec:
    """Pairs rows of one group with each other.

    Args:
        on: Column whose equal values make a group.
        query: Conditions for the row of the query, by column: an equal value, or "*" for any non-empty one.
        positive: The same for the row of the positive.
    """

    on: str
    query: Mapping[str, Any] = field(default_factory=dict)
    positive: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSpec:
    """One kind of pair to make of the rows.

    Args:
        query: Side that asks.
        positive: Side that answers.
        dataset: Name for pairs of this kind. Defaults to "".
        dataset_column: Column that holds the name instead.
        negatives: Column of lists of whole items.
        scores: Column of lists of judge scores in [0, 1]: the positive's, then one per negative.
        join: Makes pairs of two different rows.
    """

    query: SideSpec
    positive: SideSpec
    dataset: str = ""
    dataset_column: str | None = None
    negatives: str | None = None
    scores: str | None = None
    join: JoinSpec | None = None


def parse_pairs(pairs: Sequence[Mapping[str, Any]]) -> list[PairSpec]:
    """Read pair specifications as they stand in YAML.

    Args:
        pairs: Mappings with the fields of :class:`PairSpec`, :class:`SideSpec` and :class:`JoinSpec`.

    Returns:
        list[PairSpec]: The specifications.

    Raises:
        ValueError: If a key is unknown or missing; the message lists the known ones.

    Example:
        >>> from unime_st.data.pair_specs import parse_pairs
        >>> parse_pairs([{"query": {"image": "image"}, "positive": {"text": "name"}}])[0].positive.text
        'name'
    """
    return [_parse(PairSpec, pair, f"pairs[{number}]") for number, pair in enumerate(pairs)]


def default_pairs(columns: Collection[str]) -> list[PairSpec]:
    """Recognise the usual column names.

    Args:
        columns: Names of the columns. Either query and positive (each a text, an image or both), or some of
            query_text, query_image, positive_text, positive_image; optional: negatives, scores, dataset.

    Returns:
        list[PairSpec]: One specification.

    Raises:
        ValueError: If the columns are others.
    """
    return [
        PairSpec(
            query=_default_side("query", columns),
            positive=_default_side("positive", columns),
            dataset_column="dataset" if "dataset" in columns else None,
            negatives="negatives" if "negatives" in columns else None,
            scores="scores" if "scores" in columns else None,
        )
    ]


def resolve_columns(spec: PairSpec, columns: Collection[str]) -> PairSpec:
    """Check a specification against the columns that exist.

    Args:
        spec: A specification.
        columns: Names of the columns.

    Returns:
        PairSpec: The same, with column names that are not single words told apart from literal texts.

    Raises:
        ValueError: If a column is missing; the message lists those that exist.
    """
    spec = replace(spec, query=_named(spec.query, columns), positive=_named(spec.positive, columns))
    needed = {name for name in (spec.dataset_column, spec.negatives, spec.scores) if name is not None}
    for side in (spec.query, spec.positive):
        needed |= {name.removesuffix("?") for name in (side.image, side.item) if name is not None}
        needed |= _columns_of(side.text)
    if spec.join is not None:
        needed |= {spec.join.on, *spec.join.query, *spec.join.positive}
    if missing := sorted(needed - set(columns)):
        raise ValueError(
            f"pair specification {spec.dataset!r} names unknown columns {', '.join(missing)}; "
            f"the data have {', '.join(sorted(columns))}"
        )
    return spec


def build_item(side: SideSpec, rows: Mapping[str, Row], own: str, root: Path) -> Item:
    """Make one side of a pair.

    Args:
        side: Its specification.
        rows: The rows by role: "query" and "positive"; the same row twice without a join.
        own: Role of this side.
        root: Folder that image paths are relative to.

    Returns:
        Item: The item.

    Raises:
        ValueError: If a value is missing or of the wrong type, or the item would be empty.
    """
    row = rows[own]
    if side.item is not None:
        return as_item(_value(row, side.item), root)
    image = None if side.image is None else _value(row, side.image)
    text = None if side.text is None else _text(side.text, rows, own)
    return Item(text, None if image is None else as_image(image, root))


def as_item(value: Any, root: Path) -> Item:
    """Make an item of a value found in data.

    Args:
        value: A text; an image (see :func:`as_image`, but not a path); or {"text": ..., "image": ...}.
        root: Folder that image paths are relative to.

    Returns:
        Item: The item.

    Raises:
        ValueError: If the value is something else or empty.
    """
    if isinstance(value, Mapping) and value.keys() & {"text", "image"}:
        text, image = value.get("text"), value.get("image")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"text {text!r:.80} is not a string")
        return Item(text, None if is_empty(image) else as_image(image, root))
    if value is None or isinstance(value, str):
        return Item(value)
    return Item(image=as_image(value, root))


def as_image(value: Any, root: Path) -> ImageRef:
    """Make an image reference of a value found in data.

    Args:
        value: Encoded bytes, a path relative to ``root`` (or ``zip://member::archive``), or the {"bytes", "path"}
            struct of a `datasets` Image column.
        root: Folder that paths are relative to and must not leave.

    Returns:
        ImageRef: The undecoded image.

    Raises:
        ValueError: If the value is something else, or the path lies outside ``root``.
    """
    if isinstance(value, Mapping) and value.keys() & {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return ImageRef(data=value)
    if isinstance(value, str) and value:
        member, path = split_zip_path(value)
        return ImageRef(path=str(resolve_inside(root, path)), member=member)
    raise ValueError(f"no image in {value!r:.80}: expected bytes, a path or {{'bytes', 'path'}}")


def matches(conditions: Mapping[str, Any], row: Row) -> bool:
    """Say whether a row meets the conditions of a join.

    Args:
        conditions: Wanted values by column; "*" wants any non-empty one.
        row: The row.
    """
    return all(
        not is_empty(row.get(name))
        if wanted == "*"
        else row.get(name) == wanted or (is_empty(wanted) and is_empty(row.get(name)))
        for name, wanted in conditions.items()
    )


def _default_side(side: str, columns: Collection[str]) -> SideSpec:
    if side in columns:
        if more := sorted({f"{side}_text", f"{side}_image"} & set(columns)):
            raise ValueError(
                f"columns {side} and {', '.join(more)} both say what the {side} is: rename {side} to {side}_text, or "
                "say with `pairs` which columns make a query and a positive"
            )
        return SideSpec(item=side)
    image, text = (f"{side}_{part}?" if f"{side}_{part}" in columns else None for part in ("image", "text"))
    if image is None and text is None:
        raise ValueError(
            f"no column {side}, {side}_text or {side}_image among {', '.join(sorted(columns))}; "
            "say with `pairs` which columns make a query and a positive"
        )
    return SideSpec(image=image, text=text)


def _parse(kind: type, content: Any, where: str) -> Any:
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected a mapping with {', '.join(known)}, found {content!r:.80}")
    # YAML 1.1 reads the bare word `on` as a truth value.
    content = {"on" if name is True else name: value for name, value in content.items()}
    if unknown := [str(name) for name in content if name not in known]:
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    nested = {"query": SideSpec, "positive": SideSpec, "join": JoinSpec} if kind is PairSpec else {}
    for name, inner in nested.items():
        if content.get(name) is not None:
            content[name] = _parse(inner, content[name], f"{where}.{name}")
    try:
        spec = kind(**content)
    except TypeError as error:
        raise ValueError(f"{where}: a key is missing ({error}); known are {', '.join(known)}") from error
    if isinstance(spec, SideSpec) and (spec.item is None) == (spec.image is None and spec.text is None):
        raise ValueError(f"{where}: give image, text or both, or else item")
    return spec


def _is_column(text: str) -> bool:
    """Whether a text specification is a bare column name; anything with a space, brace or the like is a template."""
    return _WORD.fullmatch(text) is not None


def _named(side: SideSpec, columns: Collection[str]) -> SideSpec:
    quoted = side.text is not None and side.text in columns and not _is_column(side.text)
    return replace(side, text=f"{{{side.text}}}") if quoted else side


def _columns_of(text: str | None) -> set[str]:
    if text is None:
        return set()
    if _is_column(text):
        return {text.removesuffix("?")}
    return {_split_role(name)[1] for _, name in _pieces(text) if name is not None}


def _pieces(template: str) -> list[tuple[str, str | None]]:
    pieces = []
    for literal, name, form, conversion in string.Formatter().parse(template):
        if name == "" or form or conversion:
            raise ValueError(f"text {template!r}: braces hold a column name and nothing else; write {{{{ for a brace")
        pieces.append((literal, name))
    return pieces


def _split_role(name: str) -> tuple[str | None, str]:
    role, _, column = name.partition(".")
    return (role, column) if column and role in ("query", "positive") else (None, name)


def _text(text: str, rows: Mapping[str, Row], own: str) -> str | None:
    if _is_column(text):
        value = _value(rows[own], text)
        return None if value is None else _joined(value, text)
    parts = []
    for literal, name in _pieces(text):
        parts.append(literal)
        if name is not None:
            role, column = _split_role(name)
            parts.append(_joined(_value(rows[role or own], column), column))
    return "".join(parts)


def _value(row: Row, name: str) -> Any:
    column = name.removesuffix("?")
    value = row.get(column)
    if not is_empty(value):
        return value
    if column != name:
        return None
    raise ValueError(f"column {name} has no value")


def is_empty(value: Any) -> bool:
    """Say whether a value found in data stands for nothing: None, nothing in it, or a struct of such values.

    Args:
        value: Any value.
    """
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return value is None or value in ("", b"", [])


def _joined(value: Any, name: str) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, (Mapping, bytes)):
        raise ValueError(f"column {name} holds {type(value).__name__}, which is no text")
    return str(value)
