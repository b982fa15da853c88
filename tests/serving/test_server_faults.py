"""Faults around `unime serve`: slow and vanishing clients, a full queue, a killed replica, shutdown."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psutil
import pytest
from server_process import EMBED, ITEMS, MARK, ServerProcess, close, refused, vectors

from unime_st import UniME

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_slow_clients_hold_up_nobody(server: ServerProcess, model: UniME) -> None:
    slow = [server.raw_post('Content-Length: 100\r\n\r\n{"input": "') for _ in range(20)]
    close(vectors(server.post(EMBED, {"input": "a red circle"})), model.encode(["a red circle"]))
    for connection in slow:
        assert b" 408 " in connection.recv(4096)
        connection.close()


def waiting(server: ServerProcess) -> float:
    lines = server.request("GET", "/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("unime_queue_items ")).split()[1])


def test_clients_that_go_away(server: ServerProcess, model: UniME) -> None:
    body = json.dumps({"input": [f"{MARK} {number} " * 50 for number in range(100)]})
    for sent in (body, body[:100]):
        connection = server.raw_post(f"Content-Length: {len(body)}\r\n\r\n{sent}")
        connection.close()
    while waiting(server):
        time.sleep(0.1)
    close(vectors(server.post(EMBED, {"input": "a red circle"})), model.encode(["a red circle"]))
    server.check_logs()


def test_an_input_that_the_model_refuses_spoils_no_other(server: ServerProcess, model: UniME) -> None:
    bodies = [{"input": f"a text number {number}"} for number in range(24)]
    bodies[5::6] = [{"input": ["a red circle", "<|vision_start|><|image_pad|><|vision_end|>"]}] * 4
    searches = [
        {"query": "a red circle"},
        {"query": "<|image_pad|>"},
        {"query": "a", "query_prompt": "<|image_pad|>"},
    ] * 4
    calls = [*((EMBED, body) for body in bodies), *(("/search", body) for body in searches)]
    with ThreadPoolExecutor(len(calls)) as pool:
        found = list(pool.map(lambda call: server.post(*call), calls))
    assert [response.status for response in found[len(bodies) :]] == [200, 400, 400] * 4
    for body, response in zip(bodies, found):
        if isinstance(body["input"], list):
            assert "input[1]" in refused(response, 400, "invalid_value")["message"]
        else:
            close(vectors(response), model.encode([body["input"]]))


def test_a_full_queue_is_told(server: ServerProcess, model: UniME) -> None:
    texts = [f"a text number {number} " * 30 for number in range(ITEMS)]
    expected = model.encode(texts)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: server.post(EMBED, {"input": texts}), range(8)))
    assert {response.status for response in found} == {200, 429}
    for response in found:
        if response.status == 200:
            close(vectors(response), expected)
        else:
            assert refused(response, 429, "queue_full")["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1
    assert waiting(server) == 0


def test_metrics_and_health(server: ServerProcess) -> None:
    assert server.request("GET", "/health", Authorization="").json == {"status": "ok"}
    response = server.request("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    for name in ("unime_requests_total", "unime_request_seconds_bucket", "unime_items_total", "unime_batch_calls_sum"):
        assert f"\n{name}" in response.text


def test_a_killed_replica_loses_no_request(server: ServerProcess, model: UniME) -> None:
    texts = [f"a text number {number}" for number in range(40)]
    expected = model.encode(texts)
    stop = threading.Event()
    found: list[Any] = []

    def send() -> None:
        while not stop.is_set():
            found.append(server.post(EMBED, {"input": texts}))

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    (victim,) = server.children("ServeReplica:unime:embedder")
    victim.kill()
    victim.wait()
    while not [process for process in server.children("ServeReplica:unime:embedder") if process.pid != victim.pid]:
        time.sleep(0.2)
    after = len(found)
    while len(found) < after + 8:
        time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    for response in found:
        close(vectors(response), expected)


@pytest.mark.parametrize("receiver", ["server", "group"])  # service managers send it to the whole group
@pytest.mark.parametrize("answering", [True, False])
def test_shutdown_leaves_no_process(server: ServerProcess, receiver: str, answering: bool) -> None:
    children = server.children()
    assert len(children) > 4
    for process in () if answering else [*server.children("gcs_server"), *server.children("raylet/raylet")]:
        process.suspend()
    for process in children if receiver == "group" else ():
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    assert server.stop() == 0
    psutil.wait_procs(children, timeout=60)
    assert not [process for process in children if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
