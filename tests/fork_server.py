"""Fork server: a process with the libraries imported, whose forks run Python programs without importing them again.

Started by `child_process`, one for each pytest process; it ends with its standard input. A request is a connection with
a JSON message (words of the command line, working directory, environment) and the file descriptors of the program. The
answer is the process id of a fork, which is orphaned at once: it becomes a child of the pytest process, which adopts
orphans at that moment. For `fork_client`, which stands for the program, the exit status follows; if the client dies
first, so does the program.

Nothing of this repository is imported before the fork, and coverage begins after it, as in a fresh interpreter.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import time
import types
from contextlib import suppress

# sentence_transformers and mteb import torch, transformers, accelerate, peft, datasets, pandas, pyarrow.
LIBRARIES = """
torch.distributed.checkpoint torch.distributed.run sentence_transformers mteb.cli accelerate.commands.launch faiss
matplotlib.pyplot coverage sqlite3 transformers.models.qwen2_vl.modeling_qwen2_vl
transformers.models.qwen2_vl.processing_qwen2_vl
""".split()
LARGEST_REQUEST, MOST_DESCRIPTORS, HIGH_DESCRIPTOR = 1 << 17, 250, 500


def _watch(pid: int, connection: socket.socket) -> None:
    """Send the process id of a child and, when it ends, its status. Kill it if there is nobody left to send it to."""
    connection.send(str(pid).encode())
    child = os.pidfd_open(pid)
    either: list[int | socket.socket] = [child, connection]
    ready, _, _ = select.select(either, [], [])
    if child not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with suppress(OSError):
        connection.send(str(status).encode())


def _forked(connection: socket.socket, watched: bool) -> bool:
    """Fork twice: the process between watches its child, or leaves an orphan. Returns whether this is the child."""
    reading, writing = os.pipe()
    if middle := os.fork():
        os.close(writing)
        if not watched:
            os.waitpid(middle, 0)
            connection.send(os.read(reading, 20))
        os.close(reading)
        return False
    middle = os.getpid()
    if pid := os.fork():
        if watched:
            _watch(pid, connection)
        else:
            os.write(writing, str(pid).encode())
        os._exit(0)
    os.close(reading)
    os.close(writing)
    while not watched and os.getppid() == middle:
        time.sleep(0.001)
    return True


def _next_program(listener: socket.socket) -> dict | None:
    """Serve requests. Returns in each fork, with what it is to run, and here when standard input ends."""
    either: list[int | socket.socket] = [listener, 0]
    while True:
        ready, _, _ = select.select(either, [], [])
        if listener not in ready:
            return None
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        connection, _ = listener.accept()
        with connection:
            message, descriptors, _, _ = socket.recv_fds(connection, LARGEST_REQUEST, MOST_DESCRIPTORS)
            if not message:
                continue
            program = json.loads(message)
            if _forked(connection, program["watched"]):
                listener.close()
                _adopt(descriptors, program["descriptors"])
                return program
        for descriptor in descriptors:
            os.close(descriptor)


def _adopt(descriptors: list[int], numbers: list[int]) -> None:
    """Give file descriptors the numbers that they have in the process that asked."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, HIGH_DESCRIPTOR) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(high, numbers):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _prepare(program: dict) -> None:
    """Make this process what a fresh interpreter would be at this point."""
    if program["session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(program["folder"])
    before, now = (
        [os.path.abspath(folder) for folder in variables.get("PYTHONPATH", "").split(os.pathsep) if folder]
        for variables in (os.environ, program["environment"])
    )
    sys.path[:] = [*now, *(folder for folder in sys.path[1:] if folder not in before)]
    os.environ.clear()
    os.environ.update(program["environment"])
    multiprocessing.set_executable(program["interpreter"])  # what it spawns is forked as well
    sys.modules["numpy"].random.seed()  # Python's own generator does this by itself
    if {"COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"} & set(os.environ):
        import coverage

        coverage.process_startup()


def _run(words: list[str]) -> None:
    """Run the words after the interpreter's name: `-c CODE`, `-m MODULE` or SCRIPT, and their arguments."""
    kind, *rest = words
    if kind == "-c":
        sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv, sys.path[:0] = rest, [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [os.path.dirname(os.path.realpath(kind))]
        runpy.run_path(kind, run_name="__main__")


def _status(words: list[str]) -> int:
    """Run a program. Returns its exit status, or after Ctrl-C minus the number of the signal to end by."""
    try:
        _run(words)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    else:
        return 0
    return 1


def _leave(status: list[int]) -> None:
    """End with the status of the program before modules are taken apart, which takes a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status[0] < 0:
        signal.signal(-status[0], signal.SIG_DFL)
        os.kill(os.getpid(), -status[0])
    os._exit(status[0] & 0xFF)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, whose end is also the end of this process
    status = [0]
    atexit.register(_leave, status)  # the first: it runs after those of all libraries and programs
    for name in LIBRARIES:
        with suppress(ImportError):  # an extra that is not installed: a program that needs it says so
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    if (program := _next_program(socket.socket(fileno=int(sys.argv[1])))) is not None:
        status[0] = 1
        _prepare(program)
        status[0] = _status(program["words"])
