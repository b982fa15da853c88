"""Dockerfile and compose file: what they copy exists, and what they start is a command of ours, not as root."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import yaml

from unime_st.serve_commands import serve_arguments

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve_arguments(parser)
    return parser.parse_args(words)


def test_copied_files_exist() -> None:
    sources = [word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.M) for word in line.split()[:-1]]
    assert {"unime_st", "mteb_tasks", "packaging"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.parametrize(
    "ending", [json.loads(re.findall(r"^CMD (.*)$", DOCKERFILE, re.M)[0]), COMPOSE["services"]["unime"]["command"]]
)
def test_the_command_is_valid(ending: list[str]) -> None:
    program, command, *words = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[0])
    assert (program, command) == ("unime", "serve")
    assert parsed([*words, *ending]).host == "0.0.0.0"


def test_it_does_not_run_as_root() -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.M) == ["10001"]


def test_paths_of_the_compose_file() -> None:
    build = COMPOSE["services"]["unime"]["build"]
    assert (ROOT / "docker" / build["context"] / build["dockerfile"]).resolve() == ROOT / "docker" / "Dockerfile"
