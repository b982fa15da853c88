"""Cases of the fuzz campaign that need no model: options, configuration files, data files, records, stage folders."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.fuzz import Case
from unime_st import Item
from unime_st.data import PairRecord, RecordSet
from unime_st.data.importing import import_records
from unime_st.options import Option, read_options
from unime_st.stages import STAGES
from unime_st.stages.command import read_values
from unime_st.stages.configs import FOLDER

WRONG: dict[str, list[Any]] = {
    "int": ["many", True, 1.5, float("nan"), float("inf"), [1, 2], {"a": 1}, -7, 10**400, ""],
    "float": ["much", True, float("nan"), float("-inf"), [0.1], {"a": 1}, "0,5", ""],
    "bool": ["perhaps", 2, 0.5, [True], {"a": 1}, float("nan")],
    "choice": ["nonsense", 7, True, ["a"], {"a": 1}, "", float("nan")],
    "list": [[], {"a": 1}, 7, [{"a": 1}], [[1]]],
    "dict": ["{", [1], 7, True, "nonsense"],
    "path": ["/nope/nowhere", 7, True, ["a"], {"a": 1}],
}
"""Values that no option of a type may have."""
WRONG_LINES = (
    "mine --num_candidats 5",
    "mine tiny more",
    "mine --data a b",
    "mine --num_candidates 5 6",
    "mine -x",
    "mine --",
    "judge nope.yaml",
    "judge --no_model",
)
"""A stage, and words after it that it refuses."""
TEXTS = ["a red circle", "", " ", "\x00", "\ud800", "é" * 3, "a\nb", "=1+1", "<|im_end|>", "x" * 20000, "\u202e", "😀"]
JUNK = [
    None,
    True,
    -1,
    1.5,
    float("nan"),
    10**30,
    [],
    [None],
    [[1]],
    {},
    {"text": None},
    {"image": 5},
    {"bytes": "x"},
    *TEXTS,
]
WRONG_FILES: tuple[bytes, ...] = (
    b"- a\n- b\n",
    b"a",
    b"data: [",
    b"data: 'x",
    b"data: a\ndata: b\n",
    b"x: &a [*a]\n",
    b"data: !!python/object:os.x y",
    b"\xff\xfe" + "data: x\n".encode("utf-16-le"),
    b"data: \xe9\n",
    b"\tdata: x\n",
    b"{}: 1\n",
    b"1: 2\n",
    b"null: 1\n",
    b"? [a]\n: b\n",
    b"data: x\n---\ndata: y\n",
    b"a: &x {b: 1}\n<<: *x\n",
    b"data: {b: &y {c: *y}}\n",
    b"data: |\n",
    b"%\n",
    b"data: 2024-01-01\n",
    b"x: " + b"[" * 3000,
    b"data: \x00\n",
    b"[]\n",
    b"true: 1\n",
    b"batch_size: 1e2147483648\n",
)
"""Configuration files of the stage `mine` that are not right."""


def options(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Wrong values of every option of the stages, by YAML and by command line."""
    for stage, entry in STAGES.items():
        known = read_options(f"unime_st.stages.{stage}", entry.options)
        for name, declared in known.items():
            if declared.stock and draw.random() > 0.12:
                continue
            for value in draw.sample(_wrong_values(declared), k=1 if declared.stock else 2):
                route = draw.choice(("yaml", "words"))
                run = _by_yaml if route == "yaml" else _by_words
                yield Case(f"{stage} {name}={value!r} by {route}", partial(run, folder, known, name, value))
    for line in WRONG_LINES:
        stage, *words = line.split()
        known = read_options(f"unime_st.stages.{stage}", STAGES[stage].options)
        yield Case(line, partial(_by_line, words, known))


def _by_line(words: list[str], known: dict[str, Option]) -> bool:
    read_values(words, known)
    return False


def _wrong_values(declared: Option) -> list[Any]:
    kinds = {kind.partition("[")[0] for kind in declared.kinds}
    if declared.choices and not kinds & {"int", "float"}:
        return WRONG["choice"]
    for kind in ("int", "float", "bool", "list", "dict"):
        if kind in kinds:
            values = list(WRONG[kind])
            if "float" in kinds and kind == "int":
                values.remove(1.5)
            for name, allowed in (("str", str), ("bool", bool), ("dict", dict), ("list", list)):
                if name in kinds:
                    values = [value for value in values if not isinstance(value, allowed)]
            if declared.at_least is None and declared.above is None:  # may be negative
                values = [value for value in values if value != -7]
            return values
    return WRONG["path"][1:]


def _by_yaml(folder: Path, known: dict[str, Option], name: str, value: Any) -> bool:
    import yaml

    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({name: value}))
    read_values([str(path)], known)
    return False


