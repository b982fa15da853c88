"""Two gloo processes that gather equal one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import loss_batches as batches
import pytest
import torch
import torch.multiprocessing
from loss_workers import text_embedder, train_on_shards

ROWS = 6
SPLITS = [[3, 3], [4, 2]]  # uneven shards are what the end of an epoch brings


def test_two_processes_equal_one(embedder_folder: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_on_shards, (SPLITS, embedder_folder, str(tmp_path)), nprocs=2)
    results = torch.load(tmp_path / "results.pt", weights_only=True)

    model = text_embedder(embedder_folder)
    for name, (loss, num_columns, labels) in batches.labelled_losses(model, ROWS).items():
        model.zero_grad()
        wanted = loss(batches.features(model, ["text"] * num_columns, ROWS), labels)
        wanted.backward()
        for sizes in SPLITS:
            for mode in ("plain", "cached"):
                key = f"{sizes}, {mode}, {name}"
                value, gradients = results[key]
                assert value == pytest.approx(wanted.item(), rel=1e-5), key
                assert batches.largest_difference(gradients, batches.gradients(model)) < 1e-5, key
