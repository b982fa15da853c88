"""Two processes, with whole or sharded weights: the same curve and weights as one, and an end when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.programs import run
from unime_st.data.manifest import StageConflictError
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.stages import (
    HardNegativeArguments,
    InBatchArguments,
    RerankerArguments,
    SoftLabelArguments,
    train_hard_negatives,
    train_in_batch,
    train_reranker,
    train_soft_labels,
)

pytestmark = pytest.mark.distributed

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


def _words(script: str, options: dict[str, object]) -> list[str]:
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [str(ROOT / "train_scripts" / f"{script}.py"), *words]


def _run_two(script: str, **options: object) -> None:
    """Run a script in two processes with the variables that `torch.distributed.run` sets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with ThreadPoolExecutor(2) as pool:
        ranks = [{**ENVIRONMENT, **shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        list(
            pool.map(lambda environment: run(_words(script, options), env=environment, check=True, timeout=500), ranks)
        )


def _command(script: str, processes: int, **options: object) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *start, *_words(script, options)]


def _sharded_command(script: str, processes: int, **options: object) -> list[str]:
    """The same under FSDP2, started by accelerate from our configuration."""
    config = ["--config_file", str(ROOT / "train_scripts" / "accelerate" / "fsdp2.yaml")]
    config += ["--num_processes", str(processes), "--main_process_port", "0"]  # 0: a free one
    start = ["-m", "accelerate.commands.launch", *config, str(Path(__file__).with_name("fsdp_on_cpu.py"))]
    return [sys.executable, *start, *_words(script, options)]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def _kill_a_rank(command: list[str], checkpoints: Path) -> None:
    """Wait for the first checkpoint, kill the second process, and see to it that the run ends with an error."""
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=-3, stderr=-3, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
                time.sleep(0.1)
            ranks = psutil.Process(process.pid).children()
            assert len(ranks) == 2, "the run did not begin"
            ranks[1].send_signal(signal.SIGKILL)
            assert process.wait(timeout=120) != 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert not (checkpoints.parent / "manifest.json").exists()


def _assert_same(outputs: list[Path], steps: int) -> None:
    curves = [
        [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()] for output in outputs
    ]
    weights = [load_file(output / "model.safetensors") for output in outputs]
    assert len(curves[0]) == steps
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert weights[1].keys() == weights[0].keys()
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).abs().max() < 1e-5, name


