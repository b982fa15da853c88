"""Image URLs: download an encoded image within limits of time, size and redirects."""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import threading
from collections.abc import Callable, Collection
from typing import IO
from urllib.parse import urlsplit
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    Request,
    build_opener,
    getproxies,
)

from PIL import Image

from unime_st.data.images import MAX_BYTES, BadImageError

FETCH_SECONDS = 20.0
"""Default time limit in seconds for the download of an image: name resolution, headers, redirects and content."""

MAX_REDIRECTS = 5
"""Maximum number of redirects that are followed."""

_SCHEMES = ("http://", "https://")
_BLOCK = 1 << 16


def is_url(text: str) -> bool:
    """Whether a text is an ``http`` or ``https`` URL."""
    return text.startswith(_SCHEMES)


def fetch_image(url: str, *, seconds: float = FETCH_SECONDS) -> Image.Image:
    """Download an image with :func:`fetch_bytes`; it is not yet decoded.

    Raises:
        BadImageError: If the download fails, exceeds a limit, or is not an image.
    """
    try:
        return Image.open(io.BytesIO(fetch_bytes(url, seconds=seconds)))
    except (OSError, Image.DecompressionBombError) as error:
        raise BadImageError(f"image {url}: cannot be decoded ({error})") from error


def fetch_bytes(
    url: str, *, seconds: float = FETCH_SECONDS, max_bytes: int | None = None, hosts: Collection[str] | None = None
) -> bytes:
    """Download an encoded image.

    The URL may name any server, but must be given by the caller: URLs that come from data are not to be fetched, except
    with ``hosts``. A redirect may lead from a public server to another one, but not to an address of the local machine
    or network.

    Args:
        url: Where the image is.
        seconds: Time limit of the whole download. Defaults to 20.
        max_bytes: Largest size. Defaults to None, :data:`~unime_st.data.images.MAX_BYTES`.
        hosts: The only hosts that are asked, also after redirects, and only at public addresses. Defaults to None, any.

    Raises:
        BadImageError: If the download fails, takes longer than ``seconds``, is redirected too often or to a private
            address, or is larger than ``max_bytes``.
    """
    download = _Download(url, seconds, MAX_BYTES if max_bytes is None else max_bytes, hosts)
    # In a thread of its own: neither name resolution nor headers that arrive byte by byte have a time limit otherwise.
    thread = threading.Thread(target=download.run, name="image download", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        download.abort()
        raise BadImageError(f"image {url}: cannot be fetched (not complete after {seconds:g} seconds)")
    if isinstance(download.error, MemoryError):
        raise download.error
    if download.error is not None:
        raise BadImageError(f"image {url}: cannot be fetched ({download.error})") from download.error
    return bytes(download.content)


class _Download:
    """One download, which another thread may abort."""

    def __init__(self, url: str, seconds: float, max_bytes: int, hosts: Collection[str] | None) -> None:
        self.url, self.seconds, self.max_bytes, self.hosts = url, seconds, max_bytes, hosts
        self.content = bytearray()
        self.error: Exception | None = None
        self._aborted = False
        self._sockets: list[socket.socket] = []

    def run(self) -> None:
        """Download into :attr:`content`; an exception is kept in :attr:`error`."""
        try:
            _check_host(self.url, self.hosts)
            request = Request(self.url, headers={"User-Agent": "unime-st"})
            with self._opener().open(request, timeout=self.seconds) as answer:
                while block := answer.read1(_BLOCK):
                    self.content += block
                    if len(self.content) > self.max_bytes:
                        raise OSError(f"larger than the {self.max_bytes} bytes that an image may have")
        except Exception as error:  # raised by the thread that waits
            self.error = error

    def abort(self) -> None:
        """End the download: reads on its sockets return at once."""
        self._aborted = True
        for opened in self._sockets:
            try:
                opened.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed in the meantime
                continue

    def _opener(self) -> OpenerDirector:
        private = self.hosts is None and _is_private_host(urlsplit(self.url).hostname or "")
        redirects = _Redirects(private_allowed=private, hosts=self.hosts)

        def watch(opened: socket.socket) -> None:
            self._sockets.append(opened)
            if self._aborted:
                raise TimeoutError("the download was aborted")
            redirects.check(opened)

        return build_opener(_WatchedHandler(watch), redirects)


class _Redirects(HTTPRedirectHandler):
    """Follows a few redirects, and from a public server none to a private address."""

    max_redirections = MAX_REDIRECTS

    def __init__(self, *, private_allowed: bool, hosts: Collection[str] | None = None) -> None:
        self.private_allowed, self.hosts = private_allowed, hosts
        self.redirected = hosts is not None  # then the first connection is checked, too

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Request | None:
        self.redirected = True
        if not is_url(newurl):
            raise OSError(f"redirected to {newurl:.100}, which is neither an http nor an https URL")
        if not self.private_allowed and _is_private_host(urlsplit(newurl).hostname or ""):
            raise OSError(f"redirected to {newurl:.100}, which is a private address")
        _check_host(newurl, self.hosts)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def check(self, opened: socket.socket) -> None:
        """Raise for a connection to a private address, in case a name has come to resolve to another address."""
        if self.redirected and not self.private_allowed and not getproxies() and _is_private(opened.getpeername()[0]):
            raise OSError(f"redirected to the private address {opened.getpeername()[0]}")


class _WatchedHandler(HTTPSHandler, HTTPHandler):
    """Opens http and https URLs, and calls ``watch`` with the socket of every connection."""

    def __init__(self, watch: Callable[[socket.socket], None]) -> None:
        super().__init__()
        self._watch = watch

    def http_open(self, req: Request) -> http.client.HTTPResponse:
        return self.do_open(self._watched(http.client.HTTPConnection), req)

    def https_open(self, req: Request) -> http.client.HTTPResponse:
        return self.do_open(self._watched(http.client.HTTPSConnection), req)

    def _watched(self, kind: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
        def connect(connection: http.client.HTTPConnection) -> None:
            kind.connect(connection)
            self._watch(connection.sock)

        return type(kind.__name__, (kind,), {"connect": connect})


def _check_host(url: str, hosts: Collection[str] | None) -> None:
    """Raise for a host that is not one of ``hosts``, or has a private address; any is allowed without ``hosts``."""
    host = urlsplit(url).hostname or ""
    if hosts is not None and (host not in hosts or _is_private_host(host)):
        raise OSError(f"{host:.100} is not an allowed host with a public address")


def _is_private(address: str) -> bool:
    found = ipaddress.ip_address(address.split("%", 1)[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return not (found if mapped is None else mapped).is_global


def _is_private_host(host: str) -> bool:
    try:
        return any(_is_private(str(entry[4][0])) for entry in socket.getaddrinfo(host, None))
    except (OSError, UnicodeError, ValueError):  # reported by the connection
        return False
