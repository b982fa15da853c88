"""Options of `unime serve`: wrong ones are refused in one line, before or after the models are loaded."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from unime_st import UniME
from unime_st.cli import main
from unime_st.retrieval import Index
from unime_st.serving import ServeSettings

WRONG = {
    "unknown model": (["no-such-model"], 1, "Unknown model 'no-such-model'"),
    "unknown reranker": (["unime-tiny", "--reranker", "nobody"], 1, "Unknown model 'nobody'"),
    "no index": (["unime-tiny", "--index", "nowhere"], 1, "nowhere"),
    "replicas": (["unime-tiny", "--replicas", "0"], 2, "--replicas must be at least 1, got 0"),
    "body": (["unime-tiny", "--max-body", "0"], 2, "--max-body must be above 0, got 0.0"),
    "nan": (["unime-tiny", "--timeout", "nan"], 2, "--timeout must be above 0, got nan"),
    "port": (["unime-tiny", "--port", "65536"], 2, "--port must be between 0 and 65535"),
    "GPUs": (["unime-tiny", "--gpus-per-replica", "-1"], 2, "--gpus-per-replica must be at least 0"),
    "parts of GPUs": (["unime-tiny", "--gpus-per-replica", "1.5"], 2, "above 1 must be a whole number, got 1.5"),
    "fewer replicas": (
        ["unime-tiny", "--replicas", "4", "--max-replicas", "2"],
        2,
        "--max-replicas 2 is below --replicas 4",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, status, message = WRONG[name]
    assert main(["serve", *words]) == status
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err


def test_a_used_port(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray.serve")  # in the extra [serve]
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        assert main(["serve", "unime-tiny", "--port", str(used.getsockname()[1])]) == 1
    assert "Choose another --port." in capsys.readouterr().err


def test_an_empty_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("UNIME_API_KEY", " ")
    assert main(["serve", "unime-tiny"]) == 2
    assert "UNIME_API_KEY is empty" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    out = capsys.readouterr().out
    assert "example: unime serve unime-tiny" in out and "UNIME_API_KEY" in out


@pytest.mark.parametrize(
    ("replicas", "available", "expected"),
    [(1, 0.0, 0.0), (1, 1.0, 0.5), (1, 2.0, 1.0), (1, 8.0, 1.0), (3, 4.0, 0.5), (3, 1.0, 0.1666)],
)
def test_all_models_find_room_on_the_gpus(replicas: int, available: float, expected: float) -> None:
    pytest.importorskip("ray.serve")  # in the extra [serve]
    from unime_st.serving.deployments import gpus_per_replica

    settings = ServeSettings("unime-v2", reranker="unime-v2-reranker", replicas=replicas)
    assert gpus_per_replica(settings, available) == expected
    assert gpus_per_replica(dataclasses.replace(settings, device="cpu"), available) == 0.0


def test_too_few_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve")  # in the extra [serve]
    from unime_st.serving.deployments import gpus_per_replica

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = ServeSettings("unime-v2", replicas=3, gpus=0.4)  # two on one GPU
    assert gpus_per_replica(settings, 2.0) == 0.4
    with pytest.raises(ValueError, match=r"3 replicas with 0\.4 GPUs each do not fit 1 GPUs"):
        gpus_per_replica(settings, 1.0)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert gpus_per_replica(settings, 0.0) == 0.4


@pytest.mark.slow
@pytest.mark.distributed
def test_an_index_of_another_model(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve")  # in the extra [serve]
    other = SentenceTransformer("unime-tiny", device="cpu")
    next(other.parameters()).data.mul_(1.5)
    other.save_pretrained(str(tmp_path / "other"))
    Index.build(["a ring"], UniME(tmp_path / "other", device="cpu"), ids=["ring"], folder=tmp_path / "index")
    done = subprocess.run(
        [sys.executable, "-m", "unime_st.cli", "serve", "unime-tiny", "--index", "index", "--port", "0"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "unime serve: the index was built with another model" in done.stderr and done.stdout == ""
    assert done.stderr.strip().count("\n") == 0, done.stderr
