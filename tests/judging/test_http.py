"""HTTP judge: scores of a real server process, retries, a killed server, answers that are not Yes or No, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from chat_server import Model, serve
from tiny_embedder import tiny_embedder

from unime_st.data import Item, PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.judging import Group, HttpJudge, LocalJudge, PairError, ServerError
from unime_st.judging.judge_pools import judge_pools
from unime_st.retrieval import mine
from unime_st.stages import JudgeArguments, run_judge

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., tuple[str, BaseProcess]]


@pytest.fixture(scope="module")
def model() -> Model:
    """The model behind every server, loaded once: server processes are forked."""
    return Model()


@pytest.fixture
def start(model: Model, tmp_path: Path) -> Iterator[Start]:
    """Starts servers in processes of their own, which end with the test."""
    running: list[BaseProcess] = []

    def begin(faults: Sequence[str] = (), every: int = 3) -> tuple[str, BaseProcess]:
        port = tmp_path / f"port-{len(running)}"
        running.append(get_context("fork").Process(target=serve, args=(model, port, faults, every), daemon=True))
        running[-1].start()
        while not port.exists():
            assert running[-1].is_alive(), "the server did not start"
            time.sleep(0.01)
        return f"http://127.0.0.1:{port.read_text()}/v1", running[-1]

    yield begin
    for process in running:
        process.kill()
        process.join()


def groups() -> list[Group]:
    pairs = list(training_records(4, seed=3))
    return [Group(pair.query, [pairs[0].positive, pairs[1].positive, Item("a red square")]) for pair in pairs[:2]]


def difference(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def test_scores_equal_those_of_the_model_itself_and_faults_are_survived(start: Start):
    expected = LocalJudge("unime-tiny", template="tiny", device="cpu").score(groups())
    assert max(np.abs(found).max() for found in expected) > 0.5
    address, process = start()
    assert difference(HttpJudge(address, "unime-tiny", concurrency=3).score(groups()), expected) < 1e-4
    for order in ("candidate_first", "both"):
        same = LocalJudge("unime-tiny", template="tiny", device="cpu", pair_order=order)
        judge = HttpJudge(address, "unime-tiny", concurrency=3, pair_order=order)
        assert difference(judge.score(groups()), same.score(groups())) < 1e-4
        assert judge.tries == (12 if order == "both" else 6)
        assert judge.prompt_hash != HttpJudge(address, "unime-tiny").prompt_hash
    refused = [Group("a", [Item("refuse me"), Item(image=b"no image"), Item("a red square")])]
    errors: list[PairError] = []
    judge = HttpJudge(address, "unime-tiny")
    assert np.isnan(judge.score(refused, errors=errors)[0]).tolist() == [True, True, False]
    assert "bad pair" in errors[0].reason and "image" in errors[1].reason and judge.tries == 2
    with pytest.raises(ValueError, match="group 0, candidate 0: the server refuses the pair"):
        judge.score(refused)
    with pytest.raises(ServerError, match=r"none of 8 pairs could be judged.*bad pair"):
        judge.score([Group("a", [Item("refuse me")] * 8)], errors=[])
    process.kill()
    process.join()
    with pytest.raises(ServerError, match=r"not answered in 2 tries.*finished shards are kept"):
        HttpJudge(address, "unime-tiny", retries=1, pause=0.01).score(groups())


def test_a_run_survives_a_killed_server_and_a_bad_one(start: Start, tmp_path: Path):
    pairs = [PairRecord(Item(f"find number {n}"), Item(f"an image of number {n}"), "plain") for n in range(12)]
    records = RecordSet.write(tmp_path / "records", pairs, {})
    pools = mine(records, tiny_embedder(), tmp_path / "pools", num_candidates=3, max_similarity=None)

    class Watched(HttpJudge):
        """Ends the server after two shards."""

        calls = 0

        def score(self, *args, **kwargs):
            self.calls += 1
            if self.calls == 3:
                process.kill()
                process.join()
            return super().score(*args, **kwargs)

    address, process = start()
    with pytest.raises(ServerError):
        judge_pools(pools, Watched(address, "unime-tiny", retries=1, pause=0.01), tmp_path / "scores", shard_size=3)
    finished = {path: path.read_bytes() for path in (tmp_path / "scores").glob("rows-*.parquet")}
    assert len(finished) == 2
    address, _ = start(faults=("429", "500", "half", "stall"), every=4)
    judge = HttpJudge(address, "unime-tiny", concurrency=4, pause=0.01, timeout=2.0)
    scores = judge_pools(pools, judge, tmp_path / "scores", shard_size=3)
    assert all(path.read_bytes() == content for path, content in finished.items())
    assert len(scores) == 12 and judge.tries >= 2 * 3 * 4 + 4  # two shards of three rows of four pairs, each fault
    local = LocalJudge("unime-tiny", template="tiny", device="cpu")
    expected = judge_pools(pools, local, tmp_path / "expected", shard_size=3)
    for found, wanted in zip(scores, expected, strict=True):
        assert (found.query, found.positive, found.candidates) == (wanted.query, wanted.positive, wanted.candidates)
        assert abs(found.positive_logit - wanted.positive_logit) < 1e-4
        assert np.allclose(found.logits, wanted.logits, atol=1e-4)


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="url must begin with"):
        HttpJudge("127.0.0.1:8000", "m")
    with pytest.raises(ValueError, match="concurrency"):
        HttpJudge("http://127.0.0.1:8000/v1", "m", concurrency=0)
    for timeout in (None, "x", [1]):
        with pytest.raises(ValueError, match="timeout must be a finite number"):
            HttpJudge("http://127.0.0.1:8000/v1", "m", timeout=timeout)  # type: ignore[arg-type]


@pytest.mark.parametrize(("option", "value"), [("template", "tiny"), ("max_text_tokens", 512), ("dtype", "bfloat16")])
def test_options_that_a_server_cannot_be_told_are_refused(option: str, value: object, tmp_path: Path):
    records = RecordSet.write(tmp_path / "records", [PairRecord(Item("a"), Item("b"))], {})
    pools = mine(records, tiny_embedder(), tmp_path / "pools")
    folders = {"output": str(tmp_path / "rows"), "scores": str(tmp_path / "scores")}
    with pytest.raises(ValueError, match=f"^{option} {value} has no effect.*leave out {option}"):
        run_judge(JudgeArguments(data=str(pools.folder), url="http://127.0.0.1:1/v1", **folders, **{option: value}))
    assert not (tmp_path / "scores").exists()


@contextmanager
def answering(top: Sequence[tuple[str, float]]) -> Iterator[str]:
    """A server that answers every request with the same log-probabilities."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            listed = [{"token": token, "logprob": logprob} for token, logprob in top]
            answer = {"choices": [{"logprobs": {"content": [{**listed[0], "top_logprobs": listed}]}}]}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def filled(*top: tuple[str, float], count: int = 20) -> list[tuple[str, float]]:
    """The given tokens and as many unlikely ones as it takes."""
    return [*top, *((f"word{index}", -30.0) for index in range(count - len(top)))]


