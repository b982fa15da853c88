"""The training stages of both papers as functions: records in, model out."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import nn

from unime_st.data.logits import to_scores
from unime_st.data.records import RecordSet
from unime_st.files import atomic_write
from unime_st.losses import (
    HardNegativeRankingLoss,
    RerankerLoss,
    SimilarityDistillationLoss,
    SoftLabelDistillationLoss,
)
from unime_st.losses.base import ROWS_AT_ONCE
from unime_st.model import UniME
from unime_st.reranking.unime_reranker import UniMEReranker
from unime_st.training.arguments import (
    DistillArguments,
    HardNegativeArguments,
    InBatchArguments,
    RerankerArguments,
    SoftLabelArguments,
    TrainArguments,
)
from unime_st.training.embedders import EmbedderSetup
from unime_st.training.hardest import hardest_negatives, stored_negatives
from unime_st.training.processes import processes
from unime_st.training.rerankers import RerankerSetup
from unime_st.training.run import run_stage

logger = logging.getLogger(__name__)


def _open(arguments: TrainArguments) -> RecordSet:
    if not arguments.data:
        raise ValueError("data is missing: name a folder of records (--data FOLDER).")
    return RecordSet.load(arguments.data)


def pair_rows(records: RecordSet) -> Dataset:
    """Rows (query, positive) of item ids, with the name of their data set."""
    return Dataset(records.row_shards.table(["query", "positive", "dataset"]))


def rows_with_negatives(records: RecordSet, num_negatives: int) -> Dataset:
    """Rows (query, positive, negative_1..k) of item ids; judged ones have their scores P(Yes), the positive's first.

    Raises:
        ValueError: If a row has too few negatives, or only some rows are judged.
    """
    table = records.row_shards.table(["query", "positive", "negatives", "positive_logit", "negative_logits"])
    stored = pc.list_value_length(table["negatives"]).to_numpy()
    if len(short := np.flatnonzero(stored < num_negatives)):
        raise ValueError(
            f"{records.folder}, row {short[0]}: {stored[short[0]]} negatives are stored, {num_negatives} are needed. "
            "Mine and judge so many (train_scripts/judge.py), or lower num_negatives."
        )
    columns = {name: table[name] for name in ("query", "positive")}
    columns |= {f"negative_{n + 1}": pc.list_element(table["negatives"], n) for n in range(num_negatives)}
    judged = len(table) - table["positive_logit"].null_count
    if 0 < judged < len(table):
        raise ValueError(f"{records.folder}: only {judged} of {len(table)} rows are judged; judge all or none.")
    if judged:
        logits = [
            table["positive_logit"],
            *(pc.list_element(table["negative_logits"], n) for n in range(num_negatives)),
        ]
        scores = to_scores(np.stack([column.to_numpy() for column in logits], axis=1)).astype(np.float32)
        offsets = np.arange(0, scores.size + 1, scores.shape[1], dtype=np.int32)
        columns["label"] = pa.ListArray.from_arrays(offsets, scores.ravel())
    return Dataset(pa.table(columns))


def judged_rows(records: RecordSet, num_negatives: int) -> Dataset:
    """:func:`rows_with_negatives` of judged records, with the name of their data set.

    Raises:
        ValueError: If the records are not judged.
    """
    rows = rows_with_negatives(records, num_negatives)
    if "label" not in rows.column_names:
        raise ValueError(f"{records.folder}: no judge's scores. Judge and select first (train_scripts/judge.py).")
    return rows.add_column("dataset", records.row_shards.column("dataset").to_pylist())


def _load_embedder(arguments: TrainArguments) -> Callable[..., UniME]:
    return lambda **options: UniME(arguments.model, **options)


def _train_embedder(stage: str, arguments: TrainArguments, rows: Callable[[], Dataset], setup: EmbedderSetup) -> Path:
    return run_stage(
        stage,
        arguments,
        load=_load_embedder(arguments),
        dataset=rows,
        setup=setup,
        inputs=(arguments.data,),
    )


def train_hard_negatives(arguments: HardNegativeArguments) -> Path:
    """UniME stage 2 (arXiv 2504.17432, section 3.2): in-batch hard negatives after the false-negative filter.

    Args:
        arguments: Options; ``data`` is a folder of pair records.

    Returns:
        Folder of the trained model.
    """
    records = _open(arguments)

    def loss(model: SentenceTransformer) -> nn.Module:
        return HardNegativeRankingLoss(
            model,
            arguments.temperature,
            arguments.false_negative_margin,
            arguments.num_negatives,
            gather_across_devices=arguments.gather_across_devices,
        )

    return _train_embedder(
        "hard_negatives", arguments, lambda: pair_rows(records), EmbedderSetup(arguments, records, loss)
    )


def train_in_batch(arguments: InBatchArguments) -> Path:
    """The control: in-batch InfoNCE over the same records.

    Args:
        arguments: Options; ``data`` is a folder of pair records.

    Returns:
        Folder of the trained model.
    """
    records = _open(arguments)

    def loss(model: SentenceTransformer) -> nn.Module:
        return CachedMultipleNegativesRankingLoss(
            model,
            scale=1.0 / arguments.temperature,
            mini_batch_size=ROWS_AT_ONCE,  # of the similarity matrix, which is never held whole
            gather_across_devices=arguments.gather_across_devices,
        )

    return _train_embedder("in_batch", arguments, lambda: pair_rows(records), EmbedderSetup(arguments, records, loss))


def train_soft_labels(arguments: SoftLabelArguments) -> Path:
    """UniME-V2 (arXiv 2510.13515): align similarities with the judge's scores over mined hard negatives.

    Args:
        arguments: Options; ``data`` is a folder of judged rows.

    Returns:
        Folder of the trained model.
    """
    records = _open(arguments)

    def loss(model: SentenceTransformer) -> nn.Module:
        return SoftLabelDistillationLoss(
            model,
            arguments.temperature,
            arguments.divergence,  # type: ignore[arg-type]  # the loss checks it
            label_temperature=arguments.label_temperature,
            in_batch_weight=arguments.in_batch_weight,
            gather_across_devices=arguments.gather_across_devices and arguments.in_batch_weight > 0,
        )

    in_batch = arguments.in_batch_weight > 0
    return _train_embedder(
        "soft_labels",
        arguments,
        lambda: judged_rows(records, arguments.num_negatives),
        EmbedderSetup(arguments, records, loss, in_batch=in_batch, distinct=in_batch),
    )


def _seen_texts(records: RecordSet, arguments: DistillArguments) -> list[str]:
    """Ids of the texts that training will reach: a teacher of billions of parameters should not embed the rest."""
    ids = [item_id for item_id in records.item_ids if records.item(item_id).modality == "text"]
    random.Random(arguments.seed).shuffle(ids)
    if arguments.max_steps < 0:
        return ids
    devices = processes().num_processes
    return ids[: arguments.max_steps * arguments.batch_size * arguments.gradient_accumulation_steps * devices]


def _teacher_vectors(arguments: DistillArguments, texts: list[str]) -> np.ndarray:
    """The teacher's embeddings, made once: by the first process, for the others and for a resumed run."""
    if arguments.dry_run:
        return np.ones((len(texts), 1), dtype=np.float32)
    path = Path(arguments.output) / "teacher.npy"
    with processes().main_process_first():
        if not path.is_file():
            logger.info("distill: the teacher embeds %d texts.", len(texts))
            teacher = SentenceTransformer(arguments.teacher)
            vectors = teacher.encode(texts, show_progress_bar=True)
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, vectors, allow_pickle=False)
        return np.load(path, allow_pickle=False)


