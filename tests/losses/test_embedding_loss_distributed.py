"""Two gloo processes that gather equal one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import loss_batches as batches
import pytest
from loss_workers import text_embedder, train_on_shards
from safetensors.torch import load_file

from tests.programs import run_ranks

pytestmark = pytest.mark.distributed

ROWS = 6
SPLITS = [[3, 3], [4, 2]]  # uneven shards are what the end of an epoch brings


def test_two_processes_equal_one(embedder_folder: str, tmp_path: Path) -> None:
    run_ranks(train_on_shards, SPLITS, embedder_folder, str(tmp_path))
    results = load_file(tmp_path / "results.safetensors")

    model = text_embedder(embedder_folder)
    for name, (loss, num_columns, labels) in batches.labelled_losses(model, ROWS).items():
        model.zero_grad()
        wanted = loss(batches.features(model, ["text"] * num_columns, ROWS), labels)
        wanted.backward()
        for sizes in SPLITS:
            for mode in ("plain", "cached"):
                key = f"{sizes}, {mode}, {name}"
                prefix = f"{key}: "
                gradients = {n.removeprefix(prefix): g for n, g in results.items() if n.startswith(prefix)}
                assert results[key].item() == pytest.approx(wanted.item(), rel=1e-5), key
                expected = batches.gradients(model) | batches.own_gradients(loss)
                assert batches.largest_difference(gradients, expected) < 1e-5, key
