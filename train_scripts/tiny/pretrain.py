"""Pre-training of `unime-tiny` as a multimodal language model, from scratch on drawn scenes."""

from __future__ import annotations

import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from tqdm import trange
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from train_scripts.tiny.build import build_model, build_processor, build_tokenizer
from train_scripts.tiny.collation import collate, collate_summaries
from train_scripts.tiny.curriculum import CURRICULA, draw_batch
from train_scripts.tiny.summaries import summary_loss

logger = logging.getLogger(__name__)
LOG = "log.jsonl"
"""File in the folder of a checkpoint: options, and loss and accuracy by task."""


@dataclass
class PretrainArguments:
    """Options of the pre-training."""

    output: str = field(default="runs/pretrain_tiny", metadata={"help": "Output folder of checkpoint and log."})
    start: str = field(default="", metadata={"help": "Checkpoint to start from; empty = from scratch."})
    curriculum: str = field(default="seeing", metadata={"help": f"One of {', '.join(CURRICULA)}."})
    steps: int = field(default=1500, metadata={"help": "Optimizer steps of the learning-rate schedule."})
    stop_after: int = field(
        default=-1, metadata={"help": "Stop after this many steps; -1 = at the end of the schedule."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights and data."})
    muon_learning_rate: float = field(default=6e-3, metadata={"help": "Peak learning rate of Muon (weight matrices)."})
    learning_rate: float = field(
        default=2e-3, metadata={"help": "Peak learning rate of AdamW (embeddings, norms, biases)."}
    )
    log_every: int = field(default=100, metadata={"help": "Steps between log lines and saved checkpoints."})

    @property
    def last_step(self) -> int:
        """The step after which the training ends."""
        return self.stop_after if self.stop_after > 0 else self.steps


class _Batches(IterableDataset):
    """Collated batches of the curriculum, the same for the same seed."""

    def __init__(self, processor: Qwen2VLProcessor, arguments: PretrainArguments) -> None:
        self.processor, self.arguments = processor, arguments

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        chosen = self.arguments
        rng = random.Random(f"lessons-{chosen.curriculum}-{chosen.seed}")
        for step in range(chosen.steps):
            task, examples = draw_batch(rng, chosen.curriculum, step / chosen.steps)
            together: Callable[..., dict[str, Any]] = collate_summaries if task == "sum_up" else collate
            yield task, together(examples, self.processor)


def _optimizers(model: torch.nn.Module, arguments: PretrainArguments) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, AdamW for all else: several times fewer steps here than AdamW alone."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=arguments.muon_learning_rate, adjust_lr_fn="match_rms_adamw", weight_decay=0.01),
        torch.optim.AdamW(others, lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def answer_loss(model: Qwen2VLForConditionalGeneration, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Mean cross-entropy of the answers, and the accuracy of their tokens.

    The language-model head is applied only to positions with a label.
    """
    labels = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.model(**inputs).last_hidden_state[:, :-1]
    known = labels != -100
    logits = model.lm_head(hidden[known]).float()
    loss = cross_entropy(logits, labels[known])
    return loss, float((logits.argmax(-1) == labels[known]).float().mean())


def _rate(step: int, steps: int) -> float:
    """Learning-rate factor: linear warm-up over 2 % of the steps, linear decay to zero over the last 40 %."""
    return min(1.0, (step + 1) / (0.02 * steps), max(0.0, (steps - step) / (0.4 * steps)))


def _begin(arguments: PretrainArguments) -> tuple[Qwen2VLProcessor, Qwen2VLForConditionalGeneration]:
    if arguments.curriculum not in CURRICULA:
        raise ValueError(f"curriculum must be one of {', '.join(CURRICULA)}, got {arguments.curriculum!r}.")
    if arguments.start:
        processor = Qwen2VLProcessor.from_pretrained(arguments.start)
        return processor, Qwen2VLForConditionalGeneration.from_pretrained(arguments.start).train()
    tokenizer = build_tokenizer(arguments.seed)
    return build_processor(tokenizer), build_model(tokenizer)


def pretrain(arguments: PretrainArguments) -> Path:
    """Train a tiny Qwen2-VL on scenes and save it with its tokenizer, processor and log.

    Args:
        arguments: Options; the same options and library versions give the same weights on the same machine.

    Returns:
        The folder of the checkpoint.
    """
    torch.manual_seed(arguments.seed)
    processor, model = _begin(arguments)
    optimizers = _optimizers(model, arguments)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    batches = DataLoader(_Batches(processor, arguments), batch_size=None, num_workers=1)
    output = Path(arguments.output)
    processor.save_pretrained(output)
    recent: dict[str, list[tuple[float, float]]] = {}
    started = time.perf_counter()
    logger.info(
        "Training %s parameters for %d steps.", f"{sum(p.numel() for p in model.parameters()):,}", arguments.steps
    )
    if arguments.start and (history := Path(arguments.start) / LOG).is_file():
        shutil.copy(history, output / LOG)  # the whole history stays with the weights
    last = arguments.last_step
    with (output / LOG).open("a" if arguments.start else "w") as log:
        log.write(json.dumps({"arguments": asdict(arguments)}) + "\n")
        for step, (task, batch) in zip(trange(last, desc="pretrain"), batches):
            for optimizer, peak in zip(optimizers, peaks):
                optimizer.param_groups[0]["lr"] = peak * _rate(step, arguments.steps)
            loss, accuracy = summary_loss(model, batch) if task == "sum_up" else answer_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            recent.setdefault(task, []).append((loss.item(), accuracy))
            if (step + 1) % arguments.log_every == 0 or step + 1 == last:
                means = {name: [round(sum(v) / len(v), 4) for v in zip(*values)] for name, values in recent.items()}
                seconds = round(time.perf_counter() - started, 1)
                model.save_pretrained(output)  # before the line that says so
                log.write(json.dumps({"step": step + 1, "seconds": seconds, "loss_accuracy": means}) + "\n")
                log.flush()
                recent.clear()
    return output
