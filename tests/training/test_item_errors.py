"""An item that cannot be prepared is named in every stage, wherever it is prepared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unime_st import stages
from unime_st.data.images import BadImageError
from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordSet
from unime_st.training.item_errors import ItemError, naming_items

BAD = 5
"""Row with the item that cannot be prepared: the cheapest of all, so that no trial before the training has it."""
SMALL: dict[str, Any] = {"model": "unime-tiny", "per_device_train_batch_size": 4, "max_steps": 4, "use_cpu": True}


def in_batch(**options: Any) -> Path:
    """Prepares mini-batches in the loss, by the feed."""
    return stages.train_in_batch(stages.InBatchArguments(**options, mini_batch_size=4))


def soft_labels(**options: Any) -> Path:
    """Prepares batches in the collator."""
    return stages.train_soft_labels(stages.SoftLabelArguments(**options, num_negatives=2))


def in_workers(**options: Any) -> Path:
    """Prepares batches in the collator, in a worker of the trainer's data loader."""
    return soft_labels(**options, dataloader_num_workers=1)


def reranker(**options: Any) -> Path:
    """Prepares prompts in the loss."""
    return stages.train_reranker(stages.RerankerArguments(**options, num_negatives=2, template="tiny"))


def noise(path: Path, side: int, seed: int) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return path


def write_records(folder: Path, kind: str) -> tuple[RecordSet, Path]:
    """Sixteen judged rows, of which one has an image, a video or a text that cannot be prepared; and its file."""
    images, pairs = folder / "images", []
    (images / "clip").mkdir(parents=True)
    for number in range(16):
        bad = number == BAD
        file = noise(
            images / ("clip/0.png" if bad and kind == "video" else f"{number}.png"), 28 if bad else 84, number
        )
        content = {"video": file.parent} if bad and kind == "video" else {"image": file}
        text = "<|image_pad|>" if bad and kind == "text" else f"a query of some more words, number {number}"
        query = Item("short" if bad and kind != "text" else text)
        negatives = (Item(f"wrong {number % 3}"), Item(f"other {number % 3}"))
        pairs.append(PairRecord(query, Item(**content), "noise", negatives, 2.0, (-1.0, -2.0)))
    records = RecordSet.write(folder / "records", pairs, {}, image_root=images)
    bad_file = images / ("clip/0.png" if kind == "video" else f"{BAD}.png")
    if kind != "text":  # the header stays
        bad_file.write_bytes(bad_file.read_bytes()[:60])
    return records, bad_file


@pytest.mark.parametrize(
    ("train", "kind"),
    [
        (in_batch, "image"),
        (in_batch, "video"),
        (in_batch, "text"),
        (soft_labels, "image"),
        (soft_labels, "text"),
        # torch waits some seconds for a worker that met an error.
        pytest.param(in_workers, "image", marks=pytest.mark.slow),
        (reranker, "image"),
        (reranker, "video"),
    ],
)
def test_the_row_is_named(
    train: Callable[..., Path], kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records, file = write_records(tmp_path, kind)
    column, source = ("query", "<|image_pad|>") if kind == "text" else ("positive", str(file))
    with caplog.at_level("INFO", logger="unime_st"), pytest.raises(ItemError) as found:
        train(**SMALL, data=str(records.folder), output=str(tmp_path / "out"))
    assert "16 rows." in caplog.text, "the training has begun"
    message = str(found.value)
    assert message.startswith(f"{records.folder}, row {BAD}, dataset 'noise', {column}: ")
    assert source in message and message.endswith("again without this row.") and "\n" not in message
    cause = found.value.__cause__
    if train is in_workers:
        assert "in DataLoader worker process 0" in str(cause) and "direct cause" in str(cause)
    else:
        assert isinstance(cause, ValueError if kind == "text" else BadImageError)


def test_an_error_that_no_item_causes_stays_as_it_is(tmp_path: Path) -> None:
    records = RecordSet.write(tmp_path, [PairRecord(Item("a"), Item("b"))], {})
    with pytest.raises(KeyError, match="of the batch"), naming_items(records, records.items, Item.to_input):
        raise KeyError("of the batch")
    tried: list[Item] = []
    with pytest.raises(MemoryError), naming_items(records, records.items, tried.append):
        raise MemoryError
    assert not tried


def test_an_item_without_a_row_is_named_by_its_id_and_the_message_is_one_line(tmp_path: Path) -> None:
    records = RecordSet.write(tmp_path, [PairRecord(Item("a"), Item("b"))], {})
    other = Item("two\nlines")

    def prepare(item: Item) -> None:
        raise ValueError(f"{item.text} are refused.\nThis is why.")

    with pytest.raises(ItemError) as found, naming_items(records, [other], prepare):
        prepare(other)
    assert f"item {other.id}: text 'two\\nlines' cannot be prepared (two lines are refused. This is why). " in str(
        found.value
    )
