"""Options of the training stages: dataclasses that a YAML file and the command line fill in."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from transformers import HfArgumentParser

ArgumentsT = TypeVar("ArgumentsT")
# The language model's linear layers, of every supported family; vision tower and projector stay as they are.
LANGUAGE_MODEL_LAYERS = (
    r"^(?!.*(visual|vision|image)).*\.(q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_proj|up_proj|gate_up_proj|down_proj)$"
)

LOG = "log.jsonl"
"""Name of the loss curve in a trained model's folder."""

_DTYPES = ("fp32", "bf16", "fp16")


def _one_of(option: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option} must be {', '.join(map(str, known[:-1]))} or {known[-1]}, but is {value!r}.")


@dataclass
class TrainArguments:
    """Options that all training stages share."""

    model: str = field(
        default="unime-tiny", metadata={"help": "Alias, folder or hub name of the model to start from."}
    )
    data: str = field(default="", metadata={"help": "Folder of records, as written by mine / judge / import."})
    output: str = field(default="", metadata={"help": "Folder for the trained model; a finished one is not redone."})
    overwrite: bool = field(default=False, metadata={"help": "Throw away what is in the output folder."})
    max_steps: int = field(default=-1, metadata={"help": "Optimiser steps; -1: as many as `epochs` asks for."})
    epochs: float = field(default=1.0, metadata={"help": "Passes over the data if max_steps is -1."})
    batch_size: int = field(default=64, metadata={"help": "Rows per device and step."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimiser step."})
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Items embedded at a time; none, without a token budget: the whole batch."}
    )
    token_budget: str | None = field(
        default=None,
        metadata={"help": "Instead: tokens (text and image) embedded at a time, or auto: what fits this device."},
    )
    dataset_temperature: float = field(
        default=1.0, metadata={"help": "Data sets are drawn by size ** (1 / this): 1 proportional, large: alike."}
    )
    sub_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of one data set that stand together in a batch; none: rows are mixed."}
    )
    drop_last: bool = field(
        default=True, metadata={"help": "Leave out the rows that fill no batch at the end of a pass over the data."}
    )
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Train these prefixes of the embedding as well, e.g. 1536 512 128."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps with a rising learning rate."})
    scheduler: str = field(default="linear", metadata={"help": "Learning rate schedule of transformers."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm that is clipped to."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA adapter; 0: train all weights."})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA scale; the update is alpha / rank times B A."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout on the adapter's input."})
    lora_targets: str = field(default=LANGUAGE_MODEL_LAYERS, metadata={"help": "Regular expression of module names."})
    frozen: str | None = field(
        default=None,
        metadata={
            "help": "With lora_rank 0: regular expression of weights that stay as they are, e.g. visual|vision."
        },
    )
    use_dora: bool = field(default=False, metadata={"help": "DoRA instead of LoRA (the released V2 scripts)."})
    quantize: str | None = field(
        default=None, metadata={"help": "nf4 or int8: the frozen weights under the adapter (QLoRA, extra `qlora`)."}
    )
    precision: str = field(default="fp32", metadata={"help": "Of the computation: fp32, bf16 or fp16."})
    weights: str = field(
        default="auto",
        metadata={"help": "Of the weights: fp32, bf16, fp16; auto: as precision under an adapter, else fp32."},
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})
    gather_across_devices: bool = field(default=True, metadata={"help": "In-batch negatives from all devices."})
    workers: int = field(default=0, metadata={"help": "Processes that decode images ahead of the model."})
    vision_cache: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps the images' visual tokens; for a frozen vision tower and projector."},
    )
    save_every: int = field(default=100, metadata={"help": "Steps between checkpoints; a killed run resumes there."})
    log_every: int = field(default=10, metadata={"help": "Steps between two points of the loss curve."})
    report_to: str = field(default="none", metadata={"help": "Where the curves go: none, tensorboard, wandb, ..."})
    dry_run: bool = field(default=False, metadata={"help": "Print the plan (steps, tokens, memory, hours) and stop."})
    resume: bool = field(default=True, metadata={"help": "Go on from the last checkpoint of a killed run."})
    seed: int = field(default=42, metadata={"help": "Seed of adapter weights, data order and dropout."})

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, _DTYPES)
        _one_of("weights", self.weights, ("auto", *_DTYPES))
        _one_of("quantize", self.quantize, (None, "nf4", "int8"))
        if self.quantize and not self.lora_rank:
            raise ValueError("quantize needs an adapter: quantised weights are not trained. Set lora_rank.")
        if self.frozen and self.lora_rank:
            raise ValueError(
                "frozen goes with lora_rank 0: under an adapter all other weights are frozen, and lora_targets says "
                "which layers have one."
            )
        if self.token_budget is not None and self.token_budget != "auto" and not str(self.token_budget).isdigit():
            raise ValueError(f"token_budget must be a number, auto or left out, but is {self.token_budget!r}.")
        if self.token_budget is not None and self.mini_batch_size is not None:
            raise ValueError("give either mini_batch_size or token_budget, not both.")
        if not self.dataset_temperature > 0:
            raise ValueError(f"dataset_temperature must be positive, but is {self.dataset_temperature}.")

    def plan(self) -> dict[str, Any]:
        """The options that decide the result; a folder made with other ones is not continued."""
        where_and_how = ("output", "overwrite", "workers", "vision_cache", "report_to", "dry_run", "resume")
        irrelevant = (*where_and_how, "save_every", "log_every")
        return {name: value for name, value in asdict(self).items() if name not in irrelevant}


