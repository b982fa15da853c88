"""mteb's own ``mteb run`` with the start-up hook on and off: what is not ours stays as it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mteb_tasks.foreign import write_text_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"

STOCK = {
    "sts": ["run", "-m", "org/text", "-t", "ForeignSTS"],
    "two": ["run", "-m", "org/text", "-t", "ForeignSTS", "ForeignRetrieval"],
    "own": ["run", "-m", "org/tiny", "-t", "ForeignRetrieval"],
    "unknown": ["run", "-m", "nope", "-t", "ForeignSTS"],
    "no-model": ["run", "-t", "ForeignSTS"],
    "no-task": ["run", "-m", "org/text", "-t", "NoSuchTask"],
    "loud": ["run", "-m", "org/text", "-t", "ForeignSTS", "-v", "7"],
}
MINILM = "sentence-transformers/all-MiniLM-L6-v2"  # cards are made for models of mteb's registry only
CARD = ["create-model-results", "--model-name", MINILM, "--tasks", "ForeignSTS", "--results-folder", "FOLDER/sts"]
OTHER_COMMANDS = {
    "help": ["--help"],
    "run-help": ["run", "--help"],
    "leaderboard-help": ["leaderboard", "--help"],
    "mock-help": ["mock-run", "--help"],
    "nothing": [],
    "unknown-command": ["nope"],
    "tasks": ["available-tasks", "-t", "STS12", "Banking77Classification"],
    "tasks-of-a-type": ["available-tasks", "--task-types", "VisualSTS(eng)", "-l", "eng"],
    "no-such-task": ["available-tasks", "-t", "NoSuchTask"],
    "benchmark": ["available-benchmarks", "-b", "MTEB(eng, v2)"],
    "no-such-benchmark": ["available-benchmarks", "-b", "NoSuchBenchmark"],
    "card": [*CARD, "--output-path", "FOLDER/card.md"],
    "card-again": [*CARD, "--output-path", "FOLDER/card.md"],
    "card-anew": [*CARD, "--output-path", "FOLDER/card.md", "--overwrite"],
    "card-from-card": [*CARD, "--output-path", "FOLDER/next.md", "--from-existing", "FOLDER/card.md"],
}
OURS = {
    "text-model": ["run", "-m", "org/text", "-t", "ScenesVQA"],
    "hub-model": ["run", "-m", "org/tiny", "-t", "ScenesVQA", "ForeignSTS"],
    "again": ["run", "-m", "org/tiny", "-t", "ScenesVQA"],
    "nobody": ["run", "-m", "nope", "-t", "ScenesVQA"],
}


class Commands:
    """What a list of commands did: their output, outcomes and result files."""

    def __init__(self, folder: Path, commands: dict[str, list[str]], models: dict[str, str], hook: str) -> None:
        folder.mkdir()
        if "again" in commands:
            (folder / "again").symlink_to("hub-model")
        line = (PACKAGING / "unime_st.pth").read_text().strip()
        script = f"{line}\nimport runpy\nrunpy.run_module('tests.mteb_tasks.mteb_commands', run_name='__main__')"
        paths = os.pathsep.join([str(PACKAGING), str(ROOT)])
        environment = {"PYTHONPATH": paths, "UNIME_ST_AUTOLOAD": hook, "UNIME_HOME": str(folder / "home")}
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder), json.dumps(models)],
            input=json.dumps(commands), env={**os.environ, **environment, "HF_HUB_OFFLINE": "1"}, cwd=folder,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-5000:]
        self.folder, self.output, self.errors = folder, done.stdout, done.stderr
        self.outcomes = json.loads((folder / "outcomes.json").read_text())

    def shown(self, name: str) -> str:
        """What a command wrote to standard output."""
        shown = self.output.split(f"<{name}>")[1].split(f"</{name}>")[0]
        return re.sub(r"\[[\d/]+ [\d:]+\]", "[time]", shown)

    def files(self, name: str) -> dict[str, object]:
        """Every file that a command wrote; of results the scores."""
        root = self.folder / name
        return {str(file.relative_to(root)): _content(file) for file in sorted(root.rglob("*")) if file.is_file()}


def _content(file: Path) -> object:
    contents = [
        json.loads(line) for line in (file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()])
    ]
    return [content.get("scores", content) for content in contents]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"org/text": str(write_text_model(tmp_path_factory.mktemp("models") / "text")), "org/tiny": "unime-tiny"}


@pytest.fixture(scope="module")
def hooked(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("hooked") / "runs", STOCK | OTHER_COMMANDS | OURS, models, "1")


def test_stock_runs_are_the_same_with_and_without_the_hook(models, hooked, tmp_path):
    models = {**models, "org/tiny": str(ROOT / "unime_st" / "models" / "unime-tiny")}
    plain = Commands(tmp_path / "runs", STOCK | OTHER_COMMANDS, models, "0")
    for name in STOCK:
        assert hooked.outcomes[name] == plain.outcomes[name]
        assert hooked.files(name) == plain.files(name)
        assert not re.search(r"^(Foreign|org/|tiny|text)", hooked.shown(name), re.MULTILINE)  # no table of ours
        assert sorted(map(str, (hooked.folder / name).rglob("*"))) == sorted(
            str(path).replace(str(plain.folder), str(hooked.folder)) for path in (plain.folder / name).rglob("*")
        )
    assert hooked.outcomes["sts"] == "done" and hooked.files("two").keys() >= hooked.files("sts").keys()
    assert hooked.outcomes["selected"] == plain.outcomes["selected"]
    for name in OTHER_COMMANDS:
        outcomes = [found.outcomes[name].replace(str(found.folder), "FOLDER") for found in (hooked, plain)]
        assert outcomes[0] == outcomes[1], name
        shown = [found.shown(name).replace(str(found.folder), "FOLDER") for found in (hooked, plain)]
        assert shown[0] == shown[1], name
    for card in ("card.md", "next.md"):
        written = [found.folder / card for found in (hooked, plain)]
        assert written[0].exists() == written[1].exists()
        assert not written[0].exists() or written[0].read_text() == written[1].read_text()
    added = set(hooked.outcomes["known"]) - set(plain.outcomes["known"])
    assert set(hooked.outcomes["known"]) > set(plain.outcomes["known"])
    assert all(name.startswith(("unime/", "MMEB(eng, v")) for name in added), added


def test_a_hub_model_runs_on_our_tasks_and_is_shown(hooked):
    assert hooked.outcomes["hub-model"] == "done"
    assert re.search(r"^ScenesVQA +40\.0$", hooked.shown("hub-model"), re.MULTILINE)
    assert re.search(r"^ScenesVQA +40\.0$", hooked.shown("again"), re.MULTILINE)
    written = {
        name for name in hooked.files("hub-model") if name.endswith(("VQA.json", "STS.json", "predictions.json"))
    }
    assert written == {
        "results/org__tiny/abc/ScenesVQA.json",
        "results/org__tiny/abc/ForeignSTS.json",
        "predictions/org__tiny/abc/ScenesVQA_predictions.json",
    }


def test_a_text_model_is_refused_on_images_and_leaves_no_folder(hooked):
    assert re.match(
        r"ValueError: ScenesVQA has images, and org/text .* takes only text", hooked.outcomes["text-model"]
    )
    assert not (hooked.folder / "text-model" / "predictions").exists()


def test_an_unknown_model_is_refused_by_mteb(hooked):
    assert hooked.outcomes["nobody"] == hooked.outcomes["unknown"] == "OSError: nope is not a model of the hub"
    assert not list((hooked.folder / "nobody").rglob("*"))
