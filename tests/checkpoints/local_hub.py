"""A hub of one repository on this machine: enough of the protocol for listing and (partial) downloads."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """State of the server.

    Attributes:
        url: For ``HF_ENDPOINT``.
        requests: ``"GET /path"`` of every request, with ``[from N]`` where it continued a download.
        hold: Send half of the weights and then nothing more, until the client is gone.
        half_sent: Set when that has happened.
        claimed_size: Size that the listing gives for the weights, None for the true one.
    """

    def __init__(self, repository: str, folder: Path) -> None:
        self.repository, self.folder = repository, folder
        self.requests: list[str] = []
        self.hold = False
        self.half_sent = threading.Event()
        self.claimed_size: int | None = None
        self.url = ""

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def size(self, path: Path) -> int:
        claimed = self.claimed_size if path.suffix == ".safetensors" else None
        return path.stat().st_size if claimed is None else claimed


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def _json(self, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _missing(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _answer(self, *, body: bool) -> None:
            route = self.path.split("?")[0]
            start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
            hub.requests.append(f"{self.command} {route}" + (f" [from {start}]" if start else ""))
            if route.startswith(f"/api/models/{hub.repository}/tree/"):
                return self._json(
                    [
                        {"type": "file", "path": path.name, "size": hub.size(path), "oid": _etag(path)}
                        for path in hub.files()
                    ]
                )
            if route.startswith(f"/api/models/{hub.repository}"):
                names = [{"rfilename": path.name, "size": hub.size(path)} for path in hub.files()]
                return self._json({"id": hub.repository, "sha": COMMIT, "siblings": names})
            prefix = f"/{hub.repository}/resolve/{COMMIT}/"
            path = hub.folder / route.removeprefix(prefix)
            if not route.startswith(prefix) or not path.is_file():
                return self._missing()
            content = path.read_bytes()
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{_etag(path)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start if body else hub.size(path)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if not body:
                return None
            if path.suffix == ".safetensors" and hub.hold:
                self.wfile.write(content[start : start + len(content) // 2])
                self.wfile.flush()
                hub.half_sent.set()
                self.connection.recv(1)  # returns when the client has gone
                self.close_connection = True
                return None
            self.wfile.write(content[start:])
            return None

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

    return Handler


@contextmanager
def local_hub(repository: str, folder: Path) -> Iterator[Hub]:
    """Serve ``folder`` as ``repository``."""
    hub = Hub(repository, folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        server.handle_error = lambda *_: None  # a killed client is not an error
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
