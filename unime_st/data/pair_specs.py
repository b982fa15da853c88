"""Pair specifications: which columns of a table form the query and the positive of a pair.

The YAML form is parsed by :func:`parse_pairs`, checked against the columns by :func:`resolve_columns`, and applied to a
row by :func:`build_item`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from unime_st.data.column_values import as_image, as_item, as_text, as_video, is_empty
from unime_st.data.items import Item

Row = Mapping[str, object]
DEFAULT_COLUMNS = frozenset(
    [f"{side}{part}" for side in ("query", "positive") for part in ("", "_text", "_image", "_video")]
    + ["negatives", "scores", "dataset"]
)
"""Column names that :func:`default_pairs` recognizes."""

_WORD = re.compile(r"[\w.\-]+\??")


@dataclass(frozen=True)
class SideSpec:
    """Columns that form one side of a pair: an image, a video, a text, or a whole item.

    Args:
        image: Column of images. A trailing "?" allows rows without a value.
        text: Column of texts (with an optional trailing "?"), or a template with columns in braces, such as
            "What is {name}?". Lists are joined by ", ". In a join, {query.column} and {positive.column} choose the
            row.
        item: Column of whole items: a text, an image, or {"text": ..., "image": ..., "video": ...}.
        video: Column of videos: folders of frames, video files or lists of frames. A trailing "?" allows rows without.
    """

    image: str | None = None
    text: str | None = None
    item: str | None = None
    video: str | None = None


@dataclass(frozen=True)
class JoinSpec:
    """A join of the table with itself: rows with an equal value in one column are paired.

    Args:
        on: Column to join on.
        query: Conditions on the row of the query, by column: a required value, or "*" for any non-empty value.
        positive: Conditions on the row of the positive.
    """

    on: str
    query: Mapping[str, object] = field(default_factory=dict)
    positive: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSpec:
    """One kind of pair that is built from each row, or from two joined rows.

    Args:
        query: Columns of the query.
        positive: Columns of the positive.
        dataset: Dataset name of these pairs. Defaults to "".
        dataset_column: Column that contains the dataset name instead.
        negatives: Column of lists of whole items.
        scores: Column of lists of judge scores in [0, 1]: first the positive's, then one per negative.
        join: Builds the pair from two different rows.
    """

    query: SideSpec
    positive: SideSpec
    dataset: str = ""
    dataset_column: str | None = None
    negatives: str | None = None
    scores: str | None = None
    join: JoinSpec | None = None


def parse_pairs(pairs: Sequence[Mapping[str, object]]) -> list[PairSpec]:
    """Parse mappings with the fields of :class:`PairSpec`, :class:`SideSpec` and :class:`JoinSpec` (from YAML).

    Raises:
        ValueError: If a key is unknown or missing; the message lists the known keys.

    Example:
        >>> from unime_st.data.pair_specs import parse_pairs
        >>> parse_pairs([{"query": {"image": "image"}, "positive": {"text": "name"}}])[0].positive.text
        'name'
    """
    return [_parse(PairSpec, pair, f"pairs[{number}]") for number, pair in enumerate(pairs)]


def default_pairs(columns: Collection[str]) -> list[PairSpec]:
    """Derive the specification from the usual column names.

    They are query and positive (each a text, an image, a video or several of them), or some of query_text, query_image,
    query_video, positive_text, positive_image, positive_video; optional are negatives, scores, dataset.

    Raises:
        ValueError: If there is no column for the query or for the positive, or more than one choice.
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
    """Check a specification against the columns of the table.

    A text that equals a column name with spaces becomes a template.

    Raises:
        ValueError: If a column is missing; the message lists the existing columns.
    """
    spec = replace(spec, query=_named(spec.query, columns), positive=_named(spec.positive, columns))
    needed = {name for name in (spec.dataset_column, spec.negatives, spec.scores) if name is not None}
    for side in (spec.query, spec.positive):
        needed |= {name.removesuffix("?") for name in (side.image, side.item, side.video) if name is not None}
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
    """Build the side of a pair with the role ``own``, from the rows by role (without a join both are the same row).

    Raises:
        ValueError: If a value is missing or of the wrong type, or the item would be empty.
    """
    row = rows[own]
    if side.item is not None:
        return as_item(_value(row, side.item), root)
    image = None if side.image is None else _value(row, side.image)
    video = None if side.video is None else _value(row, side.video)
    text = None if side.text is None else _text(side.text, rows, own)
    return Item(
        text, None if image is None else as_image(image, root), None if video is None else as_video(video, root)
    )


def matches(conditions: Mapping[str, object], row: Row) -> bool:
    """Whether a row meets the conditions of a join: required values by column; "*" matches any non-empty value."""
    return all(
        not is_empty(row.get(name))
        if wanted == "*"
        else row.get(name) == wanted or (is_empty(wanted) and is_empty(row.get(name)))
        for name, wanted in conditions.items()
    )


def _default_side(side: str, columns: Collection[str]) -> SideSpec:
    if side in columns:
        if more := sorted({f"{side}_text", f"{side}_image", f"{side}_video"} & set(columns)):
            raise ValueError(
                f"columns {side} and {', '.join(more)} both define the {side}: rename {side} to {side}_text, or "
                "name the columns of query and positive with `pairs`"
            )
        return SideSpec(item=side)
    found = {part: f"{side}_{part}?" for part in ("image", "text", "video") if f"{side}_{part}" in columns}
    if not found:
        raise ValueError(
            f"no column {side}, {side}_text, {side}_image or {side}_video among {', '.join(sorted(columns))}; "
            "name the columns of query and positive with `pairs`"
        )
    return SideSpec(**found)


def _parse(kind: type, content: object, where: str) -> Any:
    known = [entry.name for entry in fields(kind)]
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected a mapping with {', '.join(known)}, found {content!r:.80}")
    # YAML 1.1 parses the bare word `on` as True.
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
    if isinstance(spec, SideSpec) and (spec.item is None) == (spec.image is spec.text is spec.video is None):
        raise ValueError(f"{where}: set image, video, text or several of them, or else item")
    return spec


def _is_column(text: str) -> bool:
    """Whether a text specification is a bare column name rather than a template."""
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
            raise ValueError(
                f"text {template!r}: braces may contain only a column name; write {{{{ for a literal brace"
            )
        pieces.append((literal, name))
    return pieces


def _split_role(name: str) -> tuple[str | None, str]:
    role, _, column = name.partition(".")
    return (role, column) if column and role in ("query", "positive") else (None, name)


def _text(text: str, rows: Mapping[str, Row], own: str) -> str | None:
    if _is_column(text):
        value = _value(rows[own], text)
        return None if value is None else as_text(value, text)
    parts = []
    for literal, name in _pieces(text):
        parts.append(literal)
        if name is not None:
            role, column = _split_role(name)
            parts.append(as_text(_value(rows[role or own], column), column))
    return "".join(parts)


def _value(row: Row, name: str) -> object:
    column = name.removesuffix("?")
    value = row.get(column)
    if not is_empty(value):
        return value
    if column != name:
        return None
    raise ValueError(f"column {name} has no value")
