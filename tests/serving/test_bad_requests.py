"""Bad requests to `unime serve`: a status code and one line of JSON, and nothing of them in a log."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from typing import Any

import pytest
from PIL import Image
from server_process import BODY, EMBED, ITEMS, MARK, TOKEN, ServerProcess, chat, data_uri, image_part, png, refused

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

RERANK, SCORE, SEARCH = "/v1/rerank", "/v1/score", "/search"
SMALL = png(Image.new("RGB", (32, 32), "red"))


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
    "image token in the prompt": (EMBED, {"input": MARK, "prompt": "<|image_pad|>"}, 400, "invalid_value"),
    "lone surrogate in a field": (EMBED, '{"input": {"text": "a", "\\ud800": 1}}', 400, "unknown_field"),
    "lone surrogate in the system message": (
        EMBED,
        '{"messages": [{"role": "system", "content": "\\ud800"}, {"role": "user", "content": "a"}]}',
        400,
        "invalid_value",
    ),
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
    "both names": (SCORE, {"text_1": MARK, "text_2": "a", "queries": "b", "documents": "a"}, 400, "unknown_field"),
    "search without query": (SEARCH, {"top_k": 3}, 400, "invalid_value"),
    "top_k": (SEARCH, {"query": MARK, "top_k": 100_000}, 400, "invalid_value"),
    "truncated image of a search": (SEARCH, {"query": {"image": data_uri(SMALL[:-40])}}, 400, "invalid_value"),
    "image token of a search": (SEARCH, {"query": f"{MARK} <|image_pad|>"}, 400, "invalid_value"),
    "image token in the prompt of a search": (
        SEARCH,
        {"query": MARK, "query_prompt": "<|image_pad|>"},
        400,
        "invalid_value",
    ),
    "long search": (SEARCH, {"query": f"{MARK} " * 2000}, 400, "invalid_value"),
    "body": (EMBED, json.dumps({"input": "a" * BODY}), 413, "request_entity_too_large"),
}


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
    with server.raw_post("Transfer-Encoding: chunked\r\n\r\n") as connection:
        with contextlib.suppress(OSError):  # closed by the server after its answer
            connection.sendall(content)
        assert b" 413 " in connection.recv(4096)


def test_logs_hold_no_input(server: ServerProcess) -> None:
    for path, body, _, _ in BAD.values():
        server.post(path, body)
    server.post(EMBED, {"input": MARK}, Authorization=f"Basic {TOKEN}")
    server.check_logs()
