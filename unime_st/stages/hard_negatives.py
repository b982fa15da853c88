"""UniME stage 2: in-batch hard negatives after a false-negative filter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unime_st.losses import HardNegativeRankingLoss
from unime_st.options import option
from unime_st.training.arguments import TrainArguments
from unime_st.training.embedders import EmbedderStage
from unime_st.training.rows import pair_rows


@dataclass
class HardNegativeArguments(TrainArguments):
    """Options of :func:`train_hard_negatives`."""

    temperature: float = option(0.02, "Temperature of the similarities.", above=0)
    false_negative_margin: float = option(0.1, "Margin: drop candidates more similar than positive + margin.")
    num_negatives: int = option(8, "Hardest remaining candidates of a query.", unit="negatives", at_least=1)


def train_hard_negatives(args: HardNegativeArguments) -> Path:
    """Train with in-batch hard negatives (UniME, https://arxiv.org/abs/2504.17432, section 3.2).

    Args:
        args: Options; ``data`` is a folder of pair records.

    Returns:
        Folder of the trained model.
    """
    with EmbedderStage("hard_negatives", args) as stage:
        if stage.done:
            return stage.output
        model = stage.load_model()
        loss = HardNegativeRankingLoss(
            model,
            args.temperature,
            args.false_negative_margin,
            args.num_negatives,
            gather_across_devices=stage.gathers,
        )
        stage.train(model, pair_rows(stage.records), loss)
    return stage.output
