"""Importer and exporter of the judge score files released with UniME-V2."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pyarrow as pa
from PIL import Image
from tqdm.auto import tqdm

from unime_st.data.images import BadImageError, ImageRef, resolve_inside
from unime_st.data.items import Item
from unime_st.data.logits import check_scores, to_logits, to_scores
from unime_st.data.manifest import begin_stage, finish_stage
from unime_st.data.parquet_shards import Row
from unime_st.data.records import PairRecord, RecordSet, RecordWriter
from unime_st.data.sources import SourceRow, read_rows
from unime_st.data.validation import Candidate, ImageChecker, RejectedWriter, raise_if_empty, write_checked
from unime_st.files import atomic_write, digest, locks_folder

PLACEHOLDER = "<|image_1|>"
"""Image placeholder in the texts of the released files."""

SCORE_DIVISOR = 1.05
"""Divisor of the log-odds in the released files: scores are sigmoid((l_Yes - l_No) / 1.05), where 1.05 is the judge's
repetition penalty."""

_COLUMNS = (
    pa.field("scores", pa.list_(pa.float64())),
    pa.field("image_paths", pa.list_(pa.string())),
    pa.field("source", pa.string()),
)


@locks_folder("output")
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
    """Import a released UniME-V2 training file, a JSON list of up to a million records that is read as a stream.

    A leading image placeholder is removed from texts, and scores are converted to log-odds. The exact scores and image
    paths, and the whole record where it deviates from the usual form, are stored in additional columns, so that
    :func:`export_released` reproduces the file. Invalid records go to ``rejected.jsonl``.

    Args:
        source: The JSON file.
        output: Output folder.
        image_root: Folder that the image paths in the file are relative to: a copy of TIGER-Lab/MMEB-train.
        score_divisor: Factor in log-odds = logit(score) * divisor. Defaults to 1.05, which recovers l_Yes - l_No from
            the released files. 1.0 uses the scores as they are.
        read_images: Decode every image once and identify items by content. False does not read the images, which may
            be elsewhere; an image is then identified by its path. Defaults to True.
        limit: Maximum number of records. Defaults to None, all.
        workers: Number of decoding threads. Defaults to 4.
        overwrite: Replace an output that was made with other options. Defaults to False.

    Returns:
        RecordSet: Judged records. ``dataset`` is the folder below ``images/`` of the first image path.

    Raises:
        ValueError: If the file is damaged or no record could be imported.
        StageConflictError: If the output was made with other inputs or options and ``overwrite`` is False.

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
    raise_if_empty(writer, rejected, source)
    finish_stage(output, {**writer.counts, "source": str(source), "rejected": rejected.count})
    return RecordSet.load(output)


def export_released(
    records: RecordSet,
    path: str | Path,
    *,
    score_divisor: float = SCORE_DIVISOR,
    image_folder: str | Path | None = None,
) -> int:
    """Write judged records in the format of the released files.

    Records that were imported from such a file are reproduced exactly.

    Args:
        records: Judged records.
        path: JSON file to write. It appears only when it is complete.
        score_divisor: Divisor in score = sigmoid(log-odds / divisor), for records without stored scores. Defaults to
            1.05.
        image_folder: Folder for images that are stored as bytes, named by their content hash. The JSON file then
            contains paths relative to it. Defaults to None, which refuses such images.

    Returns:
        int: Number of records written.

    Raises:
        ValueError: If a record was not judged, or an image has no path and ``image_folder`` is None.

    Example:
        See :func:`import_released`.
    """
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        handle.write("[")
        for count, text in enumerate(_texts(records, score_divisor, image_folder)):
            handle.write(("," if count else "") + "\n" + text)
        handle.write("\n]\n")
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


def _imported(values: Row, root: Path, divisor: float, read_images: bool) -> tuple[PairRecord, Row]:
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


def _pair(values: Row, text: str, image: str) -> tuple[str, str]:
    for name in (text, image):
        if not isinstance(values.get(name), str):
            raise ValueError(f"{name} is {values.get(name)!r:.80}, expected a string")
    return values[text], values[image]


def released_item(text: str, path: str, root: Path, read_images: bool) -> Item:
    """Item of a text and an image path of MMEB-train or a released file, relative to ``root`` and empty for no image.

    A leading image placeholder is removed from the text. Without ``read_images`` the image is identified by its path.

    Raises:
        ValueError: If there is neither a text nor an image, or the path lies outside ``root``.
    """
    if not path:
        return Item(text)
    image = ImageRef(path=str(resolve_inside(root, path)))
    stripped = text.removeprefix(PLACEHOLDER)
    if read_images:
        return Item(stripped, image)
    return Item.stored(stripped, image, digest(json.dumps([stripped, path])))


def _dataset(paths: list[str]) -> str:
    parts = next((path.split("/") for path in paths if path), [])
    return parts[1] if len(parts) > 2 and parts[0] == "images" else ""


def _exported(
    record: PairRecord,
    row: Row,
    divisor: float,
    root: str | None,
    image_folder: str | Path | None,
) -> Row:
    if record.positive_logit is None:
        raise ValueError(f"a record of dataset {record.dataset!r} was not judged; only judged records can be exported")
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
        raise ValueError(f"image {image.label} is stored as bytes; set image_folder to a folder for such images")
    return _saved(image, Path(image_folder))


def _saved(image: ImageRef, folder: Path) -> str:
    data = image.read()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            suffix = (opened.format or "bin").lower()
    except OSError as error:
        raise BadImageError(f"image {image.label}: cannot be opened ({error})") from error
    name = f"{digest(data)}.{suffix}"
    if not (folder / name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(data)
    return name
