"""Request reader: bearer token, and JSON bodies within limits of size, memory and time."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from unime_st.files import Json
from unime_st.serving.api_errors import ApiError, bad_request
from unime_st.serving.settings import CHUNK, MIB, ServeSettings, key_digest

Body = Json
"""JSON object of a request or response."""


class RequestReader:
    """Checks the token of requests and reads their bodies; accounts for the bytes that are held."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self._held = 0

    def authorize(self, request: Request) -> None:
        """Refuse a missing or wrong bearer token; ApiError 401."""
        expected = self.settings.key_digest
        if expected is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        # Digests have one length, so that the comparison takes the same time for every token.
        if not hmac.compare_digest(key_digest(token.strip()), expected) or scheme.lower() != "bearer":
            raise ApiError(401, "missing or wrong bearer token", code="invalid_api_key")

    @contextmanager
    def reserved(self) -> Iterator[Callable[[int], None]]:
        """Function that accounts for the size of a body as it arrives, until the request is answered."""
        held = 0

        def reserve(size: int) -> None:
            nonlocal held
            if size > self.settings.max_body:
                raise ApiError(
                    413, f"the body is larger than {self.settings.max_body} bytes; send fewer items or smaller images"
                )
            if self._held + size - held > self.settings.max_bytes:
                raise ApiError(429, "too many requests with large bodies; try again later", retry_after=1)
            self._held, held = self._held + size - held, size

        try:
            yield reserve
        finally:
            self._held -= held

    async def read(self, request: Request, reserve: Callable[[int], None]) -> Body:
        """JSON object in the body of a request."""
        length = request.headers.get("content-length", "0")
        announced = int(length) if length.isascii() and length.isdigit() else 0
        reserve(announced)
        content = bytearray()
        try:
            async with asyncio.timeout(self.settings.read_timeout):
                async for chunk in request.stream():
                    content += chunk
                    reserve(max(len(content), announced))
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.settings.read_timeout:g} seconds") from None
        try:
            body = await asyncio.to_thread(json.loads, content) if len(content) > MIB else json.loads(content)
        except (ValueError, RecursionError):
            raise bad_request("the body is not valid JSON", code="invalid_json") from None
        if not isinstance(body, dict):
            raise bad_request("the body is not a JSON object", code="invalid_json")
        return body


async def json_response(content: Body) -> Response:
    """JSON of a result; many entries are written one by one in a thread, so that other requests go on meanwhile."""
    if len(content.get("data", ())) < CHUNK:
        return JSONResponse(content)

    def render() -> str:
        entries = ",".join(json.dumps(entry, allow_nan=False) for entry in content["data"])
        rest = json.dumps({name: value for name, value in content.items() if name != "data"})
        return f'{rest[:-1]}, "data": [{entries}]}}'

    return Response(await asyncio.to_thread(render), media_type="application/json")


def error_response(error: ApiError) -> Response:
    """Response for an error; ASCII, because names of unknown fields may hold what UTF-8 cannot encode."""
    return Response(json.dumps(error.body), error.status, error.headers, "application/json")
