"""Command line of the stages: ``[CONFIG] [--option value ...]``, checked before anything heavy is imported."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

from unime_st.declarations import docstring
from unime_st.files import read_json
from unime_st.former_names import current_names
from unime_st.memory import leave_quickly, prepare_exit
from unime_st.options import Option, OptionError, check_required, options_of, read_options, unknown_option
from unime_st.stages import STAGES
from unime_st.stages.configs import find_config, read_config

logger = logging.getLogger(__name__)
ArgumentsT = TypeVar("ArgumentsT")


def main(stage: str, argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run a stage from the command line.

    Args:
        stage: Name of the stage, see :data:`~unime_st.stages.STAGES`.
        argv: Words of the command line; ``-v`` in front logs the traceback of an error. Defaults to the process's.
        program: How the command is called, for messages. Defaults to the script of the process.

    Returns:
        Exit status: 0 for success, 1 for an error while it ran, 2 for wrong options.
    """
    prepare_exit()
    words = list(sys.argv[1:] if argv is None else argv)
    program = program or f"python {sys.argv[0]}"
    verbose = words[:1] in (["-v"], ["--verbose"])
    words = words[1:] if verbose else words
    entry, module = STAGES[stage], f"unime_st.stages.{stage}"
    options = read_options(module, entry.options)
    if asked := {"-h", "--help", "--help_all", "--help-all"}.intersection(words):
        everything = bool(asked - {"-h", "--help"})
        sys.stdout.write(_help(program, docstring(module), options, example=entry.example, everything=everything))
        return 0
    set_up_logging()
    # As at Ctrl-C: what holds processes and temporary files gives them back.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    def run() -> None:
        values = read_values(words, options, stage)
        check_required(values, options)
        home = import_module(module)
        getattr(home, entry.function)(getattr(home, entry.options)(**values))

    status = exit_status(run, program, verbose=verbose)
    if argv is None:
        leave_if_interrupted(status)
    return status


def print_usage(folder: Path, name: str) -> None:
    """Print where a model is and how it is loaded."""
    settings = read_json(folder / "config_sentence_transformers.json")
    sys.stdout.write(f'{folder}\nLoad it: {settings["model_type"]}("{name}")\n')


def leave_if_interrupted(status: int) -> None:
    """Let this process, which is that of a command, end at once after Ctrl-C or SIGTERM."""
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        leave_quickly(status)


def exit_status(action: Callable[[], int | None], program: str, *, verbose: bool = False) -> int:
    """Run the action of a command; an error that the user can mend becomes a line on stderr and an exit status."""
    try:
        return action() or 0
    except OptionError as error:
        sys.stderr.write(f"{program}: {error}\n")
        return 2
    except (ValueError, OSError, ImportError) as error:
        if verbose:
            logger.exception("%s", program)
        sys.stderr.write(f"{program}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted; the same command goes on from here.\n")
        return 130
    except SystemExit as error:  # SIGTERM
        # Models in the traceback are freed here, which takes less time than at the exit of the interpreter.
        if not isinstance(error.code, int):
            raise
        return error.code


def parse(kind: type[ArgumentsT], description: str | None, argv: Sequence[str] | None = None) -> ArgumentsT:
    """Fill a dataclass of options from ``[CONFIG.yaml] [--option value ...]``; the command line wins over the file.

    ``--help`` prints the description and the options, and exits; an unknown option or a wrong value exits with status
    2.

    Example:
        >>> from unime_st.stages.command import parse
        >>> from unime_st.stages.mine import MineArguments
        >>> parse(MineArguments, None, ["--num_candidates", "5"]).num_candidates
        5
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options = options_of(kind)
    if {"-h", "--help"}.intersection(words):
        sys.stdout.write(_help(f"python {sys.argv[0]}", description or "", options))
        raise SystemExit(0)
    try:
        return kind(**read_values(words, options))
    except OptionError as error:
        sys.stderr.write(f"{sys.argv[0]}: {error}\n")
        raise SystemExit(2) from None


def run_script(action: Callable[[ArgumentsT], object], kind: type[ArgumentsT], description: str | None) -> int:
    """Run a script beside the stages with the options of :func:`parse`; returns its exit status as :func:`main` does."""
    set_up_logging()

    def run() -> None:
        action(parse(kind, description))

    return exit_status(run, f"python {sys.argv[0]}")


def set_up_logging() -> None:
    """Show what a command does, with times; libraries, and all processes but the first, log warnings only."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    first = os.environ.get("RANK", "0") == "0"
    for package in ("unime_st", "train_scripts"):
        logging.getLogger(package).setLevel(logging.INFO if first else logging.WARNING)


