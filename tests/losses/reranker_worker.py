"""What the spawned processes of the distributed test of RerankerLoss run; importable without pytest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tiny_reranker as tiny
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from unime_st import UniMEReranker
from unime_st.losses import RerankerLoss

SHADES = ["red", "blue", "green", "big", "small", "left", "right", "triangle"]


def rows(count: int, negatives: int = 3) -> list[list[Any]]:
    """Columns query, positive, negative_1, ...: texts, images and both."""
    columns: list[list[Any]] = [[f"a {SHADES[row % 8]} image" for row in range(count)]]
    columns.append([{"image": tiny.make_image(row % 5), "text": None} for row in range(count)])
    columns += [
        [
            f"the {SHADES[(row + index) % 8]} one" if row % 2 else {"text": "b", "image": tiny.make_image(index)}
            for row in range(count)
        ]
        for index in range(negatives)
    ]
    return columns


def scores(count: int, negatives: int = 3) -> torch.Tensor:
    """Judge scores in which every negative is the hardest of some row."""
    return torch.rand(count, 1 + negatives, generator=torch.Generator().manual_seed(3))


def summed(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The whole loss, as the trainer adds it up."""
    return torch.stack(list(parts.values())).sum()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all gradients."""
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


def train_on_half(rank: int, folder: str, output: str) -> None:
    """The gradient of both modes under DDP on this process's half of the batch; rank 0 saves it."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{output}/rendezvous", rank=rank, world_size=2)
    results = {}
    for mode, options in (("plain", {}), ("cached", {"mini_batch_size": 2})):
        model = UniMEReranker(folder, device="cpu")
        loss = RerankerLoss(model, **options)
        # As in CrossEncoderTrainer: the wrapper replaces the model and takes over its preprocessing.
        wrapper = DistributedDataParallel(model)
        wrapper.preprocess = model.preprocess
        loss.model = wrapper
        torch.manual_seed(11 + rank)  # the first process draws for all
        half = slice(3 * rank, 3 * rank + 3)
        parts = loss([column[half] for column in rows(6)], scores(6)[half])
        summed(parts).backward()
        values = torch.stack([part.detach() for part in parts.values()])
        dist.all_reduce(values)
        results[f"{mode}/values"] = values / 2
        results |= {f"{mode}/{name}": gradient.contiguous() for name, gradient in gradients(model).items()}
    if rank == 0:
        save_file(results, Path(output) / "results.safetensors")
    dist.barrier()
    dist.destroy_process_group()
