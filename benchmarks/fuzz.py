"""Fuzz campaign: malformed inputs for options, files, records, items, folders, judges and reports, counted by verdict.

Every case is a function that returns True if the outcome is right, False if a wrong input was taken without a word, or
raises. An error is clear if this package raised it on purpose: its last frame is ours and it is no accident of Python.
The run fails if any case is silent, raw, hangs, or refuses a right input.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from benchmarks.harness import machine, save, where

LIMIT = 60
"""Seconds until a case counts as hanging."""
VERDICTS = ("right", "clear error", "silent", "raw", "hang", "refused")
BAD = VERDICTS[2:]
_ACCIDENTS = (AttributeError, IndexError, KeyError, AssertionError, RecursionError, ArithmeticError, MemoryError)
_OURS = tuple(str(Path(__file__).parents[1] / name) for name in ("unime_st", "mteb_tasks"))


@dataclass(frozen=True)
class Case:
    """One input.

    Args:
        kind: Row of the table.
        name: What is wrong with the input, for the JSON file.
        run: Tries it; True: right, False: silently wrong.
        valid: The input is right, so that an error is a fault.
    """

    kind: str
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
    ours = bool(frames) and frames[-1].filename.startswith(_OURS)
    plain = isinstance(error, (ValueError, TypeError, OSError, ImportError)) and not isinstance(error, UnicodeError)
    words = str(error).strip()
    return "clear error" if ours and plain and not isinstance(error, _ACCIDENTS) and len(words) > 15 else "raw"


def run_case(case: Case) -> tuple[str, str]:
    """Verdict of a case, and its message or place."""
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


def all_cases(seed: int, folder: Path) -> Iterator[Case]:
    """The cases of all kinds.

    Args:
        seed: Seed of the draws; the same seed gives the same cases.
        folder: Empty folder for the files of the cases.
    """
    from benchmarks import fuzz_data, fuzz_models

    for number, make in enumerate((*fuzz_data.KINDS, *fuzz_models.KINDS)):
        place = folder / make.__name__
        place.mkdir()
        yield from make(random.Random(seed + number), place)


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; the exit status is 1 if there is a bad verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--only", help="kind to run (default: all)")
    parser.add_argument("--verbose", action="store_true", help="print every message")
    options = parser.parse_args(argv)
    os.environ["TQDM_DISABLE"] = "1"
    signal.signal(signal.SIGALRM, _alarm)
    started, found = time.perf_counter(), []
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UNIME_HOME"] = str(Path(folder, "home"))
        for case in all_cases(options.seed, Path(folder)):
            if options.only not in (None, case.kind):
                continue
            verdict, message = run_case(case)
            counts.setdefault(case.kind, Counter())[verdict] += 1
            found.append({"kind": case.kind, "case": case.name[:160], "verdict": verdict, "message": message})
            if verdict in BAD or options.verbose:
                sys.stdout.write(f"{verdict:<12} {case.kind}: {case.name[:160]}\n{message}\n")
    result = {
        "name": "fuzz",
        "machine": machine(),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "inputs": len(found),
        "counts": {kind: dict(count) for kind, count in counts.items()},
        "bad": [entry for entry in found if entry["verdict"] in BAD],
        "messages": sorted({entry["message"] for entry in found if entry["verdict"] == "clear error"})[:40],
    }
    table = _table(result)
    sys.stdout.write(table)
    if options.only is None:
        save(result, table)
    return 1 if result["bad"] else 0


def _table(result: dict[str, object]) -> str:
    counts = json.loads(json.dumps(result["counts"]))
    total = {name: sum(count.get(name, 0) for count in counts.values()) for name in VERDICTS}
    lines = [f"{where(result)}; seed {result['seed']}, {result['inputs']} inputs in {result['seconds']} s", ""]
    lines += ["| kind | inputs | " + " | ".join(VERDICTS) + " |", "|---|" + "---:|" * (len(VERDICTS) + 1)]
    for kind, count in {**counts, "all": total}.items():
        cells = [sum(count.values()), *(count.get(name, 0) for name in VERDICTS)]
        lines.append(f"| {kind} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
