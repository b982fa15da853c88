"""The command line: words in, exit status and messages out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from unime_st.cli import COMMANDS, main


def test_convert_and_verify(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("UNIME_HOME", str(tmp_path / "home"))
    source = checkpoint("qwen2-vl")
    words = ["convert", str(source), "--recipe", "unime-v2-2b", "--image-size", "56"]  # the alias follows
    assert main(words) == 0
    folder = tmp_path / "home" / "models" / "unime-v2-2b"
    assert capsys.readouterr().out == f'{folder}\nLoad it: SentenceTransformer("unime-v2-2b")\n'
    assert SentenceTransformer("unime-v2-2b", device="cpu").encode("a").shape == (32,)
    assert main(words) == 1
    assert "Choose another --output or --alias, or add --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["verify", "unime-v2-2b", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert table.count("ok  ") == 10  # videos included
    assert "FAILED" not in table
    (tmp_path / "home" / "models" / "unime-v2-2b" / "chat_template.jinja").write_text(
        "{{ messages[0].content[0].text }}"
    )
    assert main(["verify", "unime-v2-2b"]) == 1
    assert "FAILED   template" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["convert", "no/where", "--recipe", "unime-v2", "--output", "out"], "unime convert: No folder no/where"),
        (["convert", ".", "--recipe", "nothing", "--output", "out"], "No recipe 'nothing'. Use one of: unime-v2"),
        (["convert", ".", "--recipe", "unime-v2", "--alias", "../x"], "'../x' cannot be an alias"),
        (["verify", "unime-nothing"], "Unknown model 'unime-nothing'"),
        (["pull", "unime-nothing"], "is not a released model"),
    ],
)
def test_errors_are_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIME_HOME", str(tmp_path))
    assert main(words) == 1
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().split("\n")) == 1


@pytest.mark.parametrize("words", [[], ["nothing"], ["convert", "x"], ["pull"]])
def test_wrong_calls(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: unime" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--pair-order", "--pair_order"])
def test_options_are_taken_with_hyphens_and_underscores(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages write underscores; the value stays as it is."""
    assert main(["search", "no/where", "a star", f"{option}=candidate_first"]) == 2
    assert "add --reranker MODEL" in capsys.readouterr().err  # the option was read
    with pytest.raises(SystemExit):
        main(["search", "no/where", "a star", f"{option}=candidate-first"])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert COMMANDS[name].help in shown and f"example: unime {name} " in shown
