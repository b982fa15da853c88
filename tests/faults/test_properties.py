"""Properties of options and records for any value: converted to the declared type and range, or refused in one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unime_st import Item
from unime_st.data import PairRecord, RecordSet
from unime_st.options import Option, OptionError, read_options
from unime_st.stages import STAGES
from unime_st.stages.command import read_values

OPTIONS = {
    (stage, name): declared
    for stage, entry in STAGES.items()
    for name, declared in read_options(f"unime_st.stages.{stage}", entry.options).items()
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
)
QUICK = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def fits(value: Any, declared: Option) -> bool:
    """Whether a converted value has a type of the option and lies in its range."""
    if isinstance(value, list):
        return declared.is_list or "object" in declared.kinds
    if isinstance(value, bool) or value is None:
        return True if value is None else "bool" in declared.kinds or value is declared.const
    if isinstance(value, (int, float)):
        limits = (
            declared.at_least is None or value >= declared.at_least,
            declared.above is None or value > declared.above,
            declared.at_most is None or value <= declared.at_most,
            declared.below is None or value < declared.below,
        )
        return math.isfinite(value) and all(limits)
    return not isinstance(value, str) or "str" in declared.kinds or "object" in declared.kinds


@QUICK
@given(st.sampled_from(sorted(OPTIONS)), VALUES)
@pytest.mark.slow
def test_any_value_of_any_option(key: tuple[str, str], value: Any):
    declared = OPTIONS[key]
    try:
        found = declared.convert(value)
    except OptionError as error:
        message = str(error).replace(repr(value), "").replace(str(value), "")
    else:
        message = f"{key[1]} "
        assert fits(found, declared), (found, declared)
        assert declared.convert(found) == found
    assert key[1] in message and "\n" not in message


@QUICK
@given(st.sampled_from(sorted(OPTIONS)), VALUES)
def test_a_file_gives_what_python_gives(tmp_path: Path, key: tuple[str, str], value: Any):
    stage, name = key
    known = {option: declared for (owner, option), declared in OPTIONS.items() if owner == stage}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({name: value}), encoding="utf-8")
    try:
        expected = known[name].convert(value)
    except OptionError:
        with pytest.raises(OptionError, match="line 1"):
            read_values([str(path)], known)
    else:
        found = read_values([str(path)], known)[name]
        assert found == expected or isinstance(value, (float, dict, list))


@QUICK
@given(
    st.lists(st.sampled_from(["--model", "--margin", "0.1", "-1", "x", "--", "--no_overwrite", "tiny"]), max_size=5)
)
def test_any_words(words: list[str]):
    known = {option: declared for (owner, option), declared in OPTIONS.items() if owner == "judge"}
    try:
        values = read_values(words, known, "judge")
    except OptionError:
        return
    assert values.keys() <= known.keys()


TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
LOGITS = st.floats(-50, 50, width=32)


@st.composite
def records(draw: st.DrawFn) -> PairRecord:
    negatives = tuple(map(Item, draw(st.lists(TEXTS, max_size=3))))
    judged = draw(st.booleans())
    logits = tuple(draw(LOGITS) for _ in negatives) if judged else ()
    positive = draw(LOGITS) if judged else None
    return PairRecord(Item(draw(TEXTS)), Item(draw(TEXTS)), draw(TEXTS), negatives, positive, logits)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(records(), min_size=1, max_size=5))
def test_records_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, rows: list[PairRecord]):
    found = RecordSet.write(tmp_path_factory.mktemp("records"), rows, {"source": "property"})
    assert list(found) == rows and [found[index] for index in range(len(found))] == rows


@QUICK
@given(VALUES, VALUES)
def test_any_parts_of_an_item(text: Any, image: Any):
    try:
        item = Item(text, image)
    except (TypeError, ValueError):
        return
    assert isinstance(item.text, str) or (item.image is not None and not text)


@QUICK
@given(VALUES, VALUES, VALUES)
def test_any_parts_of_a_record(query: Any, dataset: Any, negatives: Any):
    try:
        record = PairRecord(query, Item("p"), dataset, negatives)
    except ValueError as error:
        message = str(error)
    else:
        message = "dataset"
        assert isinstance(record.query, Item) and isinstance(record.dataset, str)
    assert "items" in message or "dataset" in message


@QUICK
@given(st.one_of(SCALARS, LOGITS), st.lists(st.one_of(SCALARS, LOGITS), max_size=3))
def test_any_logits_of_a_record(positive: Any, logits: list[Any]):
    negatives = tuple(Item(f"n{number}") for number in range(len(logits)))
    try:
        record = PairRecord(Item("q"), Item("p"), "", negatives, positive, tuple(logits))
    except ValueError as error:
        message = str(error)
    else:
        message = "logit"
        assert positive is None or all(map(math.isfinite, (record.positive_logit or 0.0, *record.negative_logits)))
    assert "logit" in message
