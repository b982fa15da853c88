"""`make demo` and one's own data, small but whole: real subprocesses, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from train_scripts.demo.results import MODELS, TASKS
from train_scripts.demo.settings import GROUPS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "records": 120,
    "batch_size": 8,
    "distill_steps": 1,
    "warm_steps": 2,
    "steps": 1,
    "reranker_steps": 1,
    "eval_size": 12,
    "num_candidates": 6,
    "num_negatives": 5,
}


def _command(**options: object) -> list[str]:
    pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "train_scripts.demo", *pairs]


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def test_the_demo_survives_a_kill_and_writes_every_number(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    command = _command(output=output, arms="all", **SMALL)
    with subprocess.Popen(command, env=_environment(), stdout=-3, stderr=-3) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (output / "seed-0" / "pools" / "manifest.json").exists():
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    before = json.loads((output / "seed-0" / "seconds.json").read_text())
    assert "stage2" in before and not (output / "results.json").exists()
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stage2: done before" in done.stderr

    results = json.loads((output / "results.json").read_text())
    found = {(row["model"], row["task"], row["metric"]) for row in results["rows"]}
    wanted = {(model, task, "hit_rate_at_1") for model in MODELS for task in TASKS}
    wanted |= {(model, "compositional", metric) for model in MODELS for metric in (*GROUPS, *sum(GROUPS.values(), ()))}
    assert found == wanted and len(results["rows"]) == len(wanted)
    assert all(0 <= row["value"] <= 1 and row["seed"] == 0 for row in results["rows"])
    assert results["seconds"]["stage2"] == before["stage2"] and results["peak_rss_mb"] < 4096
    assert "<html" in (output / "report.html").read_text().lower()

    other = subprocess.run(
        _command(output=output, **{**SMALL, "steps": 3}), capture_output=True, text=True, check=False
    )
    assert other.returncode != 0 and "begun with other settings (steps)" in other.stderr


def _own_data(folder: Path, count: int) -> Path:
    """Transparent, palette and odd-sized images with names, and two rows that are no good."""
    lines = []
    for number in range(count):
        color = ("red", "green", "blue")[number % 3]
        mode = ("RGBA", "P", "RGB", "L")[number % 4]
        image = Image.new("RGBA", (40 + 9 * number, 60), (0, 0, 0, 0))
        ImageDraw.Draw(image).ellipse((5, 5, 35, 50), fill=color)
        image.convert(mode).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "name": f"{color} ellipse number {number}"})
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    lines += [{"image": "broken.png", "name": "broken"}, {"image": "0.png", "name": None}]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_own_images_train_and_bad_ones_are_set_aside(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    train, test = _own_data(tmp_path / "train", 24), _own_data(tmp_path / "test", 12)
    config = tmp_path / "own.yaml"
    config.write_text(
        "pairs:\n"
        "  - {dataset: name-to-image, query: {text: name}, positive: {image: image}}\n"
        "  - {dataset: image-to-name, query: {image: image}, positive: {text: name}}\n"
        "warm_steps: 1\nsteps: 1\nbatch_size: 8\nnum_candidates: 6\nnum_negatives: 3\n"
    )
    command = [sys.executable, "-m", "train_scripts.demo.own_data", str(config)]
    command += ["--data", str(train), "--test", str(test), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert set(results) == {"base", "warm", "in_batch", "v2"}
    assert all(set(scores) == {"name-to-image", "image-to-name", "mean"} for scores in results.values())
    rejected = [
        json.loads(line) for line in (tmp_path / "run" / "records" / "rejected.jsonl").read_text().splitlines()
    ]
    assert len(rejected) == 4 and all(entry["reason"] for entry in rejected)


@pytest.mark.parametrize("missing", ["--data", "--test"])
def test_own_data_names_what_is_missing(tmp_path: Path, missing: str) -> None:
    given = "--test" if missing == "--data" else "--data"
    command = [sys.executable, "-m", "train_scripts.demo.own_data", given, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "--data TRAIN --test TEST" in done.stderr
