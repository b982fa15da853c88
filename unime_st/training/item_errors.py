"""Errors of stored items that cannot be prepared for the model: they name the row and say what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from unime_st.data.items import Item
from unime_st.data.records import ItemFolder
from unime_st.encoding.model_inputs import unreadable_image

_OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


class ItemError(ValueError):
    """A stored item cannot be prepared. The message is one line, the cause is the original error.

    Args:
        message: The message. A data loader passes the whole traceback of its worker, which ends with the message.
    """

    def __init__(self, message: str) -> None:
        *traceback, last = message.strip().splitlines()
        if traceback:
            last = last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")
            self.__cause__ = RuntimeError(message)  # the original error stays in the worker
        super().__init__(last)


@contextmanager
def naming_items(records: ItemFolder, items: Iterable[Item], prepare: Callable[[Item], object]) -> Iterator[None]:
    """Context in which an error is raised as an :class:`ItemError` that names the item it comes from.

    Args:
        records: The record folder of the items.
        items: The items that are prepared in the context.
        prepare: Prepares one of them alone. The first that fails is named; if none does, the error stays as it is.

    Example:
        >>> import tempfile
        >>> from unime_st.data import Item, PairRecord, RecordSet
        >>> from unime_st.training.item_errors import ItemError, naming_items
        >>> pair = PairRecord(Item("a"), Item(image=b"no image"), dataset="demo")
        >>> records = RecordSet.write(tempfile.mkdtemp(), [pair], {})
        >>> try:
        ...     with naming_items(records, records.items, Item.to_input):
        ...         inputs = [item.to_input() for item in records.items]
        ... except ItemError as error:
        ...     print(str(error).partition(", ")[2].partition(" (")[0])
        row 0, dataset 'demo', positive: <8 bytes, sha256 453361fd> cannot be prepared
    """
    try:
        yield
    except _OUT_OF_MEMORY:
        raise
    except Exception:  # decoders and processors raise any type
        for item in items:
            try:
                prepare(item)
            except _OUT_OF_MEMORY:
                raise
            except Exception as error:
                cause = unreadable_image(item) or error  # which names the frame of a video
                raise ItemError(_message(records, item, cause)) from cause
        raise


def _message(records: ItemFolder, item: Item, error: Exception) -> str:
    media = [part.label for part in (item.image, item.video) if part is not None]
    source = " with ".join([*media, *([] if item.text is None else [f"text {item.text!r:.80}"])])
    reason = str(error).rstrip(".") or type(error).__name__
    message = (
        f"{records.folder}, {_place(records, item)}: {source} cannot be prepared ({reason}). Mend the file, if it comes "
        "from one, and run the same command again; else write the records again without this row."
    )
    return " ".join(message.split())  # one line, also if the error has more


def _place(records: ItemFolder, item: Item) -> str:
    """First row with an item, its dataset and the item's column; the item's id if no row has it."""
    for number, row in enumerate(records.row_shards.rows()):
        columns = {"query": [row["query"]], "positive": [row["positive"]], "negative": row.get("negatives", ())}
        for name, ids in columns.items():
            if item.id in ids:
                return f"row {number}, dataset {row['dataset']!r}, {name}"
    return f"item {item.id}"
