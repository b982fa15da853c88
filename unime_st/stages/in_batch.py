"""Control: plain in-batch InfoNCE over the same records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from unime_st.losses.base import ROWS_AT_ONCE
from unime_st.options import option
from unime_st.training.arguments import TrainArguments
from unime_st.training.embedders import EmbedderStage
from unime_st.training.rows import pair_rows


@dataclass
class InBatchArguments(TrainArguments):
    """Options of :func:`train_in_batch`."""

    temperature: float = option(0.02, "Temperature of the similarities.", above=0)


def train_in_batch(args: InBatchArguments) -> Path:
    """Train with in-batch InfoNCE, the papers' baseline.

    Args:
        args: Options; ``data`` is a folder of pair records.

    Returns:
        Folder of the trained model.
    """
    with EmbedderStage("in_batch", args) as stage:
        if stage.done:
            return stage.output
        model = stage.load_model()
        loss = CachedMultipleNegativesRankingLoss(
            model,
            scale=1.0 / args.temperature,
            mini_batch_size=ROWS_AT_ONCE,  # of the similarity matrix, which is never held whole
            gather_across_devices=stage.gathers,
        )
        stage.train(model, pair_rows(stage.records), loss)
    return stage.output