def read_values(words: Sequence[str], options: Mapping[str, Option], stage: str | None = None) -> dict[str, object]:
    """Values of the options that ``[CONFIG] [--option value ...]`` gives, each in its declared type.

    The command line wins over the file. Without a stage the configuration is a path. Several leading words, or a folder,
    are values of the stage's positional option, if it has one.

    Raises:
        OptionError: If an option is unknown or has a wrong value; for a file the message names the line.
    """
    values: dict[str, object] = {}
    words = list(words)
    leading = list(takewhile(lambda word: not word.startswith("-"), words))
    if stage and STAGES[stage].positional and (len(leading) > 1 or any(Path(word).is_dir() for word in leading)):
        words.insert(0, f"--{STAGES[stage].positional}")
    elif leading:
        path = find_config(words.pop(0), stage)
        for name, (value, line) in read_config(path, options).items():
            try:
                values[name] = options[name].convert(value)
            except OptionError as error:
                raise OptionError(f"{path}, line {line}: {error}") from None
    given, told = current_names(_pairs(words, options), options)
    for sentence in told:
        logger.warning("%s", sentence)
    return values | {name: options[name].convert(value, text=True) for name, value in given.items()}


def _pairs(words: Sequence[str], options: Mapping[str, Option]) -> dict[str, list[str]]:
    """Words behind each option of a command line; ``--no_OPTION`` stands for ``--OPTION false``."""
    former = {declared.old.partition("=")[0] for declared in options.values() if declared.old}
    pairs: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if not word.startswith("--"):
            if not name:
                raise OptionError(f"expected --option value, found {word!r}")
            pairs[name].append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        negated = name.removeprefix("no_")
        if name not in options and negated != name and negated in options and "bool" in options[negated].kinds:
            name, equals, value = negated, "=", "false"
        if name not in options and name not in former:
            raise unknown_option(name, options)
        if name in pairs:
            raise OptionError(f"{name} is given twice: --{name} {' '.join(pairs[name])} and {word}")
        pairs[name] = [value] if equals else []
    return pairs


def _help(
    program: str, description: str, options: Mapping[str, Option], *, example: str = "", everything: bool = True
) -> str:
    width = min(shutil.get_terminal_size().columns, 110)
    lines = [f"usage: {program} [CONFIG] [--option value ...]", "", *textwrap.wrap(description, width), ""]
    if example:
        lines += [f"example: {program} {example}", ""]
    own = [declared for declared in options.values() if not declared.stock]
    own.sort(key=lambda declared: not declared.required)
    stock = [declared for declared in options.values() if declared.stock]
    lines += ["options:", *(line for declared in own for line in _help_lines(declared, width))]
    if stock and everything:
        lines += ["", "options of transformers and Sentence Transformers:"]
        lines += [line for declared in stock for line in _help_lines(declared, width)]
    elif stock:
        lines += ["", f"{len(stock)} options of transformers' TrainingArguments work, too: --help_all lists them."]
    return "\n".join(lines) + "\n"


def _help_lines(declared: Option, width: int) -> list[str]:
    facts = [declared.unit] if declared.unit else []
    if declared.required:
        facts.append("required")
    elif declared.default not in ("", None):
        facts.append(
            f"default: {str(declared.default).lower() if isinstance(declared.default, bool) else declared.default}"
        )
    if declared.choices and declared.metavar == "NAME":
        facts.insert(0, f"one of {', '.join(declared.choices)}")
    text = " ".join(declared.help.replace("%%", "%").split()) + (f" ({'; '.join(facts)})" if facts else "")
    head = f"  --{declared.name} {declared.metavar}"
    wrapped = textwrap.wrap(text, width - 6, break_long_words=False)
    return [head, *(f"      {line}" for line in wrapped)]
