"""Child processes of tests: `run` and `Popen` as in `subprocess`, for Python programs by a fork of a `fork_server`.

Importing torch, transformers, sentence_transformers and mteb takes a process 15 to 25 seconds; a fork has them at once.
A program gets a fresh interpreter all the same where it could tell the difference: with options of the interpreter, with
environment variables that libraries read while they are imported, with a function that runs before it, and on systems
other than Linux. Tests of imports, of the start-up hook and of what programs do not import use `subprocess` itself.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

READ_LATE = ("BENCH_", "COV", "MASTER_", "MMEB_", "PYTEST_", "UNIME_", "KMP_", "TORCHINDUCTOR_", "_RJEM_")
"""Environment variables that programs read when they run, and (the last three) those that libraries set at import."""
NAMED_LATE = (
    "GLOO_SOCKET_IFNAME",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "PATH",
    "PYTHONPATH",
    "PWD",
    "PYTHON_EXEC",
    "RANK",
    "WORLD_SIZE",
)
SET_CHILD_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2): orphans among the descendants become children of this process."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of this process for a child that never asks the hub, with some variables more."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", **extra}


def _read_at_import(variables: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in variables.items() if name not in NAMED_LATE and not name.startswith(READ_LATE)
    }


VARIABLES = _read_at_import(environment())
"""What the libraries in the fork server have read. A test may have changed the environment when the server starts."""


class _Server:
    """A fork server, its address, and an interpreter: a program that a library can start instead of Python."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="fork-server-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self.address, self.interpreter = str(folder / "socket"), folder / "python"
        client = Path(__file__).with_name("fork_client.py")
        self.interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{client}" "$0" "{self.address}" "$@"\n')
        self.interpreter.chmod(0o755)
        self.lock = threading.Lock()
        self.prctl = ctypes.CDLL(None).prctl
        own = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "UNIME_ST_AUTOLOAD": "0"}
        script = str(Path(__file__).with_name("fork_server.py"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.address)
            listener.listen(64)
            self.process = subprocess.Popen(
                [sys.executable, script, str(listener.fileno())], env={**VARIABLES, **own},
                pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            )  # fmt: skip

    def start(self, program: dict[str, Any], descriptors: list[int]) -> int:
        """Process id of a new child of this process that runs a program."""
        with self.lock, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(self.address)
            self.prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(connection, [json.dumps(program).encode()], descriptors)
                return int(connection.recv(20))
            finally:
                self.prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@functools.cache
def _server() -> _Server:
    return _Server()


def interpreter() -> str:
    """Path of a program that runs Python programs as this interpreter does, by forks where the system has them."""
    return str(_server().interpreter) if sys.platform == "linux" else sys.executable


def _python_words(command: Sequence[str]) -> list[str] | None:
    """What this interpreter is to run, or None if it is another program or the interpreter has options."""
    program, *words = command
    if program == sys.executable and words and (words[0] in ("-c", "-m") or not words[0].startswith("-")):
        return words
    scripts = Path(sysconfig.get_path("scripts"))
    if Path(program).parent == scripts and Path(program).read_bytes().startswith(f"#!{scripts}/python".encode()):
        return list(command)
    return None


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen` that forks Python programs from a server with the libraries imported, where it can."""

    def _execute_child(self, *arguments: Any) -> None:
        given = inspect.signature(super()._execute_child).bind(*arguments).arguments
        variables = os.environ if given["env"] is None else given["env"]
        words = _python_words(list(map(os.fspath, given["args"])))
        plain = not (given["preexec_fn"] or given["shell"] or given["pass_fds"] or given["executable"])
        if not (sys.platform == "linux" and words and plain and _read_at_import(variables) == VARIABLES):
            super()._execute_child(*arguments)
            return
        program = {
            "words": words,
            "environment": dict(variables),
            "folder": os.fspath(given["cwd"] or os.getcwd()),
            "session": given["start_new_session"],
            "watched": False,
            "descriptors": [0, 1, 2],
            "interpreter": interpreter(),
        }
        pipes = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self.pid = _server().start(program, [own if pipe == -1 else pipe for own, pipe in enumerate(pipes)])
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in ends))  # type: ignore[attr-defined]


def run(
    command: Sequence[str],
    *,
    input: str | None = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with a `Popen` of this module."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done
