"""Programs that tests start, as forks of a process that has imported the libraries: that takes longer than most tests.

A fork runs the code that ``python ...`` would run, with arguments, environment, folder and output of its own, and ends
by signals and exit statuses as a process of its own does; it reaches no hub. The literal commands are tested as a shell
starts them.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import pytest
import torch.multiprocessing

LIBRARIES = ["unime_st.stages", "unime_st.reranking", "mteb_tasks.loader", "mteb_tasks.scenes", "mteb.cli"]
READ_ON_IMPORT = ("ACCELERATE_", "DATASETS_", "HF_", "MKL_", "PYTHONPATH", "TORCH", "TQDM_", "TRANSFORMERS_")
"""Beginnings of the names of variables that libraries read when they are imported: a fork would not notice them."""

FORKS = multiprocessing.get_context("forkserver")
_ENVIRONMENT: dict[str, str] = {}
"""Variables of the process that the programs are forks of."""


class Program:
    """A running program; methods as of ``subprocess.Popen``.

    Args:
        words: What would follow ``python``: a script, ``-m`` and a module, or ``-c`` and code; then arguments.
        env: All environment variables. Defaults to those of this process.
        cwd: Working directory. Defaults to that of this process.
        stdout: File for the output. Defaults to none.
        stderr: File for the errors, which may be the same. Defaults to none.
        start_new_session: Whether it leads a session of its own.

    Raises:
        ValueError: If a variable differs that libraries read when they are imported.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdout: str | Path = os.devnull,
        stderr: str | Path = os.devnull,
        start_new_session: bool = False,
    ) -> None:
        environment = {**(os.environ if env is None else env), "HF_HUB_OFFLINE": "1"}
        import_libraries()
        changed = (name for name, _ in environment.items() ^ _ENVIRONMENT.items())
        if unseen := sorted({name for name in changed if name.startswith(READ_ON_IMPORT)}):
            raise ValueError(f"{', '.join(unseen)}: start this program with subprocess")
        self._process = FORKS.Process(
            target=_run,
            args=(list(words), environment, str(cwd or Path.cwd()), str(stdout), str(stderr), start_new_session),
        )
        self._process.start()
        assert self._process.pid is not None
        self.args, self.pid = list(words), self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._process.kill()
        self.wait()


def import_libraries() -> None:
    """Start the process that imports the libraries, once."""
    if not _ENVIRONMENT:
        FORKS.set_forkserver_preload(LIBRARIES)
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("HF_HUB_OFFLINE", "1")
            multiprocessing.forkserver.ensure_running()
            _ENVIRONMENT.update(os.environ)


def run(
    words: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    check: bool = False,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Args:
        words: As of `Program`.
        env: As of `Program`.
        cwd: As of `Program`.
        check: Whether an exit status other than 0 is an error.
        timeout: Seconds until it is killed. Defaults to none.

    Returns:
        Exit status, output and errors.

    Raises:
        AssertionError: If it failed and that is an error; shows the end of its errors.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        with Program(words, env=env, cwd=cwd, stdout=stdout, stderr=stderr) as program:
            status = program.wait(timeout)
        done = subprocess.CompletedProcess(list(words), status, stdout.read_text(), stderr.read_text())
    assert not check or status == 0, done.stderr[-3000:]
    return done


def run_ranks(work: Callable[..., None], *args: object) -> None:
    """Run a function in two processes, which it is told as its first argument."""
    import_libraries()
    torch.multiprocessing.start_processes(work, args, nprocs=2, start_method="forkserver")


def _run(
    words: list[str], environment: dict[str, str], folder: str, stdout: str, stderr: str, new_session: bool
) -> None:
    """What a fork does."""
    if new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # of processes that the program starts
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, flags, 0o644), number)
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # read when OpenMP is loaded
    try:
        _execute(words)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # as the interpreter ends
    finally:  # multiprocessing ends a process without this
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()


def _execute(words: list[str]) -> None:
    first, *rest = words
    if first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")
