"""Import of own data: formats, pair specifications, rejected rows."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from unime_st.data import Item, RecordSet, StageConflictError
from unime_st.data.importing import import_records
from unime_st.data.logits import to_logits, to_scores

ODD_MODES = ("RGB", "RGBA", "P", "L", "LA", "1", "I;16", "CMYK")


def encoded(seed: int, mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> bytes:
    gray = np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)
    image = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(gray).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    return buffer.getvalue()


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rejected(folder: Path) -> list[dict]:
    path = folder / "rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def texts(records: RecordSet) -> list[tuple]:
    return [(record.query.text, record.positive.text) for record in records]


IMAGES = [{"name": f"thing {index}", "image": {"bytes": encoded(index), "path": None}} for index in range(5)]


@pytest.fixture(params=["jsonl", "json", "json lines", "parquet", "folder", "datasets"])
def same_rows(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    rows = [{"query": f"q{index}", "positive": f"p{index}", "dataset": "d"} for index in range(600)]
    if request.param == "jsonl":
        return write_lines(tmp_path / "rows.jsonl", rows)
    if request.param == "json":
        (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
        return tmp_path / "rows.json"
    if request.param == "json lines":
        return write_lines(tmp_path / "rows.json", rows)
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        return tmp_path / "rows.parquet"
    if request.param == "datasets":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"
    (tmp_path / "rows").mkdir()
    write_lines(tmp_path / "rows" / "a.jsonl", rows[:100])
    pq.write_table(pa.Table.from_pylist(rows[100:]), tmp_path / "rows" / "b.parquet")
    (tmp_path / "rows" / "README.md").write_text("not data")
    return tmp_path / "rows"


def test_every_format_gives_the_same_records(same_rows: Path, tmp_path: Path):
    records = import_records(same_rows, tmp_path / "out")
    assert texts(records) == [(f"q{index}", f"p{index}") for index in range(600)]
    assert records[7].dataset == "d" and records.manifest["rejected"] == 0
    assert len(import_records(same_rows, tmp_path / "few", limit=3)) == 3


def test_image_columns_of_datasets(tmp_path: Path):
    features = datasets.Features({"name": datasets.Value("string"), "image": datasets.Image()})
    data = datasets.Dataset.from_list(IMAGES, features=features)
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    pairs = [{"query": {"image": "image"}, "positive": {"text": "name"}}]
    for source in ("saved", "rows.parquet"):
        records = import_records(tmp_path / source, tmp_path / f"out {source}", pairs=pairs)
        assert [record.query.image.data for record in records] == [row["image"]["bytes"] for row in IMAGES]


def test_structs_paths_and_modes(tmp_path: Path):
    (tmp_path / "images").mkdir()
    for seed, mode in enumerate(ODD_MODES):
        (tmp_path / "images" / f"{seed}").write_bytes(encoded(seed, mode))
    rows = [
        {"query": {"text": "find", "image": f"images/{seed}"}, "positive": {"image": {"path": f"images/{seed}"}}}
        for seed in range(len(ODD_MODES))
    ]
    records = import_records(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    assert len(records) == len(ODD_MODES) and records.manifest["rejected"] == 0
    assert records[0].query.modality == "image+text" and records[0].positive.modality == "image"
    assert all(record.query.to_input()["image"].mode == "RGB" for record in records)
    assert records[3].query.image.path == str(tmp_path / "images" / "3")
    copied = import_records(tmp_path / "rows.jsonl", tmp_path / "copied", embed_images=True)
    assert copied[3].query.image.data == encoded(3, "L")


def test_split_columns_with_none(tmp_path: Path):
    rows = [
        {"query_text": "a", "query_image": None, "positive_text": None, "positive_image": {"bytes": encoded(0)}},
        {"query_text": "", "query_image": {"bytes": encoded(1)}, "positive_text": "b", "positive_image": None},
        {"query_text": "", "query_image": None, "positive_text": "b", "positive_image": None},
    ]
    schema = pa.schema(
        [
            (f"{side}_{part}", pa.string() if part == "text" else pa.struct([("bytes", pa.binary())]))
            for side in ("query", "positive")
            for part in ("text", "image")
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "rows.parquet")
    records = import_records(tmp_path / "rows.parquet", tmp_path / "out")
    assert [(record.query.modality, record.positive.modality) for record in records] == [
        ("text", "image"),
        ("image", "text"),
    ]
    assert [entry["row"] for entry in rejected(tmp_path / "out")] == [2]


def test_bad_rows_are_set_aside_with_their_reason(tmp_path: Path):
    (tmp_path / "cut.png").write_bytes(encoded(0, size=(64, 64))[:-500])
    (tmp_path.parent / "outside.png").write_bytes(encoded(1))
    (tmp_path / "\udcff.png").write_bytes(encoded(1))
    bad = {
        "not valid JSON": "{broken",
        "expected a JSON object": "[1]",
        "missing or empty": {"query": " ", "positive": "x"},
        "is not an image": {"query": {"image": 3}, "positive": "x"},
        "cannot be read": {"query": {"image": "absent.png"}, "positive": "x"},
        "truncated": {"query": {"image": "cut.png"}, "positive": "x"},
        "outside the image root": {"query": {"image": "../outside.png"}, "positive": "x"},
        "column query has no value": {"positive": "x"},
        "is outside [0, 1]": {"query": "q", "positive": "x", "negatives": ["n"], "scores": [0.5, 1.5]},
        "is not a number": {"query": "q", "positive": "x", "negatives": ["n"], "scores": ["0.5", 0.1]},
        "score nan": '{"query": "q", "positive": "x", "negatives": ["n"], "scores": [0.5, NaN]}',
        "expected 2 scores": {"query": "q", "positive": "x", "negatives": ["n"], "scores": [0.5]},
        "expected a list": {"query": "q", "positive": "x", "negatives": "n"},
        "surrogates not allowed": '{"query": "\\ud800", "positive": "x"}',
        "can't encode character '\\ud801'": '{"query": "q", "positive": "x", "dataset": "\\ud801"}',
        "not a usable path": '{"query": {"image": "\\udcff.png"}, "positive": "x"}',
        "recursion": "[" * 100_000,
    }
    good = {"query": "q", "positive": "p", "negatives": ["n"], "scores": [1.0, 0.0]}
    source = write_lines(tmp_path / "rows.jsonl", [good, *bad.values(), good])
    records = import_records(source, tmp_path / "out")
    assert texts(records) == [("q", "p")] * 2
    found = sorted(rejected(tmp_path / "out"), key=lambda entry: entry["row"])
    assert [entry["row"] for entry in found] == list(range(1, 1 + len(bad))) and records.manifest["rejected"] == len(
        bad
    )
    for entry, reason in zip(found, bad):
        assert reason in entry["reason"], entry
        assert entry["file"] == "rows.jsonl"


def test_absent_negatives_go_with_their_scores(tmp_path: Path):
    image = {"text": None, "image": {"bytes": encoded(0), "path": None}}
    absent = {"text": None, "image": {"bytes": None, "path": None}}
    rows = [
        {
            "query": "q",
            "positive": "p",
            "negatives": [absent, image, None, image],
            "scores": [0.9, None, 0.2, 7, 0.4],
        },
        {"query": "r", "positive": "p", "negatives": [None], "scores": [0.9, 0.1]},
        {"query": "s", "positive": "p", "negatives": [None, image], "scores": [0.9, 0.1]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    records = import_records(tmp_path / "rows.parquet", tmp_path / "out")
    assert [[item.modality for item in record.negatives] for record in records] == [["image", "image"], []]
    logits = [records[0].positive_logit, *records[0].negative_logits]
    np.testing.assert_allclose(to_scores(logits), [0.9, 0.2, 0.4], atol=1e-6)
    assert [(entry["row"], entry["reason"]) for entry in rejected(tmp_path / "out")] == [
        (2, "expected 3 scores, found [0.9, 0.1]")
    ]


def test_no_column_is_passed_over_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [{"query": "q", "positive": "p", "negative": "n", "id": 3}]
    assert len(import_records(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out")) == 1
    assert "columns that are not used: id, negative" in caplog.text
    rows = [{"query": "What is it?", "query_image": "a.png", "positive": "p"}]
    with pytest.raises(ValueError, match="columns query and query_image both define the query"):
        import_records(write_lines(tmp_path / "both.jsonl", rows), tmp_path / "both")


def test_packed_files_beside_the_data_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "rows.jsonl", [{"query": "q", "positive": "p"}])
    for name in ("more.jsonl.gz", "MORE.CSV", "README.md", "image.png"):
        (tmp_path / "data" / name).write_bytes(b"")
    assert len(import_records(tmp_path / "data", tmp_path / "out")) == 1
    assert "files with an unknown suffix are not read: MORE.CSV, more.jsonl.gz." in caplog.text


def test_csv_with_a_long_cell_and_another_encoding(tmp_path: Path):
    lines = ["query,positive", "x" * 200_000 + ",p", "caf\u00e9,p", '"two\nlines",p']
    (tmp_path / "rows.csv").write_bytes("\n".join(lines).encode("latin-1"))
    records = import_records(tmp_path / "rows.csv", tmp_path / "out")
    assert [len(record.query.text or "") for record in records] == [200_000, 9]
    assert [entry["row"] for entry in rejected(tmp_path / "out")] == [1]


def test_scores_become_log_odds(tmp_path: Path):
    rows = [{"query": "q", "positive": "p", "negatives": ["a", "b"], "scores": [1, 0.25, 0.0]}]
    record = import_records(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out")[0]
    assert all(map(math.isfinite, record.negative_logits))
    np.testing.assert_allclose(to_scores([record.positive_logit, *record.negative_logits]), [1, 0.25, 0], atol=1e-7)
    assert to_scores(to_logits(1.0)) == 1.0 and to_logits([0.3], divisor=1.05)[0] == np.float32(math.log(3 / 7) * 1.05)


def test_keys_that_only_later_rows_have_are_read(tmp_path: Path):
    rows: list[dict] = [{"query": f"q{number}", "positive": f"p{number}"} for number in range(600)]
    rows[300]["dataset"] = "late"
    rows[590] |= {"negatives": ["n"], "scores": [0.9, 0.1]}
    records = import_records(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "records")
    assert len(records) == 600 and [item.text for item in records[590].negatives] == ["n"]
    assert records[300].dataset == "late" and len(records[590].negative_logits) == 1


def test_nothing_left_is_an_error(tmp_path: Path):
    source = write_lines(tmp_path / "rows.jsonl", [{"query": "", "positive": "x"}])
    with pytest.raises(ValueError, match=r"all 1 pairs were rejected.*rejected.jsonl"):
        import_records(source, tmp_path / "out")
    assert len(rejected(tmp_path / "out")) == 1
    with pytest.raises(ValueError, match="empty"):
        import_records(write_lines(tmp_path / "empty.jsonl", []), tmp_path / "other")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"query": {"text": "nme"}, "positive": {"image": "image"}}, "unknown columns nme; the data have image, name"),
        ({"query": {"text": "a {nme} b"}, "positive": {"image": "image"}}, "unknown columns nme"),
        ({"query": {"text": "a {positive.nme}"}, "positive": {"image": "image"}}, "unknown columns nme"),
        ({"query": {"text": "name"}, "positive": {"image": "img"}}, "unknown columns img"),
        ({"query": {"text": "name"}, "positive": {"image": "image"}, "join": {"on": "base"}}, "unknown columns base"),
        (
            {"query": {"text": "name"}, "positive": {"image": "image"}, "dataest": "x"},
            "unknown key dataest; known are",
        ),
        ({"query": {"txt": "name"}, "positive": {"image": "image"}}, r"pairs\[0\].query: unknown key txt"),
        ({"query": {"text": "name"}}, "positive"),
        ({"query": {}, "positive": {"image": "image"}}, "set image, video, text or several of them"),
        ({"query": "name", "positive": {"image": "image"}}, "expected a mapping"),
        ({"query": {"text": "{name!r} x"}, "positive": {"image": "image"}}, "braces"),
    ],
)
def test_wrong_specifications(pair: dict, message: str, tmp_path: Path):
    pq.write_table(pa.Table.from_pylist(IMAGES), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        import_records(tmp_path / "rows.parquet", tmp_path / "out", pairs=[pair])


def test_default_columns_missing(tmp_path: Path):
    with pytest.raises(ValueError, match="no column query, query_text, query_image or query_video among a; name the"):
        import_records(write_lines(tmp_path / "rows.jsonl", [{"a": 1}]), tmp_path / "out")


def test_unreadable_sources(tmp_path: Path):
    for name, content in (("a.parquet", b"no"), ("a.json", b"[{},"), ("a.csv", b""), ("b.json", b'[{"query": 1}] x')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            import_records(tmp_path / name, tmp_path / f"out {name}")
    with pytest.raises(FileNotFoundError):
        import_records(tmp_path / "absent", tmp_path / "out")
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"a": 1}])}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"several splits.*train"):
        import_records(tmp_path / "splits", tmp_path / "out")


def test_started_again(tmp_path: Path):
    source = write_lines(tmp_path / "rows.jsonl", [{"query": "q", "positive": "p"}])
    import_records(source, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    import_records(source, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(StageConflictError, match="limit: None there, 1 now"):
        import_records(source, tmp_path / "out", limit=1)
    assert len(import_records(source, tmp_path / "out", limit=1, overwrite=True)) == 1


def test_images_beside_the_data_are_no_input(tmp_path: Path):
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "rows.jsonl", [{"query": "q", "positive": "p"}])
    import_records(tmp_path / "data", tmp_path / "out")
    (tmp_path / "data" / "image.png").write_bytes(encoded(0))
    import_records(tmp_path / "data", tmp_path / "out")
    write_lines(tmp_path / "data" / "more.jsonl", [{"query": "q", "positive": "p"}])
    with pytest.raises(StageConflictError, match="input data"):
        import_records(tmp_path / "data", tmp_path / "out")


def test_column_names_with_spaces_and_literal_texts(tmp_path: Path):
    rows = [{"full name": "Ada", "born": 1815, "tags": ["a", "b"]}, {"born": 1}]
    pairs = [
        {"query": {"text": "full name"}, "positive": {"text": "born in {born}: {tags} {{}}"}},
        {"query": {"text": "Who is it?"}, "positive": {"text": "full name"}},
    ]
    records = import_records(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out", pairs=pairs)
    assert texts(records) == [("Ada", "born in 1815: a, b {}"), ("Who is it?", "Ada")]
    assert len(rejected(tmp_path / "out")) == 2


EMOJI_PAIRS = yaml.safe_load(
    """
    - {dataset: image-to-name, query: {image: image}, positive: {text: name}}
    - {dataset: name-to-image, query: {text: name}, positive: {image: image}}
    - {dataset: keywords-to-image, query: {text: "{keywords}"}, positive: {image: image}}
    - dataset: composed
      query: {image: image, text: "the same, but with {positive.modifiers}"}
      positive: {image: image}
      join: {on: base, query: {modifiers: []}, positive: {modifiers: "*"}}
    """
)


def emoji_like(folder: Path) -> Path:
    """Odd images in families, with the columns of the published dataset."""
    rows = []
    for number in range(12):
        base, variant = divmod(number, 3)
        modifiers = [["dark"], ["dark", "curly hair"]][variant - 1] if variant else []
        name = ": ".join([f"thing {base}", ", ".join(modifiers)]) if modifiers else f"thing {base}"
        image = {"bytes": encoded(number, ODD_MODES[number % len(ODD_MODES)], (9 + number, 5)), "path": None}
        rows.append(
            {"name": name, "base": f"thing {base}", "modifiers": modifiers, "keywords": [name, "x"], "image": image}
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    return folder / "test.parquet"


@pytest.mark.parametrize("published", [True, False])
def test_emoji_specification(published: bool, request: pytest.FixtureRequest, tmp_path: Path):
    """On the published dataset (skipped where absent), and on a drawn one of the same columns."""
    source = request.getfixturevalue("emoji") / "test.parquet" if published else emoji_like(tmp_path)
    table = pq.read_table(source).to_pylist()
    records = import_records(source, tmp_path / "out", pairs=EMOJI_PAIRS)
    wordless = sum(not row["keywords"] for row in table)  # some emoji have none: set aside, not guessed
    assert records.manifest["rejected"] == wordless
    by_kind: dict[str, list] = {}
    for record in records:
        by_kind.setdefault(record.dataset, []).append(record)
    assert len(by_kind["image-to-name"]) == len(by_kind["name-to-image"]) == len(table)
    assert len(by_kind["keywords-to-image"]) == len(table) - wordless
    assert by_kind["keywords-to-image"][0].query.text == ", ".join(table[0]["keywords"])
    images = {row["image"]["bytes"]: row for row in table}
    expected = sum(
        bool(variant["modifiers"]) and not plain["modifiers"] and plain["base"] == variant["base"]
        for plain in table
        for variant in table
    )
    assert len(by_kind["composed"]) == expected > 0
    for record in by_kind["composed"]:
        plain, variant = images[record.query.image.data], images[record.positive.image.data]
        assert plain["base"] == variant["base"] and not plain["modifiers"]
        assert record.query.text == "the same, but with " + ", ".join(variant["modifiers"])
    assert (
        by_kind["name-to-image"][0].positive
        == by_kind["image-to-name"][0].query
        == Item(image=table[0]["image"]["bytes"])
    )
