"""Interruption: Ctrl-C and SIGTERM end commands with the right exit status, and leave no process."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import psutil
import pytest

from tests.programs import Program
from unime_st import Item, UniME
from unime_st.data import PairRecord, RecordSet
from unime_st.retrieval import mine

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LIMIT = 120
"""Seconds until a process counts as hanging; on a quiet machine each ends within 5."""
UNIME = "from unime_st.cli import main; sys.exit(main())"
MTEB = "import unime_st; from mteb.cli import main; main()"


@dataclass(frozen=True)
class Command:
    """A command line.

    Args:
        program: Python code that runs it.
        words: Its words; FOLDER is a folder with records and a table of texts.
        marker: Part of the output that shows that the work has begun.
        status: Exit status after Ctrl-C. Defaults to 130.
        terminated: Exit status after SIGTERM. Defaults to 143.
    """

    program: str
    words: str
    marker: str
    status: int = 130
    terminated: int = 143


TRAINING = (
    "--data FOLDER/records --output FOLDER/out --model unime-tiny --per_device_train_batch_size 4 --max_steps 9999"
)
COMMANDS = {
    "encode": Command(UNIME, "encode FOLDER/texts.jsonl --output FOLDER/out", "%|", terminated=-signal.SIGTERM),
    "index": Command(UNIME, "index FOLDER/texts.jsonl --output FOLDER/out", "%|", terminated=-signal.SIGTERM),
    "mine": Command(UNIME, "mine --data FOLDER/records --output FOLDER/out --model unime-tiny", "encoding:"),
    "judge": Command(UNIME, "judge --data FOLDER/pools --scores FOLDER/out-scores --output FOLDER/out", "judg"),
    "in_batch": Command(UNIME, f"in_batch {TRAINING} --dataloader_num_workers 2 --logging_steps 1", "loss"),
    "mteb run": Command(
        MTEB, "run -m unime-tiny -t ScenesVQA --output-folder FOLDER/out", "queries", -signal.SIGINT, -signal.SIGTERM
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("interruption")
    rows = range(20_000)
    (made / "texts.jsonl").write_text("".join(f'{{"id": "{row}", "text": "a star {row}"}}\n' for row in rows))
    pairs = (PairRecord(Item(f"find {row}"), Item(f"a star {row}"), negatives=[Item(f"a ring {row}")]) for row in rows)
    RecordSet.write(made / "records", pairs, {})
    few = RecordSet.write(made / "few", islice(RecordSet.load(made / "records"), 600), {})
    mine(few, UniME("unime-tiny", device="cpu"), made / "pools", num_candidates=20)
    return made


def start(command: Command, folder: Path, output: Path) -> Program:
    """Start a command in a session of its own, with SIGINT as at a terminal (a background job may ignore it)."""
    code = f"import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{command.program}"
    words = command.words.replace("FOLDER", str(folder)).split()
    environment = {**os.environ, "UNIME_HOME": str(folder / "home")}
    output.touch()
    return Program(["-c", code, *words], env=environment, stdout=output, stderr=output, start_new_session=True)


def wait_for(marker: str, process: Program, output: Path) -> None:
    """Wait until a process has written a marker."""
    while marker.encode() not in output.read_bytes():
        with pytest.raises(subprocess.TimeoutExpired):  # it has not ended
            process.wait(0.1)


def members(session: int) -> list[psutil.Process]:
    """Processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("name", COMMANDS)
def test_signal_ends_the_command(folder: Path, tmp_path: Path, name: str, number: signal.Signals):
    command = COMMANDS[name]
    output = tmp_path / "output.txt"
    own = replace(command, words=command.words.replace("FOLDER/out", str(tmp_path / "out")))
    process = start(own, folder, output)
    try:
        wait_for(own.marker, process, output)
        process.send_signal(number)
        assert process.wait(LIMIT) == (own.status if number == signal.SIGINT else own.terminated), output.read_text()
        psutil.wait_procs(left := members(process.pid), timeout=LIMIT)
        assert not members(process.pid), left
    finally:
        for member in members(process.pid):
            member.kill()
