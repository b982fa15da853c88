"""Reranker distillation: from mined pools to a merged model, in one command that resumes.

A reranker or judge scores every mined candidate. The embedder learns the softmax of its log-odds over the candidates of a
query (Qwen3-VL-Embedding, arXiv 2601.04720: KL divergence from scores that were computed once). The contrastive model is
trained beside it, and both are merged, with equal weights or, with --eval_data, greedily.

example: python -m train_scripts.reranker_distillation --records runs/records --pools runs/pools --teacher unime-v2-reranker
--model runs/hard_negatives --output runs/distillation
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unime_st import stages
from unime_st.options import check_options, option, require_options
from unime_st.stages.command import run_script
from unime_st.training.model_merge import greedy_soup, merge_models


@dataclass
class DistillationArguments:
    """Options of :func:`run_distillation`; what they leave out has the defaults of the stages."""

    records: str = option("", "Folder of records.", required=True, path="stage")
    pools: str = option("", "Folder of pools mined among the records.", required=True, path="stage")
    model: str = option("unime-tiny", "Embedding model to start from; better one that retrieves already.")
    teacher: str = option("unime-tiny", "Reranker or judge: alias, folder or hub name.")
    pair_order: Literal["query_first", "candidate_first", "both"] = option(
        "query_first", "Order in which the teacher reads a pair; see `unime judge --calibrate`."
    )
    output: str = option("", "Folder for all that is made; the merged model is in its folder merged.", required=True)
    eval_data: str | None = option(None, "Folder of held-out records, for a greedy soup.", path="stage")
    num_negatives: int = option(8, "Candidates of a query, beside its positive.", unit="candidates", at_least=1)
    stride: int = option(1, "Stride of the cyclic sampling of candidates.", at_least=1)
    max_steps: int = option(200, "Optimizer steps of each training.", unit="steps", at_least=1)
    per_device_train_batch_size: int = option(32, "Batch size per device.", unit="rows", at_least=1)
    mini_batch_size: int | None = option(None, "Items embedded at a time.", unit="items", at_least=1)
    learning_rate: float = option(1e-4, "Peak learning rate.", above=0)
    temperature: float = option(0.02, "Temperature of the similarities.", above=0)
    label_temperature: float = option(1.0, "Temperature of the teacher's log-odds.", above=0)
    in_batch_weight: float = option(0.0, "Weight of an in-batch term beside the distillation.", at_least=0)
    seed: int = option(42, "Seed of the trainings.", at_least=0)

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)


def run_distillation(args: DistillationArguments) -> Path:
    """Judge the pools, train both models and merge them.

    Args:
        args: Options.

    Returns:
        Folder of the merged model.
    """
    require_options(args)
    output = Path(args.output)
    merged = output / "merged"
    if (merged / "modules.json").is_file():
        return merged
    rows = stages.run_judge(
        stages.JudgeArguments(
            data=args.pools, model=args.teacher, pair_order=args.pair_order, scores=str(output / "scores"),
            output=str(output / "rows"), stride=args.stride, num_negatives=args.num_negatives, seed=args.seed,
        )
    )  # fmt: skip
    names = ("model", "max_steps", "per_device_train_batch_size", "mini_batch_size", "learning_rate", "temperature")
    common: dict[str, Any] = {name: getattr(args, name) for name in (*names, "seed")}
    distilled = stages.train_soft_labels(
        stages.SoftLabelArguments(
            **common, data=str(rows), output=str(output / "distilled"), labels="log_odds", divergence="kl",
            label_temperature=args.label_temperature, num_negatives=args.num_negatives,
            in_batch_weight=args.in_batch_weight,
        )
    )  # fmt: skip
    contrastive = stages.train_in_batch(
        stages.InBatchArguments(
            **common, data=args.records, output=str(output / "contrastive"), false_negative_margin=0.1
        )
    )
    if args.eval_data:
        return greedy_soup([distilled, contrastive], merged, args.eval_data)
    return merge_models([distilled, contrastive], merged)


if __name__ == "__main__":
    raise SystemExit(run_script(run_distillation, DistillationArguments, __doc__))
