"""Make `unime-tiny` by one command: all stages of its pre-training, one after the other, and the package.

python -m train_scripts.tiny.make [--runs runs --output runs/unime-tiny]
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from train_scripts.tiny.package import package
from train_scripts.tiny.pretrain import LOG, PretrainArguments, pretrain
from unime_st.options import check_options, option
from unime_st.stages.command import run_script

logger = logging.getLogger(__name__)
STAGES = (
    "seeing",
    "judging",
    "comparing",
    "refining",
    "deciding",
    "settling",
    "summing_up",
    "telling_apart",
    "rounding_off",
    "near_twins",
)
"""Stages of the pre-training in order; each starts from the one before."""
_CONFIGS = Path(__file__).with_name("configs")


@dataclass
class MakeArguments:
    """Options of the making of `unime-tiny`."""

    runs: str = option("runs", "Folder of the stages; a killed run goes on after the last finished one.")
    output: str = option("runs/unime-tiny", "Folder of the packaged model.")
    stop_after: int | None = option(
        None, "Steps after which every stage is stopped, for a trial; none: as its configuration says.", at_least=1
    )

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)


def make(arguments: MakeArguments) -> Path:
    """Run every stage that is not done, those after one that was run anew, and package the last. About three hours.

    Args:
        arguments: Options.

    Returns:
        The folder of the model.
    """
    before, anew = "", False
    for name in STAGES:
        options = PretrainArguments(**yaml.safe_load((_CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")))
        options = replace(options, output=str(Path(arguments.runs) / name), start=before)
        if arguments.stop_after is not None:
            options = replace(options, stop_after=min(arguments.stop_after, options.last_step))
        if anew or not _is_done(options):
            logger.info("%s: %d steps.", name, options.last_step)
            pretrain(options)
            anew = True
        before = options.output
    return package(before, arguments.output)


def _is_done(options: PretrainArguments) -> bool:
    """Whether the log in the folder of a stage ends with its last step, with the same options."""
    log = Path(options.output) / LOG
    entries = [_entry(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    runs = [entry["arguments"] for entry in entries if "arguments" in entry]  # those of the stages before come first
    return bool(runs) and runs[-1] == asdict(options) and entries[-1].get("step") == options.last_step


def _entry(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:  # half written
        return {}


if __name__ == "__main__":
    raise SystemExit(run_script(make, MakeArguments, __doc__))
