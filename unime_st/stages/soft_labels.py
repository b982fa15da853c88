"""UniME-V2: similarities are aligned with the judge's scores over mined hard negatives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unime_st.losses import SoftLabelDistillationLoss
from unime_st.options import option
from unime_st.training.arguments import TrainArguments
from unime_st.training.embedders import EmbedderStage
from unime_st.training.rows import judged_rows


@dataclass
class SoftLabelArguments(TrainArguments):
    """Options of :func:`train_soft_labels`."""

    data: str = option(
        "",
        "Folder of judged rows.",
        required=True,
        path="stage",
        made_by="unime judge --data POOLS --scores FOLDER --output FOLDER",
    )
    temperature: float = option(0.02, "Temperature of the similarities.", above=0)
    labels: Literal["scores", "log_odds"] = option(
        "scores", "What is distilled: P(Yes), as in the paper, or the log-odds of a reranker or judge."
    )
    label_temperature: float | None = option(
        None, "Temperature of the labels; none: that of the similarities, and 1 for log-odds.", above=0
    )
    divergence: Literal["symmetric_kl", "js", "kl"] = option("symmetric_kl", "Divergence of the two distributions.")
    num_negatives: int = option(
        8, "Negatives of a row, the first of those that are stored.", unit="negatives", at_least=1
    )
    in_batch_weight: float = option(0.0, "Weight of an added in-batch InfoNCE term.", at_least=0)
    false_negative_margin: float | None = option(
        None, "Margin: mask candidates of the in-batch term more similar than positive + margin; none: no mask.",
        above=-2, needs="in_batch_weight",
    )  # fmt: skip
    hardness_strength: float = option(
        0.0, "Hardness weight alpha of the in-batch term's negatives (LLaVE: 9); 0: none.", at_least=0,
        needs="in_batch_weight",
    )  # fmt: skip


def train_soft_labels(args: SoftLabelArguments) -> Path:
    """Align similarities with the judge's scores (UniME-V2, https://arxiv.org/abs/2510.13515).

    Args:
        args: Options; ``data`` is a folder of judged rows.

    Returns:
        Folder of the trained model.
    """
    with EmbedderStage("soft_labels", args) as stage:
        if stage.done:
            return stage.output
        in_batch = args.in_batch_weight > 0
        model = stage.load_model()
        loss = SoftLabelDistillationLoss(
            model,
            args.temperature,
            args.divergence,
            labels=args.labels,
            label_temperature=args.label_temperature,
            in_batch_weight=args.in_batch_weight,
            false_negative_margin=args.false_negative_margin,
            hardness_strength=args.hardness_strength,
            gather_across_devices=stage.gathers and in_batch,
        )
        rows = judged_rows(stage.records, args.num_negatives, log_odds=args.labels == "log_odds")
        stage.train(model, rows, loss, in_batch=in_batch, distinct=in_batch)
    return stage.output