@dataclass
class DistillArguments(TrainArguments):
    """UniME stage 1: a text-embedding teacher's in-batch similarities go into the language model."""

    teacher: str = field(default="", metadata={"help": "Text-embedding model: any Sentence Transformers model."})
    temperature: float = field(default=0.02, metadata={"help": "Temperature of both similarity distributions."})
    direction: str = field(default="teacher_student", metadata={"help": "teacher_student or student_teacher."})
    mask_diagonal: bool = field(default=True, metadata={"help": "Leave out the similarity of a text to itself."})


@dataclass
class HardNegativeArguments(TrainArguments):
    """UniME stage 2: in-batch hard negatives after filtering false ones."""

    temperature: float = field(default=0.02, metadata={"help": "Temperature of the similarities."})
    false_negative_margin: float = field(default=0.1, metadata={"help": "Candidates above positive + margin go."})
    num_negatives: int = field(default=8, metadata={"help": "Hardest remaining candidates per query."})


@dataclass
class InBatchArguments(TrainArguments):
    """Control: plain in-batch InfoNCE."""

    temperature: float = field(default=0.02, metadata={"help": "Temperature of the similarities."})


@dataclass
class SoftLabelArguments(TrainArguments):
    """UniME-V2: similarities are aligned with the judge's scores over mined hard negatives."""

    temperature: float = field(default=0.02, metadata={"help": "Temperature of the similarities."})
    label_temperature: float | None = field(default=None, metadata={"help": "Of the judge's scores; none: the same."})
    divergence: str = field(default="symmetric_kl", metadata={"help": "symmetric_kl, js or kl."})
    num_negatives: int = field(default=8, metadata={"help": "Negatives per query, of those that are stored."})
    in_batch_weight: float = field(default=0.0, metadata={"help": "Weight of an added in-batch InfoNCE term."})


