"""Options of a small training, its loss curve, its sudden end, and what it changes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from tests.programs import Program
from unime_st.data.records import PairRecord

SMALL = {
    "model": "unime-tiny",
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "lora_dropout": 0.0,
}

ROOT = Path(__file__).resolve().parents[2]


def losses(folder: Path) -> list[float]:
    """Logged losses of a stage."""
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def kill_after_some_steps(options: Mapping[str, object], output: Path) -> None:
    """Run the in-batch stage in a process of its own, and kill it between its second checkpoint and its end."""
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    script = [str(ROOT / "train_scripts" / "in_batch.py"), *words, "--output", str(output)]
    with Program(script) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not list((output / "checkpoints").glob("checkpoint-[4-9]*")):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not (output / "manifest.json").exists(), "the run ended before it could be killed"


def changed(folder: Path) -> float:
    """How far the embedding of a text moved from the embedded default's."""
    texts = ["find an image: a red circle", "a large blue star above a small green ring"]
    before, after = (SentenceTransformer(name, device="cpu").encode(texts) for name in ("unime-tiny", str(folder)))
    assert np.allclose(np.linalg.norm(after, axis=1), 1.0, atol=1e-5)
    return float(np.abs(after - before).max())


def with_judged_negatives(pairs: Sequence[PairRecord]) -> list[PairRecord]:
    """The pairs as judged rows, whose negatives are the positives of the two pairs before."""
    return [
        PairRecord(p.query, p.positive, p.dataset, (pairs[i - 1].positive, pairs[i - 2].positive), 2.0, (-1.0, 0.5))
        for i, p in enumerate(pairs)
    ]
