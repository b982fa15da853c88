"""Two processes under torchrun: the same curve and weights as one, and an end when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.training.arguments import HardNegativeArguments, SoftLabelArguments
from unime_st.training.stages import train_hard_negatives, train_soft_labels

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
ROWS = 21  # two batches of 8, and one of 5 that two processes share as 3 and 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Judged rows of all modalities."""
    pairs = list(training_records(ROWS, seed=5))
    rows = [
        PairRecord(
            pair.query, pair.positive, pair.dataset, (pairs[i - 1].positive, pairs[i - 2].positive), 2.0, (-1.0, 0.5)
        )
        for i, pair in enumerate(pairs)
    ]
    return str(RecordSet.write(tmp_path_factory.mktemp("data") / "rows", rows, {}).folder)


def _command(script: str, processes: int, **options: object) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, *start, str(ROOT / "train_scripts" / f"{script}.py"), *words]


STAGES: dict[str, tuple[Callable, type, dict[str, int]]] = {
    "hard_negatives": (train_hard_negatives, HardNegativeArguments, {"mini_batch_size": 3, "num_negatives": 4}),
    # Six items at a time are one row of four: passes of one row are accumulated, five of them in the last step.
    "soft_labels": (train_soft_labels, SoftLabelArguments, {"mini_batch_size": 6, "num_negatives": 2}),
}


@pytest.mark.parametrize("script", STAGES)
def test_two_processes_train_as_one(data: str, tmp_path: Path, script: str) -> None:
    train, kind, own = STAGES[script]
    common = {"data": data, "learning_rate": 1e-3, "lora_dropout": 0.0, "log_every": 1, "drop_last": False, **own}
    outputs = [tmp_path / "one", tmp_path / "two"]
    train(kind(output=str(outputs[0]), batch_size=8, **common))
    cache = tmp_path / "cache"  # which both fill, and which changes nothing
    command = _command(script, 2, output=outputs[1], batch_size=4, vision_cache=cache, **common)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    curves = [
        [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()] for output in outputs
    ]
    weights = [load_file(output / "model.safetensors") for output in outputs]
    assert len(curves[0]) == 3
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).abs().max() < 1e-5, name


def test_a_dead_process_ends_the_run(data: str, tmp_path: Path) -> None:
    options = {"data": data, "output": tmp_path / "out", "batch_size": 4, "max_steps": 5000}
    options |= {"drop_last": False, "save_every": 4}  # after the uneven end of the first pass, which must not hang
    command = _command("in_batch", 2, **options)
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=-3, stderr=-3, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and not list((tmp_path / "out" / "checkpoints").glob("checkpoint-*")):
                time.sleep(0.1)
            ranks = psutil.Process(process.pid).children()
            assert len(ranks) == 2, "the run did not begin"
            ranks[1].send_signal(signal.SIGKILL)
            assert process.wait(timeout=120) != 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "out" / "manifest.json").exists()
