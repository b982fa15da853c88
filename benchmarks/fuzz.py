"""Fuzz campaign: malformed inputs for options, files, records, items, folders, judges and reports, counted by verdict.

Every case is a function that returns True if the outcome is right, False if a wrong input was taken without a word, or
raises. An error is clear if this package raised it on purpose: its last frame is a ``raise`` of ours, and it is a
ValueError, TypeError, OSError or ImportError with a message. All other errors are raw. The run fails if any case is
silent, raw, hangs, or refuses a right input.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.harness import machine, save, where

LIMIT = 60
"""Seconds until a case counts as hanging."""
VERDICTS = ("right", "clear error", "silent", "raw", "hang", "refused")
BAD = VERDICTS[2:]
MESSAGES = 6
"""Number of error messages of each kind in the JSON file."""
_OURS = tuple(str(Path(__file__).parents[1] / name) for name in ("unime_st", "mteb_tasks"))


@dataclass(frozen=True)
class Case:
    """One input.

    Args:
        name: Description of the input, for the JSON file.
        run: Function that tries it: True if the outcome is right, False if it is silently wrong.
        valid: Whether the input is right, so that an error is a fault. Defaults to False.
    """

    name: str
    run: Callable[[], bool]
    valid: bool = False


class HangError(BaseException):
    """A case ran for longer than :data:`LIMIT`."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise HangError


def judge_error(error: BaseException) -> str:
    """Verdict on an exception: ``clear error`` or ``raw``."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "contextlib" not in frame.filename]
    last = frames[-1]
    ours = last.filename.startswith(_OURS) and (last.line or "").startswith("raise ")
    plain = isinstance(error, (ValueError, TypeError, OSError, ImportError)) and not isinstance(error, UnicodeError)
    return "clear error" if ours and plain and len(str(error).strip()) > 15 else "raw"


def run_case(case: Case) -> tuple[str, str]:
    """Verdict of a case, and the error message, or the end of the traceback of a raw error."""
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            right = case.run()
        return ("right", "") if right else ("silent", "")
    except HangError:
        return "hang", ""
    except Exception as error:
        verdict = judge_error(error)
        if verdict == "raw":
            return "raw", "".join(traceback.format_exception(error))[-900:]
        return ("refused" if case.valid else verdict), f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)


def all_cases(seed: int, folder: Path, only: str | None = None) -> Iterator[tuple[str, Case]]:
    """The cases with their kinds, which are the rows of the table.

    Args:
        seed: Seed of the draws; the same seed gives the same cases.
        folder: Empty folder for the files of the cases.
        only: The only kind to make. Defaults to None, all.
    """
    from benchmarks import fuzz_data, fuzz_models

    for number, make in enumerate((*fuzz_data.KINDS, *fuzz_models.KINDS)):
        kind = make.__name__.replace("_", " ")
        if only in (None, kind):
            files = folder / make.__name__
            files.mkdir()
            for case in make(random.Random(seed + number), files):
                yield kind, case


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; the exit status is 1 if there is a bad verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--only", help="kind to run (default: all)")
    parser.add_argument("--verbose", action="store_true", help="print every message")
    options = parser.parse_args(argv)
    os.environ["TQDM_DISABLE"] = "1"
    signal.signal(signal.SIGALRM, _alarm)
    started = time.perf_counter()
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    messages: defaultdict[str, set[str]] = defaultdict(set)
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UNIME_HOME"] = str(Path(folder, "home"))
        for kind, case in all_cases(options.seed, Path(folder), options.only):
            verdict, message = run_case(case)
            name, message = case.name[:160].replace(folder, "FOLDER"), message.replace(folder, "FOLDER")
            counts[kind][verdict] += 1
            if verdict == "clear error":
                messages[kind].add(message)
            if verdict in BAD:
                bad.append({"kind": kind, "case": name, "verdict": verdict, "message": message})
            if verdict in BAD or options.verbose:
                sys.stdout.write(f"{verdict:<12} {kind}: {name}\n{message}\n")
    result = {
        "name": "fuzz",
        "machine": machine(),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "inputs": sum(count.total() for count in counts.values()),
        "counts": {kind: dict(count) for kind, count in counts.items()},
        "bad": bad,
        "messages": {kind: sorted(found)[:MESSAGES] for kind, found in messages.items()},
    }
    table = _table(result)
    sys.stdout.write(table)
    if options.only is None:
        save(result, table)
    return 1 if bad else 0


def _table(result: dict[str, Any]) -> str:
    counts = result["counts"]
    total = {name: sum(count.get(name, 0) for count in counts.values()) for name in VERDICTS}
    lines = [f"{where(result)}; seed {result['seed']}, {result['inputs']} inputs in {result['seconds']} s", ""]
    lines += ["| kind | inputs | " + " | ".join(VERDICTS) + " |", "|---|" + "---:|" * (len(VERDICTS) + 1)]
    for kind, count in {**counts, "all": total}.items():
        cells = [sum(count.values()), *(count.get(name, 0) for name in VERDICTS)]
        lines.append(f"| {kind} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