@pytest.mark.parametrize(
    ("top", "message"),
    [
        # A thinking model: Yes and No have 1e-9 of the probability.
        (filled(("<think>", -1e-6), ("Okay", -15.0), ("Yes", -21.0), ("No", -22.5)), "thinks or explains first"),
        (filled(("The", -0.1), ("It", -2.5)), "thinks or explains first"),
        (
            filled(("Yes", -0.1), ("Maybe", -3.0), count=2),
            "returned 2 of 20 log-probabilities and No is not among them",
        ),
    ],
)
def test_a_server_that_does_not_answer_yes_or_no(top: list[tuple[str, float]], message: str):
    with answering(top) as address:
        judge = HttpJudge(address, "m", pause=0.01)
        errors: list[PairError] = []
        assert np.isnan(judge.score([Group("q", ["a"])], errors=errors)[0]).all()
        assert message in errors[0].reason
        with pytest.raises(ValueError, match=f"group 0, candidate 0: .*{message}"):
            judge.score([Group("q", ["a"])])
        with pytest.raises(ServerError, match=f"none of 8 pairs could be judged .*{message}"):
            judge.score([Group("q", ["a"] * 8)], errors=[])


def test_an_answer_that_is_not_listed_is_as_likely_as_the_last_listed():
    with answering(filled(("Yes", -0.01), ("Sure", -5.0))) as address:
        assert HttpJudge(address, "m").score([Group("q", ["a"])])[0] == pytest.approx([29.99])
    with answering([("Yes", -0.2), ("No", -1.7)]) as address:  # both are there, so the rest does not matter
        assert HttpJudge(address, "m").score([Group("q", ["a"])])[0] == pytest.approx([1.5])


def test_an_interrupted_judge_does_not_wait_for_a_stalled_server(start: Start):
    address, _ = start(faults=("stall",), every=1)
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it\n"
        "from unime_st.judging import Group, HttpJudge\n"
        "class Watched(HttpJudge):\n"
        "    def _request(self, *pair):\n"
        "        print('asked', flush=True)\n"
        "        return super()._request(*pair)\n"
        f"Watched({address!r}, 'm', timeout=600).score([Group('a', ['b'] * 4)])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("asked")
        time.sleep(0.2)  # until the request is under way
        process.send_signal(signal.SIGINT)
        try:  # less than the time-out of the request and the stall of the server
            assert process.wait(60) == -signal.SIGINT
        finally:
            process.kill()
