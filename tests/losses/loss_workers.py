"""What the spawned processes of the distributed tests of the embedding losses run; importable without pytest."""

from __future__ import annotations

import os
from pathlib import Path

import loss_batches as batches
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch.nn.parallel import DistributedDataParallel


def shard_rows(sizes: list[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def text_embedder(folder: str) -> SentenceTransformer:
    """The model without its vision tower, which text alone leaves without gradients."""
    model = SentenceTransformer(folder, device="cpu").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in name)
    return model


def train_on_shards(rank: int, splits: list[list[int]], folder: str, output: str) -> None:
    """For each way to split the batch, every loss and its gradients, plain and cached, under DDP; rank 0 saves them."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{output}/rendezvous", rank=rank, world_size=len(splits[0]))
    model = text_embedder(folder)
    results: dict[str, torch.Tensor] = {}
    for sizes in splits:
        for mode, options in (("plain", {}), ("cached", {"mini_batch_size": 2})):
            losses = batches.labelled_losses(model, sum(sizes), gather_across_devices=True, **options)
            for name, (loss, num_columns, labels) in losses.items():
                model.zero_grad()
                loss.model = DistributedDataParallel(model)
                rows = shard_rows(sizes, rank)
                features = batches.features(model, ["text"] * num_columns, sum(sizes), rows)
                value = loss(features, None if labels is None else labels[rows])
                value.backward()
                total = value.detach().clone()
                dist.all_reduce(total)
                key = f"{sizes}, {mode}, {name}"
                results[key] = total / len(sizes)
                found = batches.gradients(model) | batches.own_gradients(loss)
                results |= {f"{key}: {weight}": value for weight, value in found.items()}
    if rank == 0:
        save_file(results, Path(output) / "results.safetensors")
    dist.barrier()
    dist.destroy_process_group()
