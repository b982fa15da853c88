"""Row readers: stream the rows of JSON, JSON Lines, CSV, Parquet and `datasets` files."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

logger = logging.getLogger(__name__)
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_CHUNK = 1 << 20
_BATCH = 256
_LONGEST_CELL = 1 << 28


@dataclass(frozen=True)
class SourceRow:
    """One row of a source: its file, position in it from 0 (in JSON Lines the line), and values by column.

    ``values`` are None, with the reason in ``error``, if the row cannot be read.
    """

    file: str
    number: int
    values: dict[str, Any] | None
    error: str = ""


def read_rows(source: str | Path) -> Iterator[SourceRow]:
    """Stream the rows of a file or a folder of files.

    Args:
        source: A .jsonl, .json (a list, or one object per line), .csv (with a header line) or .parquet file; a folder
            of such files, read in order of their names; or a folder written by ``datasets.Dataset.save_to_disk``.

    Yields:
        SourceRow: Each row. A malformed JSON line gives a row with an error.

    Raises:
        FileNotFoundError: If the source does not exist or contains no such file.
        ValueError: If a file has an unknown format or is damaged as a whole.
    """
    for path in source_files(source):
        yield from _read_datasets(path) if path.is_dir() else _read_file(path)


def source_files(source: str | Path) -> list[Path]:
    """Data files that :func:`read_rows` reads, in order, or the folder of a saved dataset.

    Raises:
        FileNotFoundError: If the source does not exist or contains no data file.
        ValueError: If the folder contains several splits of a dataset.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if (source / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in source.iterdir() if path.is_dir())
        raise ValueError(f"{source}: contains several splits; name the folder of one of them: {', '.join(splits)}")
    if (source / "state.json").is_file():
        return [source]
    files = sorted(path for path in source.iterdir() if path.suffix in SUFFIXES)
    similar = [path.name for path in source.iterdir() if _is_similar(path)]
    if similar:
        logger.warning("%s: files with an unknown suffix are not read: %s.", source, ", ".join(sorted(similar)))
    if not files:
        raise FileNotFoundError(f"{source}: neither {', '.join(SUFFIXES)} files nor a saved dataset")
    return files


def _is_similar(path: Path) -> bool:
    """Whether a file looks like a compressed or differently spelled data file: rows.jsonl.gz, ROWS.JSONL."""
    return path.suffix not in SUFFIXES and any(part.lower() in SUFFIXES for part in path.suffixes)


def json_list(path: str | Path) -> Iterator[object]:
    """Stream the elements of a JSON list from a file; memory is bounded by the largest element.

    Raises:
        ValueError: If the file is not a JSON list; the message names the element where reading stopped.

    Example:
        >>> import tempfile, pathlib
        >>> from unime_st.data.sources import json_list
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.json"
        >>> _ = path.write_text('[{"a": 1}, {"a": 2}]')
        >>> [element["a"] for element in json_list(path)]
        [1, 2]
    """
    with open(path, encoding="utf-8-sig") as handle:
        count = 0
        try:
            for element in _ListReader(handle).elements():
                yield element
                count += 1
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged JSON list after {count} elements ({error})") from error


class _ListReader:
    """Decodes one element at a time from a buffer that grows only if an element does not fit."""

    def __init__(self, handle: TextIO) -> None:
        self.handle, self.buffer, self.position, self.ended = handle, "", 0, False
        self.decoder = json.JSONDecoder()

    def elements(self) -> Iterator[object]:
        self._expect("[")
        if self._next() == "]":
            self._expect("]")
        else:
            yield self._element()
            while self._next() == ",":
                self._expect(",")
                yield self._element()
            self._expect("]")
        if self._next():
            raise json.JSONDecodeError("unexpected content after the list", self.buffer, self.position)

    def _next(self) -> str:
        """Next character that is not white space, or "" at the end of the file."""
        while True:
            while self.position < len(self.buffer) and self.buffer[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self._more():
                return ""

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise json.JSONDecodeError(f"expected {character!r}", self.buffer, self.position)
        self.position += 1

    def _element(self) -> object:
        self._next()
        while True:
            try:
                element, end = self.decoder.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            # A number at the end of the buffer may continue in the file.
            if end == len(self.buffer) and self.buffer[end - 1] not in '}]"' and self._more():
                continue
            self.position = end
            return element

    def _more(self) -> bool:
        # At least doubling the buffer makes repeated attempts at one long element linear in its length.
        kept = self.buffer[self.position :]
        fresh = "" if self.ended else self.handle.read(max(_CHUNK, len(kept)))
        self.ended = not fresh
        self.buffer, self.position = kept + fresh, 0
        return bool(fresh)


def _read_file(path: Path) -> Iterator[SourceRow]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".json" and _is_list(path):
        for number, element in enumerate(json_list(path)):
            yield _row(path.name, number, element)
    elif path.suffix == ".csv":
        yield from _read_csv(path)
    elif path.suffix in SUFFIXES:
        yield from _read_lines(path)
    else:
        raise ValueError(f"{path}: unknown format {path.suffix!r}; expected {', '.join(SUFFIXES)} or a saved dataset")


def _is_list(path: Path) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as handle:
        while character := handle.read(1):
            if not character.isspace():
                return character == "["
    return False


def _read_lines(path: Path) -> Iterator[SourceRow]:
    with open(path, "rb") as handle:
        for number, line in enumerate(handle):
            if line.strip():
                try:
                    yield _row(path.name, number, json.loads(line.decode("utf-8-sig")))
                except ValueError as error:
                    yield SourceRow(path.name, number, None, f"not valid JSON ({error})")
                except RecursionError:
                    yield SourceRow(path.name, number, None, "JSON values are nested too deep (recursion)")


def _read_csv(path: Path) -> Iterator[SourceRow]:
    csv.field_size_limit(_LONGEST_CELL)
    # Bytes that are not UTF-8 become lone surrogates, which an item refuses: the row is rejected, not the file.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        reader = csv.DictReader(handle)
        try:
            for number, values in enumerate(reader):
                if None in values or None in values.values():  # more, or fewer, cells than headers
                    yield SourceRow(path.name, number, None, "the number of cells differs from the header")
                else:
                    yield SourceRow(path.name, number, dict(values))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: cannot be read as CSV ({error})") from error


def _row(file: str, number: int, element: object) -> SourceRow:
    if isinstance(element, dict):
        return SourceRow(file, number, element)
    return SourceRow(file, number, None, f"expected a JSON object, found {type(element).__name__}")


def _read_parquet(path: Path) -> Iterator[SourceRow]:
    try:
        with pq.ParquetFile(path) as file:
            yield from _batches(path.name, file.iter_batches(batch_size=_BATCH))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from error


def _read_datasets(folder: Path) -> Iterator[SourceRow]:
    import datasets

    # The Arrow format returns images as stored, undecoded.
    rows = datasets.load_from_disk(str(folder)).with_format("arrow")
    yield from _batches(folder.name, rows.iter(batch_size=_BATCH))


def _batches(file: str, batches: Iterable[pa.Table | pa.RecordBatch]) -> Iterator[SourceRow]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            yield SourceRow(file, number, values)
            number += 1
