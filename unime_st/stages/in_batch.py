"""In-batch InfoNCE over pairs, plain as the papers' baseline, or with today's masks, weights and directions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import nn

from unime_st.losses import InfoNCELoss
from unime_st.losses.base import ROWS_AT_ONCE
from unime_st.losses.info_nce import check_directions
from unime_st.options import OptionError, option
from unime_st.training.arguments import TrainArguments
from unime_st.training.embedders import EmbedderStage
from unime_st.training.rows import pair_rows, rows_with_negatives


@dataclass
class InBatchArguments(TrainArguments):
    """Options of :func:`train_in_batch`."""

    temperature: float = option(0.02, "Temperature of the similarities.", above=0)
    learnable_temperature: bool = option(False, "Train the temperature as well, from its value on.")
    num_negatives: int = option(
        0, "Stored negatives of a row that are used, the first ones.", unit="negatives", at_least=0
    )
    false_negative_margin: float | None = option(
        None, "Margin: mask candidates more similar than positive + margin, and equal documents; none: no mask.",
        above=-2,
    )  # fmt: skip
    directions: list[str] | None = option(
        None, "Similarities that are compared; none: query_to_doc alone.",
        choices=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
    )  # fmt: skip
    partition_mode: Literal["joint", "per_direction"] = option(
        "joint", "One softmax over all directions, or the mean of one for each.", needs="directions"
    )
    hardness_mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives"] = option(
        "in_batch_negatives", "Negatives with a hardness weight; hard_negatives are those stored with the row.",
        needs="hardness_strength",
    )  # fmt: skip
    hardness_strength: float = option(0.0, "Hardness weight alpha (LLaVE: 9); 0: none.", at_least=0)

    def _check_together(self) -> None:
        super()._check_together()
        try:
            check_directions(self.directions or ["query_to_doc"], self.partition_mode)
        except ValueError as error:
            raise OptionError(str(error)) from None
        if self.hardness_strength and self.hardness_mode == "hard_negatives" and not self.num_negatives:
            raise OptionError("hardness_mode hard_negatives weighs the stored negatives of a row: set num_negatives.")


def train_in_batch(args: InBatchArguments) -> Path:
    """Train with in-batch InfoNCE.

    Args:
        args: Options; ``data`` is a folder of pair records.

    Returns:
        Folder of the trained model.

    References:
        - Qwen3 Embedding (mask, directions): https://arxiv.org/abs/2506.05176
        - LLaVE (hardness weight): https://arxiv.org/abs/2503.04812
    """
    with EmbedderStage("in_batch", args) as stage:
        if stage.done:
            return stage.output
        if args.num_negatives:
            rows = rows_with_negatives(stage.records, args.num_negatives)
            rows = rows.remove_columns([name for name in rows.column_names if name == "label"])
            rows = rows.add_column("dataset", stage.records.row_shards.column("dataset").to_pylist())
        else:
            rows = pair_rows(stage.records)
        model = stage.load_model()
        stage.train(model, rows, _loss(args, model, stage.gathers))
    return stage.output


def _loss(args: InBatchArguments, model: SentenceTransformer, gathers: bool) -> nn.Module:
    """The loss of Sentence Transformers, or ours for what it lacks: mask and learnable temperature."""
    options: dict[str, Any] = {
        "directions": tuple(args.directions or ["query_to_doc"]),
        "partition_mode": args.partition_mode,
        "hardness_mode": args.hardness_mode,
        "hardness_strength": args.hardness_strength,
        "gather_across_devices": gathers,
    }
    if args.false_negative_margin is None and not args.learnable_temperature:
        options["hardness_mode"] = args.hardness_mode if args.hardness_strength else None
        # The mini-batch is one of rows of the similarity matrix, which is never held whole.
        return CachedMultipleNegativesRankingLoss(
            model, scale=1.0 / args.temperature, mini_batch_size=ROWS_AT_ONCE, **options
        )
    return InfoNCELoss(
        model,
        args.temperature,
        false_negative_margin=args.false_negative_margin,
        learnable_temperature=args.learnable_temperature,
        **options,
    )