def _by_words(folder: Path, known: dict[str, Option], name: str, value: Any) -> bool:
    if isinstance(value, (list, dict)):
        return _by_yaml(folder, known, name, value)
    found = read_values([f"--{name}", str(value)], known)[name]
    # Every word of the command line is text, and some words are numbers or booleans.
    found = found[0] if isinstance(found, list) else found
    if isinstance(found, (int, float)) and known[name].is_list:  # one number makes a list
        return True
    return (isinstance(found, str) and not known[name].choices) or (isinstance(value, bool) and found is value)


def configurations(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Configuration files: hand-made faults, and packaged ones with changed bytes."""
    texts = list(WRONG_FILES)
    packaged = sorted(FOLDER.glob("*/*.yaml"))
    for _ in range(30):
        changed = bytearray(draw.choice(packaged).read_bytes())
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        texts.append(bytes(changed))
    known = read_options("unime_st.stages.mine", "MineArguments")
    everything = {
        name: option
        for stage in STAGES
        for name, option in read_options(f"unime_st.stages.{stage}", STAGES[stage].options).items()
    }
    for number, content in enumerate(texts):
        run = partial(_reads, folder / "config.yaml", content, known if number < len(WRONG_FILES) else everything)
        yield Case(repr(content[:100]), run)


def _reads(path: Path, content: bytes, known: dict[str, Option]) -> bool:
    """Whether what is read is right: nothing but known options, each of its type."""
    path.write_bytes(content)
    values = read_values([str(path)], known)
    return all(value == known[name].convert(value) for name, value in values.items())


def data_files(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Importer: files with wrong rows, wrong types, changed bytes; every row is imported or rejected with a reason."""
    for number in range(90):
        rows: list[Any] = [{"query": f"q{row}", "positive": f"p{row}"} for row in range(5)]
        wrong = draw.randrange(5)
        rows[wrong] = draw.choice([draw.choice(JUNK), {"query": draw.choice(JUNK), "positive": draw.choice(JUNK)}])
        if draw.random() < 0.4 and wrong:
            rows[0][draw.choice(("negatives", "positive"))] = draw.choice(JUNK)
        if draw.random() < 0.3 and isinstance(rows[4], dict):
            rows[4]["scores"] = draw.choice(JUNK)
        kind = draw.choice((".jsonl", ".json"))
        path = folder / f"rows{number}{kind}"
        text = "\n".join(map(json.dumps, rows)) if kind == ".jsonl" else json.dumps(rows)
        path.write_text(text)
        yield Case(f"{kind} {rows[wrong]!r}", partial(_imports, path, 5))
    for number in range(40):
        path = folder / f"bytes{number}.jsonl"
        content = bytearray(b"".join(b'{"query": "q%d", "positive": "p%d"}\n' % (row, row) for row in range(5)))
        for _ in range(draw.randint(1, 5)):
            content[draw.randrange(len(content))] = draw.choice(b'\x00\xff"{}[]\\,: x\xe9')
        path.write_bytes(content)
        yield Case(f"bytes {bytes(content[:80])!r}", partial(_imports, path, len(_lines(content))))
    for number in range(20):
        path = folder / f"table{number}.parquet"
        values = [draw.choice(["x", "y"]), None, *draw.choice(([b"x"], [1], [[1]], [{"a": 1}], ["z"], [True], [1.5]))]
        try:
            table = pa.table(
                {
                    "query": ["a", "b", "c"],
                    "positive": pa.array(values[-1:] * 3 if number % 2 else [None, *values[-1:] * 2]),
                }
            )
        except pa.ArrowInvalid:
            continue
        pq.write_table(table, path)
        yield Case(f"parquet {values!r}", partial(_imports, path, 3))
    yield from _broken_files(draw, folder)


def _broken_files(draw: random.Random, folder: Path) -> Iterator[Case]:
    good = folder / "good.parquet"
    pq.write_table(pa.table({"query": ["a", "b"], "positive": ["c", "d"]}), good)
    for number in range(20):
        content = bytearray(good.read_bytes())
        for _ in range(3):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path = folder / f"broken{number}.parquet"
        path.write_bytes(content if number % 3 else content[: draw.randrange(len(content))])
        yield Case(f"broken parquet {number}", partial(_imports, path, 2))
    for number, text in enumerate(
        (
            "",
            "\n",
            "{",
            "[",
            "[{}",
            '[{"query": "a", "positive": "b"}',
            '{"query": "a"}]',
            "[1] 2",
            "[" * 5000,
            "\ufeff[]",
            "null",
            "5",
        )
    ):
        for suffix in (".json", ".jsonl", ".csv"):
            path = folder / f"text{number}{suffix}"
            path.write_text(text)
            yield Case(f"{suffix} {text[:40]!r}", partial(_imports, path, None))
    for number in range(12):
        path = folder / f"cells{number}.csv"
        with path.open("w", newline="", errors="surrogatepass") as file:
            writer = csv.writer(file)
            writer.writerow(["query", "positive"])
            writer.writerows([["a", "b"], [draw.choice(TEXTS), draw.choice(TEXTS)], ["c"] * draw.randint(1, 3)])
        yield Case(f"csv {number}", partial(_imports, path, None))


def _lines(content: bytes | bytearray) -> list[bytes]:
    return [line for line in bytes(content).split(b"\n") if line.strip()]


def _imports(path: Path, rows: int | None) -> bool:
    """Whether every row is there or among the rejected ones, with a reason, and holds the texts of the source."""
    output = path.with_name(f"{path.name}.records")
    records = import_records(path, output, workers=1, verify_images=False)
    report = output / "rejected.jsonl"
    rejected = [json.loads(line) for line in report.read_text().splitlines()] if report.is_file() else []
    texts = all(
        item.text != "None" and item.text != "nan" for record in records for item in (record.query, record.positive)
    )
    return texts and all(entry["reason"] for entry in rejected) and rows in (None, len(records) + len(rejected))


def records(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Items and records with parts of wrong types: refused, or stored and read back as they are."""
    for _ in range(60):
        parts = draw.choice(JUNK), draw.choice([None, None, *JUNK])
        yield Case(f"Item{parts!r:.120}", partial(_item, *parts))
    for value in JUNK:
        for name in ("query", "positive", "dataset", "negatives"):
            yield Case(f"{name} {value!r:.60}", partial(_pair, name, value))
    for number in range(30):
        logits = draw.choice(
            ([], [1.0], [1.0, float("nan")], ["a", 2.0], [None, 1.0], [True, 1.0], [1.0, 2.0], 5, None)
        )
        positive = draw.choice((None, 1.0, float("nan"), float("inf"), "1", True))
        yield Case(f"logits {positive!r} {logits!r}", partial(_record, folder / f"set{number}", positive, logits))


def _item(text: Any, image: Any) -> bool:
    item = Item(text, image)
    return (
        isinstance(item.text, str) and item.text == text and (image is None or isinstance(image, (str, bytes)))
    ) or (item.image is not None and text in (None, ""))


def _pair(name: str, value: Any) -> bool:
    parts: dict[str, Any] = {"query": Item("q"), "positive": Item("p"), name: value}
    record = PairRecord(**parts)
    return isinstance(record.dataset, str) and list(record.negatives) == []


def _record(folder: Path, positive: Any, logits: Any) -> bool:
    negatives = (Item("b"), Item("c"))
    listed: Any = logits if logits is None or isinstance(logits, int) else tuple(logits)
    record = PairRecord(Item("q"), Item("p"), "", negatives, positive, listed)
    found = RecordSet.write(folder, [record], {"source": "fuzz"})[0]
    return (
        found.positive_logit == positive
        and found.negative_logits == record.negative_logits
        and not isinstance(positive, bool)
    )


def folders(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Stage folders with changed bytes, missing, additional and swapped files: found, or without any effect."""
    good = RecordSet.write(
        folder / "good", [PairRecord(Item(f"q{n}"), Item(f"p{n}")) for n in range(20)], {"source": "fuzz"}
    )
    other = RecordSet.write(folder / "other", [PairRecord(Item("a"), Item("b"))], {"source": "fuzz"})
    expected = list(good)
    names = ("items-00000.parquet", "rows-00000.parquet", "manifest.json")
    for number in range(100):
        kind, name = draw.choice(("flip", "flip", "truncate", "remove", "add", "swap", "junk")), draw.choice(names)
        yield Case(
            f"{kind} {name}",
            partial(_opens, draw.random(), good.folder, other.folder, folder / f"copy{number}", kind, name, expected),
        )


def _opens(seed: float, good: Path, other: Path, copy: Path, kind: str, name: str, expected: list[PairRecord]) -> bool:
    draw = random.Random(seed)
    shutil.copytree(good, copy)
    path = copy / name
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind == "truncate":
        os.truncate(path, draw.randrange(len(content)))
    elif kind == "remove":
        path.unlink()
    elif kind == "add":
        shutil.copy(path, copy / f"rows-0000{draw.randint(1, 9)}.parquet")
    elif kind == "swap":
        shutil.copy(other / name, path)
    else:
        path.write_bytes(draw.randbytes(draw.randrange(200)))
    found = list(RecordSet.load(copy))
    return found == expected


KINDS: tuple[Callable[[random.Random, Path], Iterator[Case]], ...] = (
    options,
    configurations,
    data_files,
    records,
    folders,
)