@dataclass
class RerankerArguments(TrainArguments):
    """UniME-V2-Reranker: pairwise and listwise answers from the judged rows."""

    template: str = field(default="official", metadata={"help": "Prompt template: official, tiny or a file."})
    num_negatives: int = field(default=9, metadata={"help": "Negatives in the list, of those that are stored."})
    pairwise_weight: float = field(default=1.0, metadata={"help": "Weight of the Yes/No term."})
    listwise_weight: float = field(default=1.0, metadata={"help": "Weight of the list term."})
    min_list_length: int | None = field(  # ranking is in lists of up to ten, and the last one may be short
        default=2, metadata={"help": "Lists of random length from this up to 1 + num_negatives; none: all as long."}
    )
    target_temperature: float | None = field(
        default=None, metadata={"help": "The list's target is softmax(score / this); none: the positive alone."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, default in (("token_budget", None), ("sub_batch_size", None), ("dataset_temperature", 1.0)):
            if getattr(self, option) != default:
                raise ValueError(
                    f"{option} plans batches of items and says nothing about the reranker's: leave it out."
                )
        if self.vision_cache is not None:
            raise ValueError("vision_cache feeds embedders and not the reranker: leave it out.")


@dataclass
class EngineArguments:
    """Where a stage between the trainings runs."""

    engine: str = field(default="local", metadata={"help": "local, or ray: a Ray cluster (extra [ray])."})
    workers: int = field(default=2, metadata={"help": "ray: actors at most."})
    gpus_per_worker: float = field(default=0.0, metadata={"help": "ray: GPUs for each actor."})

    def __post_init__(self) -> None:
        _one_of("engine", self.engine, ("local", "ray"))


@dataclass
class MineArguments(EngineArguments):
    """Global retrieval: the hard candidates of every pair."""

    data: str = field(default="", metadata={"help": "Folder of pair records."})
    model: str = field(default="unime-tiny", metadata={"help": "Embedding model that retrieves."})
    output: str = field(default="", metadata={"help": "Folder for the candidate pools."})
    vectors: str = field(default="", metadata={"help": "Folder for the vectors, shared by runs; default: in output."})
    overwrite: bool = field(default=False, metadata={"help": "Throw away what is in the output folder."})
    num_candidates: int = field(default=50, metadata={"help": "Candidates per query."})
    pool: str = field(default="modality", metadata={"help": "Search among: modality, dataset or global."})
    max_similarity: str = field(
        default="positive",
        metadata={"help": "positive: only below the positive's similarity; none; or a margin above it."},
    )
    batch_size: int = field(default=64, metadata={"help": "Items per forward pass."})


@dataclass
class JudgeArguments(EngineArguments):
    """MLLM-as-a-judge, and the choice of negatives by its scores."""

    data: str = field(default="", metadata={"help": "Folder of candidate pools, written by mine."})
    model: str = field(default="unime-tiny", metadata={"help": "Generative vision-language model that judges."})
    template: str = field(default="official", metadata={"help": "Prompt template: official, tiny or a file."})
    scores: str = field(default="", metadata={"help": "Folder for the scores."})
    output: str = field(default="", metadata={"help": "Folder for the judged training rows."})
    overwrite: bool = field(default=False, metadata={"help": "Throw away what is in the output folders."})
    batch_size: int = field(default=32, metadata={"help": "Pairs per forward pass."})
    cache_mb: int = field(default=256, metadata={"help": "Memory for images that were seen before, in MiB."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the judge: auto, float32, bfloat16, float16."})
    max_text_tokens: int = field(default=0, metadata={"help": "Texts are cut after so many tokens; 0: set aside."})
    url: str = field(default="", metadata={"help": "Ask `model` at this OpenAI-compatible server instead (.../v1)."})
    concurrency: int = field(default=32, metadata={"help": "Requests to the server at once."})
    strong_model: str = field(default="", metadata={"help": "Second judge, for pairs the first is unsure about."})
    strong_band: float = field(default=2.0, metadata={"help": "Unsure: log-odds from minus this to this."})
    shard: str = field(default="", metadata={"help": "i/n: only every n-th shard from the i-th on (0/4 ... 3/4)."})
    dry_run: bool = field(default=False, metadata={"help": "Print what it would cost, and stop."})
    calibrate: int = field(default=0, metadata={"help": "Measure the judges on so many queries, and stop."})
    shard_size: int = field(default=256, metadata={"help": "Rows per shard; a killed run loses at most one."})
    margin: float = field(default=0.01, metadata={"help": "Candidates scored above the positive less this go."})
    stride: int = field(default=5, metadata={"help": "Step of the cyclic sampling."})
    num_negatives: int = field(default=10, metadata={"help": "Negatives per row."})
    score_divisor: float = field(default=1.0, metadata={"help": "Score = sigmoid(log-odds / this); released: 1.05."})
    min_positive_score: float = field(
        default=0.0, metadata={"help": "Of every positive; 1 trusts the pairs, not the judge."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the draw where no candidate survives."})


@dataclass
class ImportArguments:
    """Data of one's own, MMEB-train or a released judge file become a record folder."""

    source: str = field(default="", metadata={"help": "File or folder to read."})
    output: str = field(default="", metadata={"help": "Folder for the records."})
    overwrite: bool = field(default=False, metadata={"help": "Throw away what is in the output folder."})
    layout: str = field(
        default="own",
        metadata={"help": "own (JSONL, JSON, CSV, Parquet, datasets), mmeb-train, or released (UniME-V2's JSON)."},
    )
    pairs: list[dict] | None = field(default=None, metadata={"help": "own: how rows become pairs; see configs/."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})
    embed_images: bool = field(default=False, metadata={"help": "own: copy image files into the output."})
    split: str = field(default="original", metadata={"help": "mmeb-train: original, diverse_instruction or train."})
    subsets: list[str] | None = field(default=None, metadata={"help": "mmeb-train: some of the 20 sets."})
    read_images: bool = field(default=True, metadata={"help": "Decode every image once, to set bad ones aside."})
    limit: int | None = field(default=None, metadata={"help": "Rows at most (mmeb-train: of each set)."})
    workers: int = field(default=4, metadata={"help": "Threads that decode images."})

    def __post_init__(self) -> None:
        _one_of("layout", self.layout, ("own", "mmeb-train", "released"))


def set_up_logging() -> None:
    """Show what a script does, with times; libraries, and all processes but the first, speak up at warnings only."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("unime_st").setLevel(logging.INFO if first else logging.WARNING)


def _read_yaml(path: Path, known: set[str]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration file.")
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected `option: value` lines, found a {type(content).__name__}.")
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(sorted(known))}."
            raise ValueError(f"{path}: unknown option {key!r}; {hint}")
    return content


def parse(kind: type[ArgumentsT], description: str | None, argv: Sequence[str] | None = None) -> ArgumentsT:
    """Read ``[CONFIG.yaml] [--option value ...]``; the command line wins over the file.

    Args:
        kind: Dataclass with the options.
        description: Text of ``--help``.
        argv: Arguments, by default those of the process.

    Returns:
        A filled instance of ``kind``.

    Raises:
        SystemExit: With a message, if an option is unknown or a value unusable.

    Example:
        >>> from unime_st.training.arguments import InBatchArguments, parse
        >>> parse(InBatchArguments, None, ["--max_steps", "5"]).max_steps
        5
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        cast(Any, kind), description=description, usage="%(prog)s [CONFIG.yaml] [--option value ...]"
    )
    try:
        if arguments and not arguments[0].startswith("-"):
            known = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
            parser.set_defaults(**_read_yaml(Path(arguments.pop(0)), known))
        (parsed,) = parser.parse_args_into_dataclasses(arguments)
    except (ValueError, yaml.YAMLError) as error:
        parser.error(str(error))
    return parsed
