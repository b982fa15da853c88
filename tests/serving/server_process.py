"""A server process on loopback for tests, and what to send to it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

EMBED = "/v1/embeddings"
PIXELS, ITEMS, QUEUE, BODY = 250_000, 200, 160, 1 << 20
"""Limits of the server of the tests; a request may be larger than the queue."""
TOKEN = "sk-zyxwv-token"
MARK = "zyxwvmark"
"""Stands in texts of bad requests, and must not be found in a log."""


@dataclass
class Response:
    """Status, headers and JSON body of a response."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class ServerProcess:
    """A running `unime serve`."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Response:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        content = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
        sent = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, content, {name: value for name, value in sent.items() if value})
        response = connection.getresponse()
        found = Response(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())
        connection.close()
        return found

    def post(self, path: str, body: Any, **headers: str) -> Response:
        return self.request("POST", path, body, **headers)

    def raw_post(self, rest: str) -> socket.socket:
        """Connection on which the beginning of a request was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=600)
        connection.sendall(f"POST {EMBED} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{rest}".encode())
        return connection

    def children(self, name: str = "") -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def check_logs(self) -> None:
        """Check that neither the server's log nor Ray's hold :data:`MARK` or the token."""
        commands = (" ".join(process.cmdline()) for process in self.children("gcs_server"))
        session = next(filter(None, (re.search(r"/\S*?/session_[\d_-]+", command) for command in commands)))
        logs = [path for path in Path(session[0], "logs").rglob("*") if path.is_file()]
        assert logs
        for path in (self.log, *logs):
            content = path.read_bytes()
            assert MARK.encode() not in content and TOKEN.encode() not in content, path

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=120)


def start(folder: Path, *words: str, token: str | None = TOKEN) -> ServerProcess:
    """Start a server and wait until it is ready."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    environment |= {} if token is None else {"UNIME_API_KEY": token}
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "unime_st.cli", "serve", *words, "--port", "0"],
            stdout=file, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder,
        )  # fmt: skip
    while (found := re.search(r"Ready: http://127\.0\.0\.1:(\d+)/v1", log.read_text())) is None:
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    return ServerProcess(process, int(found[1]), log)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


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


def refused(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status == status, response.text
    assert "\n" not in response.text and response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["code"] == code, error
    return error
