"""`unime serve` as a process on loopback: results equal to those of the library, bad input, faults, shutdown."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from server_process import MARK, TOKEN, ServerProcess, data_uri, png, start

from unime_st import UniME, UniMEReranker
from unime_st.checkpoints.plain_export import export_plain
from unime_st.cli import main
from unime_st.data.scenes import write_example_images
from unime_st.files import read_json, write_json
from unime_st.retrieval import Index

openai = pytest.importorskip("openai")  # in the extra [dev]
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PIXELS, ITEMS, BODY = 250_000, 200, 1 << 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return list(write_example_images(tmp_path_factory.mktemp("images")))


@pytest.fixture(scope="module")
def index(images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "index"
    Index.build(map(str, images), UniME("unime-tiny", device="cpu"), ids=[p.stem for p in images], folder=folder)
    return folder


@pytest.fixture(scope="module")
def server(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = start(
        tmp_path_factory.mktemp("server"), "unime-tiny", "--reranker", "unime-tiny", "--index", str(index), "--device",
        "cpu", "--max-body", "1", "--max-pixels", str(PIXELS), "--max-items", str(ITEMS), "--max-queue", "300",
        "--read-timeout", "3", "--allow-urls", "127.0.0.1", "--allow-urls", "images.example",
    )  # fmt: skip
    yield running
    if running.process.poll() is None:
        running.stop()


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Any:
    return openai.OpenAI(base_url=server.url, api_key=TOKEN, max_retries=0, timeout=600)


@pytest.fixture(scope="module")
def model() -> UniME:
    return UniME("unime-tiny", device="cpu")


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)


def vectors(response: Any) -> list[Any]:
    assert response.status == 200, response.text
    assert [entry["index"] for entry in response.json["data"]] == list(range(len(response.json["data"])))
    return [entry["embedding"] for entry in response.json["data"]]


def chat(*parts: Any, system: str | None = None) -> dict[str, Any]:
    messages: list[Any] = [{"role": "system", "content": system}] if system is not None else []
    return {"messages": [*messages, {"role": "user", "content": list(parts)}]}


def image_part(uri: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri}}


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_openai_client_gets_the_vectors_of_encode(client: Any, model: UniME, encoding: Any) -> None:
    texts = [f"a {color} {shape}" for color in ("red", "blue") for shape in ("circle", "star", "ring")]
    options = {} if encoding is None else {"encoding_format": encoding}
    found = client.embeddings.create(model="unime-tiny", input=texts, **options)
    rows = [entry.embedding for entry in found.data]
    if encoding == "base64":  # the client decodes only what it asks for by itself
        rows = [np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows]
    close(rows, model.encode(texts))
    assert found.model == "unime-tiny" and [entry.index for entry in found.data] == list(range(6))
    assert found.usage.prompt_tokens == found.usage.total_tokens > 6


def test_one_text_and_dimensions(client: Any, model: UniME) -> None:
    (whole,) = client.embeddings.create(model="unime-tiny", input="a red circle").data
    (short,) = client.embeddings.create(model="unime-tiny", input="a red circle", dimensions=32).data
    close(whole.embedding, model.encode("a red circle"))
    close(short.embedding, model.encode("a red circle", truncate_dim=32))
    assert len(short.embedding) == 32


def test_models_of_the_openai_client(client: Any) -> None:
    assert [entry.id for entry in client.models.list()] == ["unime-tiny"]


def test_openai_client_raises_its_own_errors(client: Any, server: ServerProcess) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.embeddings.create(model="text-embedding-3-small", input="a")
    with pytest.raises(openai.BadRequestError, match="expected an integer of at least 1 and at most 128"):
        client.embeddings.create(model="unime-tiny", input="a", dimensions=129)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0).models.list()


def test_chats_and_objects_are_the_items_of_encode(server: ServerProcess, model: UniME, images: list[Path]) -> None:
    uri, path = data_uri(images[0].read_bytes()), str(images[0])
    text = {"type": "text", "text": "a red circle"}
    cases: list[tuple[dict[str, Any], Any, str | None]] = [
        (chat(image_part(uri)), {"image": path}, None),
        (chat(text, image_part(uri)), {"image": path, "text": "a red circle"}, None),
        (chat(image_part(uri), system="Find it."), {"image": path}, "Find it."),
        ({"messages": [{"role": "user", "content": "a ring"}, {"role": "assistant", "content": ""}]}, "a ring", None),
        ({"input": {"image": uri, "text": "x"}}, {"image": path, "text": "x"}, None),
        ({"input": "a ring", "prompt": "Find it."}, "a ring", "Find it."),
        ({"input": "a ring", "prompt_name": "query"}, "a ring", None),
    ]
    for body, value, prompt in cases:
        found = vectors(server.post("/v1/embeddings", body))
        close(found, model.encode([value], prompt=prompt))


def test_many_items_keep_their_order(server: ServerProcess, model: UniME, images: list[Path]) -> None:
    values: list[Any] = [f"a text number {number}" for number in range(150)]
    sent: list[Any] = list(values)
    for number, path in enumerate(images[:20]):
        values.insert(number * 7, {"image": str(path)})
        sent.insert(number * 7, {"image": data_uri(path.read_bytes())})
    close(vectors(server.post("/v1/embeddings", {"input": sent})), model.encode(values))


def test_rerank_and_score(server: ServerProcess, images: list[Path]) -> None:
    reranker = UniMEReranker("unime-tiny", device="cpu")
    query, paths = "a red circle", [images[0], images[7], images[20]]
    documents: list[Any] = [
        "a blue star",
        {"text": "a red circle"},
        *({"image": data_uri(p.read_bytes())} for p in paths),
    ]
    own: list[Any] = ["a blue star", "a red circle", *({"image": str(path)} for path in paths)]
    expected = {entry["corpus_id"]: entry["score"] for entry in reranker.rank(query, own)}
    body = {"model": "unime-tiny", "query": query, "documents": documents}
    found = server.post("/v1/rerank", body).json
    assert {entry["index"] for entry in found["results"]} == set(range(5))
    close([entry["relevance_score"] for entry in found["results"]], sorted(expected.values(), reverse=True))
    close([expected[entry["index"]] for entry in found["results"]], sorted(expected.values(), reverse=True))
    assert {"text": "a blue star"} in [entry["document"] for entry in found["results"]]
    assert len(server.post("/v2/rerank", body).json["results"]) == 5
    (best,) = server.post("/rerank", {**body, "top_n": 1, "return_documents": False}).json["results"]
    assert best == {key: found["results"][0][key] for key in ("index", "relevance_score")}
    scored = server.post("/score", {"text_1": query, "text_2": documents[:2]}).json["data"]
    close([entry["score"] for entry in scored], [expected[0], expected[1]])
    pairs = server.post("/v1/score", {"queries": [query, query], "documents": documents[:2]}).json["data"]
    close([entry["score"] for entry in pairs], [expected[0], expected[1]])


def test_search(server: ServerProcess, index: Path, model: UniME, images: list[Path]) -> None:
    loaded = Index.load(index, model)
    (by_text,) = loaded.search(["blue triangle"], k=4)
    found = server.post("/search", {"query": "blue triangle", "top_k": 4}).json["data"]
    assert [entry["id"] for entry in found] == [hit.id for hit in by_text]
    close([entry["score"] for entry in found], [hit.score for hit in by_text])
    image = {"image": data_uri(images[3].read_bytes())}
    assert server.post("/v1/search", {"query": image, "top_k": 1}).json["data"][0]["id"] == images[3].stem
    (reranked,) = loaded.search(["purple star"], 5, UniMEReranker("unime-tiny", device="cpu"))
    found = server.post("/search", {"query": "purple star", "top_k": 5, "rerank": True}).json["data"]
    close([entry["score"] for entry in found], [hit.score for hit in reranked])
    assert len(server.post("/search", {"query": "purple star", "top_k": 1000}).json["data"]) == len(images)


def test_parity_of_the_server(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_plain("unime-tiny", tmp_path / "plain", device="cpu")
    words = ["parity", server.url, "--file", str(folder / "parity.json")]
    monkeypatch.setenv("UNIME_API_KEY", "wrong")
    assert main(words) == 1
    assert "answers 401" in capsys.readouterr().err
    monkeypatch.setenv("UNIME_API_KEY", TOKEN)
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["text", "image", "image and text"]
    assert all(line.startswith("cosine 1.000000") for line in lines)
    content = read_json(folder / "parity.json")
    for item in content["items"]:
        item["prompt"] = "Represent the user's input."  # is what "prompt" of the causes holds
    write_json(tmp_path / "prompts.json", content)
    assert main([*words[:3], str(tmp_path / "prompts.json")]) == 1
    assert all(line.endswith("likely cause: prompt") for line in capsys.readouterr().out.splitlines())


def test_parity_of_scores(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.new("RGB", (56, 56), "red")
    documents: list[Any] = [{"text": "a red circle"}, {"image": image}, {"image": image, "text": "a square"}]
    scores = UniMEReranker("unime-tiny", device="cpu").predict([("a red square", document) for document in documents])
    items = [
        {"kind": "pair", "query": "a red square", "text": document.get("text"), "image": "image" in document}
        | {"prompt_name": None, "expected": [float(score)]}
        for document, score in zip(documents, scores, strict=True)
    ]
    write_json(tmp_path / "parity.json", {"prepared": data_uri(png(image)), "items": items})
    monkeypatch.setenv("UNIME_API_KEY", TOKEN)
    assert main(["parity", server.url, "--file", str(tmp_path / "parity.json")]) == 0
    assert capsys.readouterr().out.startswith("1 - difference 1.00000")
    items[1]["expected"] = [float(scores[1]) + 0.01]
    write_json(tmp_path / "parity.json", {"prepared": data_uri(png(image)), "items": items})
    assert main(["parity", server.url, "--file", str(tmp_path / "parity.json")]) == 1


def bomb() -> bytes:
    """PNG of a few kilobytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


