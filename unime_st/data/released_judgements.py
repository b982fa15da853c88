"""The judge files that UniME-V2 released, in and out."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from tqdm.auto import tqdm

from unime_st.data.images import BadImageError, ImageRef, resolve_inside
from unime_st.data.items import Item
from unime_st.data.logits import check_scores, to_logits, to_scores
from unime_st.data.manifest import begin_stage, finish_stage, publish
from unime_st.data.records import PairRecord, RecordSet, RecordWriter
from unime_st.data.sources import SourceRow, read_rows
from unime_st.data.validation import Candidate, ImageChecker, RejectedWriter, require_some, write_checked

PLACEHOLDER = "<|image_1|>"
"""Stands in the released texts where their image belongs."""

SCORE_DIVISOR = 1.05
"""What the released scores' log-odds were divided by: the judge's repetition penalty (spec: scores are
sigmoid((l_Yes - l_No) / 1.05))."""

_COLUMNS = (
    pa.field("scores", pa.list_(pa.float64())),
    pa.field("image_paths", pa.list_(pa.string())),
    pa.field("source", pa.string()),
)


def import_released(
    source: str | Path,
    output: str | Path,
    *,
    image_root: str | Path,
    score_divisor: float = SCORE_DIVISOR,
    read_images: bool = True,
    limit: int | None = None,
    workers: int = 4,
    overwrite: bool = False,
) -> RecordSet:
    """Import a released UniME-V2 training file (a JSON list of up to a million records) without loading it whole.

    Texts lose the placeholder in front (images come first anyway); scores become log-odds. The exact scores and image
    paths, and the whole record where it has another form than usual, are kept in further columns, so that
    :func:`export_released` gives back what was read. Records that cannot be used go to ``rejected.jsonl``.

    Args:
        source: The JSON file.
        output: Folder to write.
        image_root: Folder that the file's image paths are relative to: a copy of TIGER-Lab/MMEB-train.
        score_divisor: Log-odds = logit(score) * divisor. Defaults to 1.05, which gives l_Yes - l_No of the released
            files; 1.0 takes the scores at face value.
        read_images: Decode every image once and know items by content. False does not touch the images, so that they
            may be elsewhere; an image is then known by its path. Defaults to True.
        limit: Read only so many records. Defaults to None, all.
        workers: Threads that decode. Defaults to 4.
        overwrite: Replace an output made with other options. Defaults to False.

    Returns:
        RecordSet: Judged records; ``dataset`` is the folder name behind ``images/`` of the first path that has one.

    Raises:
        ValueError: If the file is damaged or nothing could be imported.
        StageConflictError: If the output was made of something else and ``overwrite`` is False.

    Example:
        ::

            from unime_st.data.released_judgements import export_released, import_released

            records = import_released("train_data_Qwen25VL_7B_scores.json", "records", image_root="MMEB-train")
            export_released(records, "again.json")
    """
    source, output, root = Path(source), Path(output), Path(image_root)
    options = {
        "image_root": str(image_root),
        "score_divisor": score_divisor,
        "read_images": read_images,
        "limit": limit,
    }
    if not begin_stage(output, "import released", inputs=[source], options=options, overwrite=overwrite):
        return RecordSet.load(output)
    with (
        RecordWriter(output, image_root=root, extra=_COLUMNS) as writer,
        RejectedWriter(output) as rejected,
        ImageChecker(workers) if read_images else nullcontext() as checker,
    ):
        rows = tqdm(islice(read_rows(source), limit), desc=f"importing {source.name}", unit="row")
        candidates = _candidates(rows, root, score_divisor, read_images, rejected)
        write_checked(candidates, writer, rejected, checker)
    require_some(writer, rejected, source)
    finish_stage(output, {**writer.counts, "source": str(source), "rejected": rejected.count})
    return RecordSet.load(output)


def export_released(
    records: RecordSet,
    path: str | Path,
    *,
    score_divisor: float = SCORE_DIVISOR,
    image_folder: str | Path | None = None,
) -> int:
    """Write judged records in the form of the released files.

    Records imported from such a file come out equal to their source; others are put into its form.

    Args:
        records: Judged records.
        path: JSON file to write; it appears when it is complete.
        score_divisor: Score = sigmoid(log-odds / divisor) for records that were not imported. Defaults to 1.05.
        image_folder: Where images that are stored as bytes are written, named by their content; the JSON then holds
            paths relative to it. Defaults to None, which refuses such images.

    Returns:
        int: Number of records written.

    Raises:
        ValueError: If a record was not judged, or an image has no path and there is no ``image_folder``.

    Example:
        See :func:`import_released`.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write("[")
            for count, text in enumerate(_texts(records, score_divisor, image_folder)):
                handle.write(("," if count else "") + "\n" + text)
            handle.write("\n]\n")
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(records)


def _texts(records: RecordSet, divisor: float, image_folder: str | Path | None) -> Iterator[str]:
    root = records.manifest.get("image_root")
    rows = zip(records, records.row_shards.rows())
    for record, row in tqdm(rows, total=len(records), desc="exporting", unit="row"):
        yield row.get("source") or json.dumps(_exported(record, row, divisor, root, image_folder), ensure_ascii=False)