STAGES: dict[str, tuple[Callable, type, dict[str, object]]] = {
    "hard_negatives": (train_hard_negatives, HardNegativeArguments, {"mini_batch_size": 3, "num_negatives": 4}),
    # Six items at a time are one row of four: passes of one row are accumulated, five of them in the last step.
    "soft_labels": (train_soft_labels, SoftLabelArguments, {"mini_batch_size": 6, "num_negatives": 2}),
    "hard_negatives, small model": (
        train_hard_negatives,
        HardNegativeArguments,
        {
            "mini_batch_size": 3,
            "num_negatives": 4,
            "gradient_caching": False,
            "item_cache": 16,
            "optim": "muon",
            "lora_rank": 0,
            "frozen": "visual",
            "learning_rate": 1e-4,  # see SHARDED
        },
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_train_as_one(data: str, tmp_path: Path, name: str) -> None:
    (train, kind, own), script = STAGES[name], name.partition(",")[0]
    common = {
        "data": data,
        "learning_rate": 1e-3,
        "lora_dropout": 0.0,
        "logging_steps": 1,
        "dataloader_drop_last": False,
        **own,
    }
    outputs = [tmp_path / "one", tmp_path / "two"]
    train(kind(output=str(outputs[0]), per_device_train_batch_size=8, **common))
    cache = tmp_path / "cache"  # which both fill, and which changes nothing
    _run_two(script, output=outputs[1], per_device_train_batch_size=4, vision_cache=cache, **common)
    _assert_same(outputs, steps=3)


def test_a_dead_process_ends_the_run_and_both_go_on(data: str, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "data": data,
        "learning_rate": 1e-4,
        "lora_dropout": 0.0,
        "max_steps": 40,
        "logging_steps": 3,
    }
    common |= {"mini_batch_size": 3, "num_negatives": 4}
    common |= {
        "dataloader_drop_last": False,
        "save_steps": 4,
    }  # after the uneven end of the first pass, which must not hang
    outputs = [tmp_path / "one", tmp_path / "two"]
    command = _command("hard_negatives", 2, output=outputs[1], per_device_train_batch_size=4, **common)
    _kill_a_rank(command, outputs[1] / "checkpoints")
    with pytest.raises(StageConflictError, match="processes: 2 there, 1 now"):
        train_hard_negatives(HardNegativeArguments(output=str(outputs[1]), per_device_train_batch_size=4, **common))
    assert "going on from" in _run(command)
    train_hard_negatives(HardNegativeArguments(output=str(outputs[0]), per_device_train_batch_size=8, **common))
    _assert_same(outputs, steps=20)  # every third, and every fourth, where a checkpoint is


# With full fine-tuning some weights hardly have a gradient (biases of keys), of which Adam makes steps nevertheless; at a
# small learning rate those stay below the tolerance.
SHARDED: dict[str, tuple[Callable, type, dict[str, Any]]] = {
    # All weights, accumulated; by tokens, so that the forward passes of the two processes differ in number.
    "soft_labels": (
        train_soft_labels,
        SoftLabelArguments,
        {
            "token_budget": "120",
            "num_negatives": 2,
            "lora_rank": 0,
            "learning_rate": 1e-4,
            "dataloader_drop_last": False,
        },
    ),
    # An adapter over frozen weights, gradients cached. The stock loss takes as many rows from every process.
    "in_batch": (train_in_batch, InBatchArguments, {"mini_batch_size": 3, "learning_rate": 1e-3, "epochs": 2.0}),
}


@pytest.mark.parametrize("script", SHARDED)
def test_two_sharded_processes_train_as_one(data: str, tmp_path: Path, script: str) -> None:
    train, kind, own = SHARDED[script]
    common = {"data": data, "lora_dropout": 0.0, "logging_steps": 1, **own}
    outputs = [tmp_path / "one", tmp_path / "two"]
    train(kind(output=str(outputs[0]), per_device_train_batch_size=8, **common))
    _run(_sharded_command(script, 2, output=outputs[1], per_device_train_batch_size=4, **common))
    _assert_same(outputs, steps=3 if script == "soft_labels" else 4)


def test_a_sharded_run_goes_on_after_a_process_died(data: str, tmp_path: Path) -> None:
    common = {"data": data, "learning_rate": 1e-4, "logging_steps": 1, "lora_rank": 0, "max_steps": 12}
    common |= {"mini_batch_size": 3, "num_negatives": 4, "dataloader_drop_last": False}
    outputs = [tmp_path / "one", tmp_path / "two"]
    train_hard_negatives(HardNegativeArguments(output=str(outputs[0]), per_device_train_batch_size=8, **common))  # type: ignore[arg-type]
    command = _sharded_command(
        "hard_negatives", 2, output=outputs[1], per_device_train_batch_size=4, save_steps=2, **common
    )
    _kill_a_rank(command, outputs[1] / "checkpoints")
    assert list(outputs[1].glob("checkpoints/checkpoint-*/pytorch_model_fsdp_0")), "nothing was sharded"
    assert "going on from" in _run(command)
    _assert_same(outputs, steps=12)


def test_what_cannot_be_done_with_sharded_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    options, evaluated = RerankerArguments(), InBatchArguments(eval_data="held_out")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as the launcher sets it
    with pytest.raises(ValueError, match="A reranker's weights cannot be sharded"):
        train_reranker(options)
    with pytest.raises(ValueError, match=r"eval_data: sharded weights .* cannot be evaluated"):
        train_in_batch(evaluated)