def distill(arguments: DistillArguments) -> Path:
    """UniME stage 1 (arXiv 2504.17432, section 3.1): textual discriminative knowledge distillation.

    The teacher embeds every text that training reaches once; each text is one training row.

    Args:
        arguments: Options; ``data`` is a folder of records, of which the texts are used.

    Returns:
        Folder of the trained model.
    """
    if not arguments.teacher:
        raise ValueError("teacher is missing: name a text-embedding model (--teacher NAME_OR_FOLDER).")
    records = _open(arguments)

    def rows() -> Dataset:
        ids = _seen_texts(records, arguments)
        vectors = _teacher_vectors(arguments, [str(records.item(item_id).text) for item_id in ids])
        return Dataset.from_dict({"query": ids, "label": list(vectors)})

    def loss(model: SentenceTransformer) -> nn.Module:
        return SimilarityDistillationLoss(
            model,
            arguments.temperature,
            arguments.direction,  # type: ignore[arg-type]  # the loss checks it
            mask_diagonal=arguments.mask_diagonal,
            gather_across_devices=arguments.gather_across_devices,
        )

    return _train_embedder("distill", arguments, rows, EmbedderSetup(arguments, records, loss, distinct=False))


def train_reranker(arguments: RerankerArguments) -> Path:
    """UniME-V2-Reranker (arXiv 2510.13515): pairwise Yes/No and listwise index answers from judged rows.

    Args:
        arguments: Options; ``data`` is a folder of judged rows.

    Returns:
        Folder of the trained reranker.
    """
    records = _open(arguments)

    def loss(model: Any) -> RerankerLoss:
        return RerankerLoss(
            model,
            arguments.pairwise_weight,
            arguments.listwise_weight,
            min_list_length=arguments.min_list_length,
            target_temperature=arguments.target_temperature,
            mini_batch_size=arguments.mini_batch_size,
        )

    def rows() -> Dataset:
        stored = stored_negatives(records, arguments.num_negatives)
        return hardest_negatives(rows_with_negatives(records, stored), arguments.num_negatives)

    return run_stage(
        "reranker",
        arguments,
        load=lambda **options: UniMEReranker(arguments.model, template=arguments.template, **options),
        dataset=rows,
        setup=RerankerSetup(arguments, records, loss),
        inputs=(arguments.data,),
    )
