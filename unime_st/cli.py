"""Command line `unime`: the subcommands of :data:`COMMANDS`, and the stages of :data:`~unime_st.stages.STAGES`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unime_st import search_commands, serve_commands
from unime_st.declarations import docstring
from unime_st.memory import prepare_exit
from unime_st.options import OptionError
from unime_st.stages import STAGES
from unime_st.stages.command import exit_status, leave_if_interrupted, print_usage
from unime_st.stages.command import main as run_stage
from unime_st.stages.configs import configs, find_config


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
        help: One line for ``unime --help``.
        arguments: Adds its options to a parser.
        run: Does the work and returns the exit status.
    """

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _image_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-size",
        metavar="SIZE",
        help="side in pixels of the square that images are squashed to, or official, training, native (default: official)",
    )


def _pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: unime pull unime-v2-2b"
    parser.add_argument("alias", help="released model, e.g. unime-v2")
    parser.add_argument("--revision", help="commit, tag or branch (default: the pinned commit)")
    _image_size(parser)
    parser.add_argument("--overwrite", action="store_true", help="convert again and replace an existing folder")


def _pull(options: argparse.Namespace) -> int:
    from unime_st.checkpoints import pull

    folder = pull(options.alias, revision=options.revision, image_size=options.image_size, overwrite=options.overwrite)
    print_usage(folder, options.alias)
    return 0


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    from unime_st.paths import TINY
    from unime_st.recipes import RECIPES

    names = ", ".join(name for name in RECIPES if name != TINY)
    parser.epilog = "example: unime convert downloads/UniME-V2-2B --recipe unime-v2-2b"
    parser.add_argument("folder", help="local checkpoint: whole model, or LoRA/DoRA adapter")
    parser.add_argument("--recipe", required=True, metavar="NAME", help=f"recipe, one of: {names}")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--output", metavar="DIR", help="folder to write")
    target.add_argument("--alias", help="name to load it by; writes $UNIME_HOME/models/ALIAS (default: the recipe)")
    parser.add_argument("--base", metavar="DIR", help="folder of the base model; for an adapter")
    parser.add_argument("--processor", metavar="DIR", help="folder of tokenizer and image processor (default: FOLDER)")
    _image_size(parser)
    parser.add_argument(
        "--image-backend", choices=("pil", "torchvision"), help="image backend (default: the recipe's)"
    )
    parser.add_argument("--dtype", help="float32, bfloat16, float16 or official (default: as the weights are stored)")
    parser.add_argument("--style", help="prompt style of the template, e.g. mmeb for UniME v1 (default: the first)")
    parser.add_argument("--template", metavar="FILE", help="chat template (default: the recipe's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def _convert(options: argparse.Namespace) -> int:
    from unime_st.checkpoints import convert

    names = ("output", "alias", "base", "processor", "image_size", "image_backend", "dtype", "style", "template")
    chosen = {name: getattr(options, name) for name in names}
    folder = convert(options.folder, options.recipe, **chosen, overwrite=options.overwrite)
    print_usage(folder, str(folder) if options.output else options.alias or options.recipe)
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: unime verify unime-tiny --quick"
    parser.add_argument("model", metavar="ALIAS_OR_FOLDER", help="model to check, e.g. unime-v2-2b")
    parser.add_argument(
        "--demo-image", metavar="FILE", help="image of the authors' demo; its published score is checked"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small images, and no saving")
    size.add_argument("--full", action="store_true", help="save and load again even a model of more than 4 GiB")
    parser.add_argument("--device", help="e.g. cpu or cuda (default: cuda where there is one)")


def _verify(options: argparse.Namespace) -> int:
    from unime_st.checkpoints.verification import line, run_checks
    from unime_st.registry import resolve

    chosen = {name: getattr(options, name) for name in ("demo_image", "quick", "full", "device")}
    failed = False
    for check in run_checks(str(resolve(options.model)), **chosen):
        sys.stdout.write(line(check) + "\n")
        sys.stdout.flush()
        failed = failed or check.passed is False
    return 1 if failed else 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: unime export unime-tiny --to plain --output runs/plain"
    parser.add_argument("model", metavar="ALIAS_OR_FOLDER", help="model to export, e.g. unime-v2")
    parser.add_argument(
        "--to", choices=("plain",), default="plain", help="layout: stock classes, no unime-st (default: plain)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--allow-drift", action="store_true", help="export even if stock classes give other vectors")
    parser.add_argument("--device", help="e.g. cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def _export(options: argparse.Namespace) -> int:
    from unime_st.checkpoints.plain_export import PARITY, export_plain
    from unime_st.files import read_json
    from unime_st.registry import resolve

    chosen = {name: getattr(options, name) for name in ("allow_drift", "device", "overwrite")}
    folder = export_plain(resolve(options.model), options.output, **chosen)
    for kind, value in read_json(folder / PARITY)["measured"].items():
        sys.stdout.write(f"{'1 - difference' if kind == 'pair' else 'cosine'} {value:.6f}  {kind}\n")
    print_usage(folder, str(folder))
    return 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: unime report results/ --output report"
    parser.add_argument("folders", nargs="+", metavar="RESULTS_DIR", help="--output-folder of `mteb run`, or below it")
    parser.add_argument("-o", "--output", default="report", metavar="DIR", help="folder to write (default: report)")
    parser.add_argument(
        "--failures", type=int, default=3, metavar="N", help="wrong queries to show for each task (default: 3)"
    )
    parser.add_argument("--title", default="Evaluation", help="heading of the page (default: Evaluation)")


def _report(options: argparse.Namespace) -> int:
    from importlib.metadata import entry_points

    # Reading mteb's results is the business of mteb_tasks, which is not imported from here: an entry point names it.
    found = tuple(entry_points(group="unime.commands", name="report"))
    if not found:
        raise ImportError("this installation lacks the evaluation tasks: `pip install --force-reinstall unime-st`")
    page = found[0].load()(options.folders, options.output, failures=options.failures, title=options.title)
    sys.stdout.write(f"{page}\n")
    return 0


def _configs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: unime configs show soft_labels/tiny"
    parser.add_argument("action", nargs="?", choices=("list", "show"), default="list", help="default: list")
    parser.add_argument("name", nargs="?", help="configuration to show, e.g. soft_labels/qwen2-vl-2b")


def _configs(options: argparse.Namespace) -> int:
    if options.action == "list":
        known = configs()
        width = max(map(len, known))
        sys.stdout.writelines(f"{name:<{width}}  {title}\n" for name, title in known.items())
        return 0
    if not options.name:
        raise OptionError("name is missing: `unime configs show NAME`; `unime configs` lists them.")
    sys.stdout.write(find_config(options.name).read_text(encoding="utf-8"))
    return 0


COMMANDS: dict[str, Command] = {
    "pull": Command("download a released model and convert it", _pull_arguments, _pull),
    "convert": Command("convert a local checkpoint to a Sentence Transformers folder", _convert_arguments, _convert),
    "verify": Command("check a model against its recipe", _verify_arguments, _verify),
    "configs": Command("list the configurations of the stages, or show one", _configs_arguments, _configs),
    "encode": Command("encode images or texts to vectors", search_commands.encode_arguments, search_commands.encode),
    "index": Command(
        "build a search index of images or texts", search_commands.index_arguments, search_commands.index
    ),
    "search": Command("search an index by text or image", search_commands.search_arguments, search_commands.search),
    "serve": Command("serve a model over HTTP on Ray Serve", serve_commands.serve_arguments, serve_commands.serve),
    "export": Command("export a model for stock Sentence Transformers", _export_arguments, _export),
    "parity": Command(
        "compare a folder or server with a parity file", serve_commands.parity_arguments, serve_commands.parity
    ),
    "report": Command("tabulate mteb results beside the published scores", _report_arguments, _report),
}

_STAGE_OF = {"import": "import_data"}
"""Subcommands that are not called as the file of their stage, because Python does not allow it as the name of a file."""


def _hyphenated(word: str) -> str:
    """An option as commands spell it, e.g. ``--fit-alpha``; stages and their configurations write ``--fit_alpha``."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after ``unime``; default is the command line of the process.

    Returns:
        Exit status: 0 for success, 1 for failed checks or an error that the user can mend, 2 for a wrong call.
    """
    prepare_exit()
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbose = words[:1] if words[:1] in (["-v"], ["--verbose"]) else []
    name = next(iter(words[len(verbose) :]), "")
    if (stage := _STAGE_OF.get(name, name)) in STAGES:
        status = run_stage(stage, [*verbose, *words[len(verbose) + 1 :]], program=f"unime {name}")
        if arguments is None:
            leave_if_interrupted(status)
        return status
    parser = argparse.ArgumentParser(
        prog="unime",
        description="UniME models for sentence-transformers and mteb.",
        epilog="Stages take [CONFIG] [--option value ...]; `unime STAGE --help` lists their options.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log progress, and the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        command.arguments(sub)
    for stage in STAGES:  # for the help; their words are read by run_stage
        title = docstring(f"unime_st.stages.{stage}").splitlines()[0]
        commands.add_parser("import" if stage == _STAGE_OF["import"] else stage, help=f"stage: {title}")
    options = parser.parse_args([_hyphenated(word) for word in words])
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    command = COMMANDS[options.command]
    status = exit_status(lambda: command.run(options), f"unime {options.command}", verbose=options.verbose)
    if arguments is None:
        leave_if_interrupted(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
