"""A server process on loopback for tests, and what to send to it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

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

    def children(self, name: str = "") -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def session(self) -> Path:
        """Folder of Ray's logs."""
        for process in self.children("gcs_server"):
            if found := re.search(r"/\S*?/session_[\d_-]+", " ".join(process.cmdline())):
                return Path(found[0])
        raise AssertionError("no session folder")

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