def _candidates(
    rows: Iterator[SourceRow], root: Path, divisor: float, read_images: bool, rejected: RejectedWriter
) -> Iterator[Candidate]:
    for row in rows:
        where = {"file": row.file, "row": row.number}
        if row.values is None:
            rejected.add(row.error, **where)
            continue
        try:
            record, extra = _imported(row.values, root, divisor, read_images)
        except (ValueError, TypeError) as error:
            rejected.add(str(error), **where)
            continue
        yield Candidate(where, record, extra)


def _imported(
    values: Mapping[str, Any], root: Path, divisor: float, read_images: bool
) -> tuple[PairRecord, dict[str, Any]]:
    pairs = [_pair(values, "query_text", "query_image"), _pair(values, "pos_text", "pos_image")]
    negatives = values.get("hard_negatives")
    if not isinstance(negatives, list):
        raise ValueError(f"hard_negatives is {negatives!r:.80}, expected a list of [text, image path]")
    for negative in negatives:
        if not (isinstance(negative, list) and len(negative) == 2 and all(isinstance(part, str) for part in negative)):
            raise ValueError(f"hard negative {negative!r:.80}: expected [text, image path]")
        pairs.append((negative[0], negative[1]))
    scores = check_scores([values.get("query_pos_scores")], 1)
    scores += check_scores(values.get("hard_negatives_scores"), len(negatives))
    query, positive, *others = [released_item(text, path, root, read_images) for text, path in pairs]
    logits = to_logits(scores, divisor=divisor).tolist()
    paths = [path for _, path in pairs]
    record = PairRecord(query, positive, _dataset(paths), tuple(others), logits[0], tuple(logits[1:]))
    extra = {"scores": scores, "image_paths": paths, "source": None}
    original = json.dumps(values, ensure_ascii=False)
    if json.dumps(_exported(record, extra, divisor, None, None), ensure_ascii=False) != original:
        original.encode("utf-8")  # a lone surrogate cannot be stored; UnicodeEncodeError is a ValueError
        extra["source"] = original
    return record, extra


def _pair(values: Mapping[str, Any], text: str, image: str) -> tuple[str, str]:
    for name in (text, image):
        if not isinstance(values.get(name), str):
            raise ValueError(f"{name} is {values.get(name)!r:.80}, expected a string")
    return values[text], values[image]


def released_item(text: str, path: str, root: Path, read_images: bool) -> Item:
    """Make an item of a text and an image path, as MMEB-train and the released files give them.

    Args:
        text: Text; a placeholder in front, where the image belongs, is left out.
        path: Image path relative to ``root``; empty for none.
        root: Folder that the path must not leave.
        read_images: Know the image by its content; otherwise by its path, without reading it.

    Returns:
        Item: The item.

    Raises:
        ValueError: If there is neither a text nor an image, or the path leaves ``root``.
    """
    if not path:
        return Item(text)
    image = ImageRef(path=str(resolve_inside(root, path)))
    stripped = text.removeprefix(PLACEHOLDER)
    if read_images:
        return Item(stripped, image)
    key = sha256(json.dumps([stripped, path]).encode("utf-8")).hexdigest()[:32]
    return Item.stored(stripped, image, key)


def _dataset(paths: list[str]) -> str:
    parts = next((path.split("/") for path in paths if path), [])
    return parts[1] if len(parts) > 2 and parts[0] == "images" else ""


def _exported(
    record: PairRecord,
    row: Mapping[str, Any],
    divisor: float,
    root: str | None,
    image_folder: str | Path | None,
) -> dict[str, Any]:
    if record.positive_logit is None:
        raise ValueError(
            f"a record of data set {record.dataset!r} was not judged; only judged records can be exported"
        )
    items = (record.query, record.positive, *record.negatives)
    paths = row.get("image_paths") or [_path(item.image, root, image_folder) for item in items]
    scores = row.get("scores") or to_scores([record.positive_logit, *record.negative_logits], divisor=divisor).tolist()
    texts = [(PLACEHOLDER if path else "") + (item.text or "") for item, path in zip(items, paths)]
    return {
        "query_text": texts[0],
        "query_image": paths[0],
        "pos_text": texts[1],
        "pos_image": paths[1],
        "query_pos_scores": scores[0],
        "hard_negatives": [[text, path] for text, path in zip(texts[2:], paths[2:])],
        "hard_negatives_scores": scores[1:],
    }


def _path(image: ImageRef | None, root: str | None, image_folder: str | Path | None) -> str:
    if image is None:
        return ""
    if image.path is not None and image.member is None and root is not None:
        return Path(image.path).relative_to(Path(root).resolve()).as_posix()
    if image_folder is None:
        raise ValueError(f"image {image.label} has no path of its own; give image_folder to write such images to")
    return _saved(image, Path(image_folder))


def _saved(image: ImageRef, folder: Path) -> str:
    data = image.read()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            suffix = (opened.format or "bin").lower()
    except OSError as error:
        raise BadImageError(f"image {image.label}: cannot be opened ({error})") from error
    name = f"{sha256(data).hexdigest()[:32]}.{suffix}"
    if not (folder / name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        temporary.write_bytes(data)
        publish(temporary, folder / name)
    return name
