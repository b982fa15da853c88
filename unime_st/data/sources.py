"""Rows of JSON, JSON Lines, CSV, Parquet and `datasets` files, one after the other."""

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
    """One row of a source.

    Args:
        file: Name of the file it is in.
        number: Its position in that file, from 0; a line number from 0 in JSON Lines.
        values: Column values, or None if the row cannot be read.
        error: Why it cannot be read.
    """

    file: str
    number: int
    values: dict[str, Any] | None
    error: str = ""


def read_rows(source: str | Path) -> Iterator[SourceRow]:
    """Stream the rows of a file or a folder of files.

    Args:
        source: A .jsonl, .json (a list, or one object per line), .csv (with a header line) or .parquet file; a folder of them, read in order of
            name; or a folder written by ``datasets.Dataset.save_to_disk``.

    Yields:
        SourceRow: Each row; a broken JSON line is a row with an error.

    Raises:
        FileNotFoundError: If there is nothing to read.
        ValueError: If a file has another format or is damaged beyond single rows.
    """
    for path in source_files(source):
        yield from _read_datasets(path) if path.is_dir() else _read_file(path)


def source_files(source: str | Path) -> list[Path]:
    """Find what :func:`read_rows` reads.

    Args:
        source: As there.

    Returns:
        list[Path]: Files in order, or the one folder of a saved dataset; images beside them are not among them.

    Raises:
        FileNotFoundError: If there is nothing to read.
        ValueError: If the folder holds several splits.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if (source / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in source.iterdir() if path.is_dir())
        raise ValueError(f"{source}: holds several splits; give the folder of one of them: {', '.join(splits)}")
    if (source / "state.json").is_file():
        return [source]
    files = sorted(path for path in source.iterdir() if path.suffix in SUFFIXES)
    similar = [path.name for path in source.iterdir() if _is_similar(path)]
    if similar:
        logger.warning("%s: not read, for their endings: %s.", source, ", ".join(sorted(similar)))
    if not files:
        raise FileNotFoundError(f"{source}: no {', '.join(SUFFIXES)} file and not a saved dataset")
    return files


def _is_similar(path: Path) -> bool:
    """Whether a file's name says that it holds rows, packed or in another spelling: rows.jsonl.gz, ROWS.JSONL."""
    return path.suffix not in SUFFIXES and any(part.lower() in SUFFIXES for part in path.suffixes)


def json_list(path: str | Path) -> Iterator[Any]:
    """Stream the elements of a JSON file that is one long list, in memory bounded by its largest element.

    Args:
        path: The file.

    Yields:
        Any: Each element.

    Raises:
        ValueError: If the file is not a JSON list; the message says at which element reading stopped.

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
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: damaged JSON list after element {count} ({error})") from error


class _ListReader:
    """Decodes one element at a time out of a buffer that grows only while an element does not fit."""

    def __init__(self, handle: TextIO) -> None:
        self.handle, self.buffer, self.place, self.ended = handle, "", 0, False
        self.decoder = json.JSONDecoder()

    def elements(self) -> Iterator[Any]:
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
            raise json.JSONDecodeError("something follows the list", self.buffer, self.place)

    def _next(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            while self.place < len(self.buffer) and self.buffer[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.buffer):
                return self.buffer[self.place]
            if not self._more():
                return ""

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise json.JSONDecodeError(f"expected {character!r}", self.buffer, self.place)
        self.place += 1

    def _element(self) -> Any:
        self._next()
        while True:
            try:
                element, end = self.decoder.raw_decode(self.buffer, self.place)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            # A number at the end of the buffer may go on in the file.
            if end == len(self.buffer) and self.buffer[end - 1] not in '}]"' and self._more():
                continue
            self.place = end
            return element

    def _more(self) -> bool:
        # At least doubling what is kept makes the repeated attempts at one long element linear in its length.
        kept = self.buffer[self.place :]
        fresh = "" if self.ended else self.handle.read(max(_CHUNK, len(kept)))
        self.ended = not fresh
        self.buffer, self.place = kept + fresh, 0
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
                except (ValueError, RecursionError) as error:
                    yield SourceRow(path.name, number, None, f"not valid JSON ({error})")


def _read_csv(path: Path) -> Iterator[SourceRow]:
    csv.field_size_limit(_LONGEST_CELL)
    # Bytes that are no UTF-8 become lone surrogates, and an item refuses these: the row is set aside, not the file.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        reader = csv.DictReader(handle)
        try:
            for number, values in enumerate(reader):
                if None in values or None in values.values():  # cells without a header, a header without a cell
                    yield SourceRow(path.name, number, None, "not as many cells as the header has")
                else:
                    yield SourceRow(path.name, number, dict(values))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: cannot be read as CSV ({error})") from error


def _row(file: str, number: int, element: Any) -> SourceRow:
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

    # The Arrow format hands out images as they are stored, undecoded.
    rows = datasets.load_from_disk(str(folder)).with_format("arrow")
    yield from _batches(folder.name, rows.iter(batch_size=_BATCH))


def _batches(file: str, batches: Iterable[pa.Table | pa.RecordBatch]) -> Iterator[SourceRow]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            yield SourceRow(file, number, values)
            number += 1
