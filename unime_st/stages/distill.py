"""UniME stage 1: a text-embedding teacher's in-batch similarities are distilled into the language model."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from unime_st.data.records import RecordSet
from unime_st.files import atomic_write
from unime_st.losses import SimilarityDistillationLoss
from unime_st.options import option
from unime_st.training.arguments import TrainArguments
from unime_st.training.embedders import EmbedderStage
from unime_st.training.processes import partial_state

logger = logging.getLogger(__name__)
TEACHER = "teacher.npy"


@dataclass
class DistillArguments(TrainArguments):
    """Options of :func:`train_distill`."""

    teacher: str = option("", "Text-embedding model: any Sentence Transformers model.", required=True)
    temperature: float = option(0.02, "Temperature of both similarity distributions.", above=0)
    direction: Literal["teacher_student", "student_teacher"] = option(
        "teacher_student", "Direction of the KL divergence."
    )
    mask_diagonal: bool = option(True, "Leave out the similarity of a text to itself.")


def train_distill(args: DistillArguments) -> Path:
    """Distill a text-embedding teacher (UniME, https://arxiv.org/abs/2504.17432, section 3.1).

    The teacher embeds every text that training reaches once; each text is one training row.

    Args:
        args: Options; ``data`` is a folder of records, of which the texts are used.

    Returns:
        Folder of the trained model.
    """
    with EmbedderStage("distill", args) as stage:
        if stage.done:
            return stage.output
        model = stage.load_model()
        loss = SimilarityDistillationLoss(
            model,
            args.temperature,
            args.direction,
            mask_diagonal=args.mask_diagonal,
            gather_across_devices=stage.gathers,
        )
        ids = _used_texts(stage.records, args)
        vectors = _teacher_vectors(args, [str(stage.records.item(item_id).text) for item_id in ids])
        stage.train(model, Dataset.from_dict({"query": ids, "label": list(vectors)}), loss, distinct=False)
    return stage.output


def _used_texts(records: RecordSet, args: DistillArguments) -> list[str]:
    """Ids of the texts that training will reach: a teacher of billions of parameters should not embed the rest."""
    ids = [item_id for item_id in records.item_ids if records.item(item_id).modality == "text"]
    random.Random(args.seed).shuffle(ids)
    if args.max_steps < 0:
        return ids
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * partial_state().num_processes
    return ids[: args.max_steps * rows]


def _teacher_vectors(args: DistillArguments, texts: list[str]) -> np.ndarray:
    """The teacher's embeddings, made once: by the first process, for the others and for a resumed run."""
    if args.dry_run:
        return np.ones((len(texts), 1), dtype=np.float32)
    path = Path(args.output) / TEACHER
    with partial_state().main_process_first():
        vectors = _stored_vectors(path, len(texts))
        if vectors is None:
            logger.info("distill: the teacher embeds %d texts.", len(texts))
            vectors = SentenceTransformer(args.teacher).encode(texts, show_progress_bar=True)
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, vectors, allow_pickle=False)
        return vectors


def _stored_vectors(path: Path, count: int) -> np.ndarray | None:
    """The vectors of an earlier start; None if there are none, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        vectors = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        logger.warning("%s is damaged (%s): the teacher embeds the texts again.", path, error)
        return None
    if vectors.ndim == 2 and len(vectors) == count and np.isfinite(vectors).all():
        return vectors
    logger.warning("%s is not the teacher's: %d vectors are needed. The teacher embeds the texts again.", path, count)
    return None
