"""Image downloads: total time (headers included), size and redirects are limited; redirects avoid private addresses."""

from __future__ import annotations

import http.server
import io
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.request import Request

import pytest
from PIL import Image

from unime_st import UniME
from unime_st.data import BadImageError, image_urls
from unime_st.data.image_urls import fetch_bytes, fetch_image
from unime_st.encoding import encode_items


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.removeprefix("/").removesuffix(".png")
        if name == "headers":
            self.drip(b"HTTP/1.1 200 OK\r\n" + b"X-Header: value\r\n" * 1000)
        elif name == "body":
            self.send_response(200)
            self.end_headers()
            self.drip(png() * 100)
        elif name.startswith("hop"):
            self.redirect(f"/hop{int(name[3:]) - 1}.png" if name != "hop0" else "/good.png")
        elif name == "loop":
            self.redirect("/loop.png")
        elif name == "file":
            self.redirect("file:///etc/hostname")
        elif name == "text":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())

    def redirect(self, location: str) -> None:
        self.send_response(302)
        self.send_header("Location", location)
        self.end_headers()

    def drip(self, content: bytes) -> None:
        for byte in content:
            try:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
            except OSError:  # the client gave up, as it should
                return
            time.sleep(0.02)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", ["headers", "body"])
def test_slow_server_meets_the_total_time_limit(site: str, name: str):
    with pytest.raises(BadImageError, match=f"{name}.png: cannot be fetched .not complete after 0.3 seconds"):
        fetch_image(f"{site}/{name}.png", seconds=0.3)


@pytest.mark.parametrize("name", ["loop", "hop6", "file", "text"])
def test_redirects_and_content_are_limited(site: str, name: str):
    with pytest.raises(BadImageError, match=f"{name}.png: cannot be (fetched|decoded)"):
        fetch_image(f"{site}/{name}.png")


def test_good_downloads(site: str):
    assert fetch_image(f"{site}/good.png").size == fetch_image(f"{site}/hop3.png").size == (30, 20)


def test_size_limit(site: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_urls, "MAX_BYTES", 20)
    with pytest.raises(BadImageError, match="larger than the 20 bytes"):
        fetch_bytes(f"{site}/good.png")


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1/a.png", "http://169.254.169.254/a.png", "http://[::1]/a.png", "http://10.0.0.1/a.png"]
)
def test_public_server_may_not_redirect_to_a_private_address(target: str):
    redirects = image_urls._Redirects(private_allowed=False)
    with pytest.raises(OSError, match="private address"):
        redirects.redirect_request(Request("http://example.org"), io.BytesIO(), 302, "Found", {}, target)  # type: ignore[arg-type]
    allowed = image_urls._Redirects(private_allowed=True)
    assert allowed.redirect_request(Request("http://10.0.0.2"), io.BytesIO(), 302, "Found", {}, target)  # type: ignore[arg-type]


def test_failed_download_is_one_item(site: str):
    rows = ["a star", {"image": f"{site}/text.png"}, {"image": f"{site}/good.png"}, f"{site}/good.png"]
    vectors, mask = encode_items(UniME("unime-tiny", device="cpu"), rows, on_error="skip")
    assert mask.tolist() == [True, False, True, True]
    assert vectors[2] == pytest.approx(vectors[3], abs=1e-5)


def test_named_hosts_only_and_never_a_private_address(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "not an allowed host with a public address"
    for hosts in ((), ("images.example",), ("127.0.0.1",)):
        with pytest.raises(BadImageError, match=refused):
            fetch_bytes(f"{site}/good.png", hosts=hosts)
    monkeypatch.setattr(image_urls, "_is_private", lambda address: False)  # as if this machine were a public server
    assert fetch_bytes(f"{site}/good.png", hosts=("127.0.0.1",)) == png()
    assert fetch_bytes(f"{site}/hop1.png", hosts=("127.0.0.1",)) == png()
    with pytest.raises(BadImageError, match="larger than the 20 bytes"):
        fetch_bytes(f"{site}/good.png", hosts=("127.0.0.1",), max_bytes=20)
    with pytest.raises(BadImageError, match=refused):
        fetch_bytes(site.replace("127.0.0.1", "localhost") + "/good.png", hosts=("127.0.0.1",))


def test_a_name_that_comes_to_lead_to_a_private_address(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls, "_is_private_host", lambda host: False)  # what the first look-up says
    with pytest.raises(BadImageError, match=r"private address 127\.0\.0\.1"):
        fetch_bytes(f"{site}/good.png", hosts=("127.0.0.1",))