EMBED, RERANK, SCORE, SEARCH = "/v1/embeddings", "/v1/rerank", "/v1/score", "/search"
SMALL = png(Image.new("RGB", (32, 32), "red"))
BAD: dict[str, tuple[str, Any, int, str]] = {
    "not JSON": (EMBED, f'{{"input": "{MARK}', 400, "invalid_json"),
    "not UTF-8": (EMBED, b'{"input": "\xff"}', 400, "invalid_json"),
    "no body": (EMBED, b"", 400, "invalid_json"),
    "a list": (EMBED, [MARK], 400, "invalid_json"),
    "nested": (EMBED, "[" * 100_000, 400, "invalid_json"),
    "no input": (EMBED, {"model": "unime-tiny"}, 400, "invalid_value"),
    "two inputs": (EMBED, {"input": MARK, "messages": []}, 400, "invalid_value"),
    "empty list": (EMBED, {"input": []}, 400, "invalid_value"),
    "empty text": (EMBED, {"input": ""}, 400, "invalid_value"),
    "empty text in a list": (EMBED, {"input": [MARK, "  "]}, 400, "invalid_value"),
    "number": (EMBED, {"input": 3.5}, 400, "invalid_value"),
    "null": (EMBED, {"input": None}, 400, "invalid_value"),
    "token ids": (EMBED, {"input": [1, 2, 3]}, 400, "invalid_value"),
    "lists of token ids": (EMBED, {"input": [[1, 2], [3]]}, 400, "invalid_value"),
    "lone surrogate": (EMBED, '{"input": "\\ud800"}', 400, "invalid_value"),
    "unknown field": (EMBED, {"input": MARK, "dimension": 3}, 400, "unknown_field"),
    "unknown model": (EMBED, {"input": MARK, "model": "gpt"}, 404, "model_not_found"),
    "model is a number": (EMBED, {"input": MARK, "model": 3}, 400, "invalid_value"),
    "encoding": (EMBED, {"input": MARK, "encoding_format": "int8"}, 400, "invalid_value"),
    "dimensions 0": (EMBED, {"input": MARK, "dimensions": 0}, 400, "invalid_value"),
    "dimensions true": (EMBED, {"input": MARK, "dimensions": True}, 400, "invalid_value"),
    "long prompt": (EMBED, {"input": MARK, "prompt": "a " * 10_000}, 400, "invalid_value"),
    "image token": (EMBED, {"input": [f"{MARK} <|image_pad|>"]}, 400, "invalid_value"),
    "prompt name": (EMBED, {"input": MARK, "prompt_name": "nobody"}, 400, "invalid_value"),
    "too many items": (EMBED, {"input": ["a"] * (ITEMS + 1)}, 400, "too_many_items"),
    "too long": (EMBED, {"input": f"{MARK} " * 2000}, 400, "invalid_value"),
    "not an image": (EMBED, {"input": {"image": data_uri(MARK.encode())}}, 400, "invalid_value"),
    "truncated image": (EMBED, {"input": {"image": data_uri(SMALL[:-40])}}, 400, "invalid_value"),
    "PDF": (EMBED, {"input": {"image": data_uri(b"%PDF-1.4 " + MARK.encode())}}, 400, "invalid_value"),
    "media type": (EMBED, {"input": {"image": data_uri(SMALL, "text/plain")}}, 400, "invalid_value"),
    "no base64": (EMBED, {"input": {"image": f"data:image/png;base64,***{MARK}"}}, 400, "invalid_value"),
    "not base64": (EMBED, {"input": {"image": f"data:image/png,{MARK}"}}, 400, "invalid_value"),
    "path": (EMBED, {"input": {"image": "/etc/hostname"}}, 400, "invalid_value"),
    "file URL": (EMBED, chat(image_part("file:///etc/hostname")), 400, "invalid_value"),
    "host": (EMBED, chat(image_part(f"https://example.com/{MARK}.png")), 400, "url_not_allowed"),
    "private host": (EMBED, chat(image_part("http://127.0.0.1:1/a.png")), 400, "image_fetch"),
    "user in the URL": (EMBED, chat(image_part("http://images.example@127.0.0.1:1/a.png")), 400, "image_fetch"),
    "unknown host": (EMBED, chat(image_part("http://images.example/a.png")), 400, "image_fetch"),
    "no host": (EMBED, chat(image_part("http:///a.png")), 400, "url_not_allowed"),
    "bracket": (EMBED, chat(image_part("http://[::1/a.png")), 400, "url_not_allowed"),
    "pixels": (EMBED, {"input": {"image": data_uri(png(Image.new("L", (1000, 251))))}}, 400, "image_too_large"),
    "bomb": (EMBED, {"input": {"image": data_uri(bomb())}}, 400, "image_too_large"),
    "messages are a text": (EMBED, {"messages": MARK}, 400, "invalid_value"),
    "no messages": (EMBED, {"messages": []}, 400, "invalid_value"),
    "role": (EMBED, {"messages": [{"role": "tool", "content": MARK}]}, 400, "invalid_value"),
    "answer": (EMBED, {"messages": [{"role": "assistant", "content": MARK}]}, 400, "invalid_value"),
    "no user": (EMBED, {"messages": [{"role": "system", "content": MARK}]}, 400, "invalid_value"),
    "part": (EMBED, chat({"type": "video_url", "video_url": {"url": MARK}}), 400, "invalid_value"),
    "two images": (EMBED, chat(*[image_part(data_uri(SMALL))] * 2), 400, "invalid_value"),
    "image is a number": (EMBED, chat({"type": "image_url", "image_url": {"url": 3}}), 400, "invalid_value"),
    "no documents": (RERANK, {"query": MARK, "documents": []}, 400, "invalid_value"),
    "documents are a text": (RERANK, {"query": "a", "documents": MARK}, 400, "invalid_value"),
    "no query": (RERANK, {"documents": [MARK]}, 400, "invalid_value"),
    "top_n": (RERANK, {"query": "a", "documents": [MARK], "top_n": -1}, 400, "invalid_value"),
    "image of a document": (RERANK, {"query": "a", "documents": [{"image": data_uri(b"x")}]}, 400, "invalid_value"),
    "truncated document": (
        RERANK,
        {"query": "a", "documents": [{"image": data_uri(SMALL[:-40])}]},
        400,
        "invalid_value",
    ),
    "truncated query": (RERANK, {"query": {"image": data_uri(SMALL[:-40])}, "documents": ["a"]}, 400, "invalid_value"),
    "long document": (RERANK, {"query": "a", "documents": [f"{MARK} " * 2000]}, 400, "invalid_value"),
    "reranker": (RERANK, {"query": "a", "documents": ["a"], "model": "jina"}, 404, "model_not_found"),
    "lengths": (SCORE, {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400, "invalid_value"),
    "one side": (SCORE, {"text_1": MARK}, 400, "invalid_value"),
    "search without query": (SEARCH, {"top_k": 3}, 400, "invalid_value"),
    "top_k": (SEARCH, {"query": MARK, "top_k": 100_000}, 400, "invalid_value"),
    "truncated image of a search": (SEARCH, {"query": {"image": data_uri(SMALL[:-40])}}, 400, "invalid_value"),
    "long search": (SEARCH, {"query": f"{MARK} " * 2000}, 400, "invalid_value"),
    "body": (EMBED, json.dumps({"input": "a" * BODY}), 413, "request_entity_too_large"),
}


def refused(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status == status, response.text
    assert "\n" not in response.text and response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["code"] == code, error
    return error


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(server: ServerProcess, name: str) -> None:
    path, body, status, code = BAD[name]
    error = refused(server.post(path, body), status, code)
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize(
    "header", ["", "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer", f"Bearer {TOKEN}x", "Bearer é"]
)
def test_a_wrong_token_is_refused(server: ServerProcess, header: str) -> None:
    for method, path in (("POST", EMBED), ("POST", RERANK), ("GET", "/v1/models"), ("GET", "/metrics")):
        body = {"input": MARK} if method == "POST" else None
        response = server.request(method, path, body, Authorization=header.encode().decode("latin-1"))
        assert refused(response, 401, "invalid_api_key")["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"


def test_unknown_paths_and_methods(server: ServerProcess) -> None:
    refused(server.post("/v1/chat/completions", {}), 404, "not_found")
    refused(server.request("GET", "/"), 404, "not_found")
    refused(server.request("GET", EMBED), 405, "method_not_allowed")
    refused(server.request("DELETE", "/health"), 405, "method_not_allowed")


def test_a_body_without_length_is_bounded(server: ServerProcess) -> None:
    chunks = (b'{"input": "' + b"a" * 100_000 for _ in range(30))
    content = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    with raw(server, "Transfer-Encoding: chunked\r\n\r\n") as connection:
        with contextlib.suppress(OSError):  # closed by the server after its answer
            connection.sendall(content)
        assert b" 413 " in connection.recv(4096)


def raw(server: ServerProcess, rest: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=600)
    connection.sendall(f"POST {EMBED} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{rest}".encode())
    return connection


def test_slow_clients_hold_up_nobody(server: ServerProcess, model: UniME) -> None:
    slow = [raw(server, 'Content-Length: 100\r\n\r\n{"input": "') for _ in range(20)]
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
        connection = raw(server, f"Content-Length: {len(body)}\r\n\r\n{sent}")
        connection.close()
    while waiting(server):
        time.sleep(0.1)
    close(vectors(server.post(EMBED, {"input": "a red circle"})), model.encode(["a red circle"]))


def test_an_input_that_the_model_refuses_spoils_no_other(server: ServerProcess, model: UniME) -> None:
    bodies = [{"input": f"a text number {number}"} for number in range(24)]
    bodies[5::6] = [{"input": ["a red circle", "<|vision_start|><|image_pad|><|vision_end|>"]}] * 4
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda body: server.post(EMBED, body), bodies))
    for body, response in zip(bodies, found, strict=True):
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


def test_logs_hold_no_input_and_shutdown_leaves_no_process(server: ServerProcess) -> None:
    session = server.session()
    logs = [path for path in (session / "logs").rglob("*") if path.is_file()]
    assert logs
    for path in (server.log, *logs):
        content = path.read_bytes()
        assert MARK.encode() not in content and TOKEN.encode() not in content, path
    children = server.children()
    assert len(children) > 4
    assert server.stop() == 0
    psutil.wait_procs(children, timeout=60)
    assert not [process for process in children if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
