"""Routes: the paths of the server, and answers to unknown ones."""

from __future__ import annotations

from typing import cast

from ray import serve
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from unime_st.serving.api_errors import ApiError
from unime_st.serving.gateway import Gateway

POSTS = (
    "/v1/embeddings",
    "/v1/rerank",
    "/v2/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/v1/search",
    "/search",
)
GETS = ("/v1/models", "/health", "/metrics")


def build_app() -> Starlette:
    """ASGI application of the gateway in whose process it runs."""

    async def answer(request: Request) -> Response:
        gateway = cast("Gateway", serve.get_replica_context().servable_object)
        return await gateway.answer(request)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found = ApiError(error.status_code, f"{request.method[:20]} {request.url.path[:100]}: {error.detail}")
        return JSONResponse(found.body, found.status, {**(error.headers or {}), **found.headers})

    posts = [Route(path, answer, methods=["POST"]) for path in POSTS]
    gets = [Route(path, answer, methods=["GET"]) for path in GETS]
    return Starlette(routes=[*posts, *gets], exception_handlers={HTTPException: no_route})
