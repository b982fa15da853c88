"""Rows of other people's mteb tasks: their items, and the prompt that mteb's rules give them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from mteb._create_dataloaders import create_dataloader
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.types import PromptType

from unime_st.data.items import Item
from unime_st.reranking.parsing import to_item

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import BatchedInput
    from sentence_transformers import SentenceTransformer
    from torch.utils.data import DataLoader

_PROMPT_NAMES = {PromptType.query: ("query",), PromptType.document: ("document", "passage", "corpus")}
"""Prompts that `SentenceTransformer.encode_query` and `encode_document` look for."""


def prompt_of(model: SentenceTransformer, metadata: TaskMetadata, side: PromptType | None) -> str | None:
    """Find the prompt that mteb's wrapper of sentence-transformers models would use.

    Args:
        model: The model with its prompts.
        metadata: The task.
        side: Query or document; None for tasks without sides.

    Returns:
        The prompt of the task, its type or the side, else the default prompt of the model; None if there is none, ""
        where an empty one is declared, which keeps the default prompt away.

    Example:
        >>> import mteb
        >>> from sentence_transformers import SentenceTransformer
        >>> model = SentenceTransformer("unime-tiny", device="cpu", prompts={"query": "find: ", "STS12": "compare: "})
        >>> metadata = mteb.get_task("STS12").metadata
        >>> prompt_of(model, metadata, None), prompt_of(model, metadata, PromptType.query)
        ('compare: ', 'compare: ')
    """
    prompts = {name: prompt for name, prompt in model.prompts.items() if prompt is not None}
    known, _ = AbsEncoder.validate_task_to_prompt_name(prompts, raise_for_invalid_keys=False)
    name = get_prompt_name(known, metadata, side)
    if name is None:
        names = _PROMPT_NAMES[side] if side is not None else ()
        name = next((name for name in names if name in prompts), model.default_prompt_name)
    return None if name is None else prompts.get(name)


def iter_rows(batches: DataLoader[BatchedInput]) -> Iterator[list[Item]]:
    """Read the batches of an mteb data loader.

    Args:
        batches: Batches with some of the columns ``text``, ``image`` and ``video`` (decoders).

    Yields:
        One item for each row; texts may be blank.
    """
    for batch in batches:
        columns = cast("dict[str, list]", batch)
        size = len(next(iter(columns.values())))
        parts = (columns.get(name) or [None] * size for name in ("text", "image", "video"))
        yield [
            to_item({"text": text or ""}) if image is None and video is None else Item(text or None, image, video)
            for text, image, video in zip(*parts)
        ]


def iter_table(table: Dataset, metadata: TaskMetadata, side: PromptType) -> Iterator[list[Item]]:
    """Read the queries or documents of a retrieval task as mteb shows them to its own models.

    Args:
        table: mteb's table.
        metadata: The task.
        side: Query or document.

    Yields:
        As `iter_rows`.
    """
    return iter_rows(create_dataloader(table, task_metadata=metadata, prompt_type=side))
