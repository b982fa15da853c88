"""Stands for a Python program that a fork of the `fork_server` runs: same file descriptors, signals and exit status.

Libraries that start their Python interpreter get it from `child_process.interpreter`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import suppress


def _open_descriptors() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the list itself is closed
            os.fstat(int(name))
            found.append(int(name))
    return found


def main(interpreter: str, address: str, words: list[str]) -> None:
    """Run a program with the words after the name of an interpreter, and end as it ends."""
    while words[0].startswith("-") and words[0] not in ("-c", "-m"):  # options, which the server was started with
        del words[0]
    numbers = _open_descriptors()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    program = {
        "words": words,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "session": False,
        "watched": True,
        "descriptors": numbers,
        "interpreter": interpreter,
    }
    socket.send_fds(connection, [json.dumps(program).encode()], numbers)
    pid = int(connection.recv(20))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = os.waitstatus_to_exitcode(int(connection.recv(20)))
    if code < 0:
        with suppress(OSError):  # that of SIGKILL cannot be set, nor need it be
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
