"""``unime-mteb`` command: mteb's command line with our tasks and models registered."""

from __future__ import annotations

import os
import sys

from mteb_tasks.mmeb.base_tasks import ALLOW_MISSING_VARIABLE
from mteb_tasks.registration import register_all


def main(arguments: list[str] | None = None) -> None:
    """Run mteb's command line with our tasks and models registered.

    ``--allow-missing`` evaluates the MMEB subsets that are there; the result of ``MMEB`` lists the others.

    Args:
        arguments: Command line; None takes the one of the process.
    """
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write("unime-mteb run --allow-missing  leave out the MMEB subsets whose data are missing\n\n")
    if "--allow-missing" in arguments:
        os.environ[ALLOW_MISSING_VARIABLE] = "1"
    register_all()
    from mteb.cli import main as mteb_main

    sys.argv = ["unime-mteb", *(argument for argument in arguments if argument != "--allow-missing")]
    mteb_main()
