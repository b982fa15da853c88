"""Gateway: the HTTP endpoints, as a deployment of Ray Serve without a model of its own."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from unime_st.data.items import Item
from unime_st.serving.api_errors import ApiError, bad_request
from unime_st.serving.item_drafts import (
    ItemDraft,
    boolean_field,
    check_fields,
    check_model,
    integer_field,
    read_item,
    read_messages,
    text_field,
)
from unime_st.serving.metrics import CONTENT_TYPE, Metrics
from unime_st.serving.model_actors import Answer, EmbedCall, RerankCall, SearchCall
from unime_st.serving.request_reader import Body, RequestReader, error_response, json_response
from unime_st.serving.settings import CHUNK, ServeSettings

logger = logging.getLogger("ray.serve")

_IGNORED = ("model", "user", "priority", "request_id")
_ATTEMPTS = 3
_HEALTH_SECONDS = 5.0
_MAX_HITS = 1000


class Gateway:
    """Reads requests within limits, passes their items to the models, and writes responses and metrics.

    Args:
        settings: Settings of the server.
        embedder: Handle of :class:`~unime_st.serving.model_actors.Embedder`.
        reranker: Handle of :class:`~unime_st.serving.model_actors.Reranker`. Defaults to None.
    """

    def __init__(
        self, settings: ServeSettings, embedder: DeploymentHandle, reranker: DeploymentHandle | None = None
    ) -> None:
        self.settings, self.embedder, self.reranker = settings, embedder, reranker
        self.metrics = Metrics()
        self.started = int(time.time())
        self.reader = RequestReader(settings)
        self._waiting = self._running = 0
        self._draining = False
        self._info: Body | None = None

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, and wait until the running ones are answered, at most so many seconds."""
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._running:
                    await asyncio.sleep(0.02)

    async def answer(self, request: Request) -> Response:
        """Answer a request."""
        path = f"/{request.url.path.rpartition('/')[2]}"
        if path == "/health":
            return await self._health()
        try:
            self.reader.authorize(request)
        except ApiError as error:
            return error_response(error)
        if path == "/metrics":
            self.metrics.waiting.set(self._waiting)
            return Response(self.metrics.text(), media_type=CONTENT_TYPE)
        if path == "/models":
            return JSONResponse(self._models())
        handlers = {
            "/embeddings": self._embeddings,
            "/rerank": self._rerank,
            "/score": self._score,
            "/search": self._search,
        }
        return await self._handle(path, request, handlers[path])

    def _models(self) -> Body:
        names = [name for name in (self.settings.model_id, self.settings.reranker_id) if name]
        names = list(dict.fromkeys(names))
        entries = [{"id": name, "object": "model", "created": self.started, "owned_by": "unime-st"} for name in names]
        return {"object": "list", "data": entries}

    async def _health(self) -> Response:
        """Whether the models answer; needs no token."""
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                await asyncio.gather(*(model.info.remote() for model in (self.embedder, self.reranker) if model))
        except Exception:  # whatever it is, the server is not ready
            return error_response(ApiError(503, "a model does not answer", retry_after=5))
        return JSONResponse({"status": "ok"})

    async def load_error(self) -> str | None:
        """Why a model could not be loaded; None if all are ready."""
        for model in (self.embedder, self.reranker):
            if model is not None and (error := (await model.info.remote()).get("error")) is not None:
                return str(error)
        return None

    async def _handle(self, path: str, request: Request, handle: Callable[[Body], Awaitable[Body]]) -> Response:
        began = time.perf_counter()
        self._running += 1
        try:
            if self._draining:
                raise ApiError(503, "the server is shutting down", retry_after=5)
            async with asyncio.timeout(self.settings.timeout):
                with self.reader.reserved() as reserve:
                    response = await json_response(await handle(await self.reader.read(request, reserve)))
        except ApiError as error:
            response = error_response(error)
        except TimeoutError:
            response = error_response(
                ApiError(504, f"no result within {self.settings.timeout:g} seconds", retry_after=5)
            )
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception as error:
            logger.error("%s: %s", path, type(error).__name__)  # its message may hold inputs
            response = error_response(ApiError(500, "internal error", code="internal_error"))
        finally:
            self._running -= 1
        self.metrics.seconds.labels(path).observe(time.perf_counter() - began)
        self.metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    async def _items(self, drafts: Sequence[ItemDraft]) -> list[Item]:
        """Items of a request, with the images of its URLs."""
        if len(drafts) > self.settings.max_items:
            raise bad_request(
                f"{len(drafts)} items, expected at most {self.settings.max_items}", code="too_many_items"
            )
        if any(draft.url for draft in drafts):
            from unime_st.serving.remote_images import fetch_all

            fetched = await fetch_all(drafts, self.settings)
        else:
            fetched = [None] * len(drafts)
        return [draft.finish(self.settings.max_pixels, data) for draft, data in zip(drafts, fetched, strict=True)]

    @contextmanager
    def _queued(self, count: int) -> Iterator[None]:
        """Count items as waiting; a request that is larger than the queue is taken when nothing else waits."""
        if self._waiting and self._waiting + count > self.settings.max_queue:
            raise ApiError(
                429, f"{self._waiting} items are waiting; try again later", code="queue_full", retry_after=1
            )
        self._waiting += count
        try:
            yield
        finally:
            self._waiting -= count

    async def _call(self, method: Any, call: object) -> Answer:
        """Result of a model; a call that was lost with its replica is given to another."""
        for _ in range(_ATTEMPTS):
            try:
                answer: Answer = await method.remote(call)
            except RayActorError:
                self.metrics.lost.inc()
                await asyncio.sleep(0.2)
                continue
            except BackPressureError:
                raise ApiError(429, "the queue is full; try again later", code="queue_full", retry_after=1) from None
            except DeploymentUnavailableError:
                break
            self.metrics.batch.observe(answer.batch)
            return answer
        raise ApiError(503, "no replica of the model is available", retry_after=5)

    async def _facts(self) -> Body:
        if self._info is None:
            self._info = await self.embedder.info.remote()
        return self._info

    async def _embeddings(self, body: Body) -> Body:
        fields = ("input", "messages", "encoding_format", "dimensions", "prompt", "prompt_name")
        check_fields(body, (*fields, *_IGNORED))
        check_model(body, self.settings.model_id)
        encoding = text_field(body, "encoding_format") or "float"
        if encoding not in ("float", "base64"):
            raise bad_request("encoding_format: expected 'float' or 'base64'", "encoding_format")
        facts = await self._facts()
        dim = integer_field(body, "dimensions", at_most=facts["dim"])
        prompt, name = text_field(body, "prompt"), text_field(body, "prompt_name")
        if name is not None and (prompt is not None or name not in facts["prompts"]):
            known = ", ".join(facts["prompts"]) or "none"
            raise bad_request(f"prompt_name: expected one of {known}, and no prompt beside it", "prompt_name")
        drafts, system = self._inputs(body)
        if system is not None:
            if prompt is not None or name is not None:
                raise bad_request("prompt: the system message is the prompt already", "prompt")
            prompt = system
        items = await self._items(drafts)
        with self._queued(len(items)):
            calls = [EmbedCall(chunk, prompt, name) for chunk in _chunks(items)]
            answers = await asyncio.gather(*(self._call(self.embedder.embed, call) for call in calls))
        _check_rows(answers, drafts)
        vectors = np.concatenate([answer.vectors for answer in answers if answer.vectors is not None])
        if dim is not None and dim < vectors.shape[1]:
            vectors = vectors[:, :dim] / np.linalg.norm(vectors[:, :dim], axis=1, keepdims=True)
        tokens = sum(answer.tokens for answer in answers)
        self.metrics.items.labels("/embeddings").inc(len(items))
        self.metrics.tokens.inc(tokens)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _encode_vector(vector, encoding)}
                for index, vector in enumerate(vectors)
            ],
            "model": self.settings.model_id,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _inputs(self, body: Body) -> tuple[list[ItemDraft], str | None]:
        if ("input" in body) == ("messages" in body):
            raise bad_request("expected either input or messages", "input")
        if "messages" in body:
            draft, system = read_messages(body["messages"])
            return [draft], system
        value = body["input"]
        if not isinstance(value, list):
            return [read_item(value, "input")], None
        if not value:
            raise bad_request("input: the list is empty", "input")
        return [read_item(entry, f"input[{index}]") for index, entry in enumerate(value)], None

    async def _rerank(self, body: Body) -> Body:
        check_fields(body, ("query", "documents", "top_n", "return_documents", *_IGNORED))
        model = self._reranker_for(body)
        documents = body.get("documents")
        if "query" not in body or not isinstance(documents, list) or not documents:
            raise bad_request("expected a query and a list of documents", "documents")
        drafts = [read_item(document, f"documents[{index}]") for index, document in enumerate(documents)]
        top = integer_field(body, "top_n") or len(documents)
        returned = boolean_field(body, "return_documents", True)
        query, *items = await self._items([read_item(body["query"], "query"), *drafts])
        with self._queued(len(items)):
            scores = await self._scores("/rerank", query, items, drafts)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[:top]
        results: list[Body] = [{"index": index, "relevance_score": scores[index]} for index in order]
        if returned:
            for entry in results:
                entry["document"] = {"text": items[entry["index"]].text}
        return {"id": f"rerank-{uuid.uuid4().hex}", "model": model, "results": results}

    async def _score(self, body: Body) -> Body:
        names = ("queries", "documents") if body.keys() & {"queries", "documents"} else ("text_1", "text_2")
        check_fields(body, (*names, *_IGNORED))
        model = self._reranker_for(body)
        sides = []
        for name in names:
            value = body.get(name)
            if value is None or value == []:
                raise bad_request(f"{name} is missing or empty", name)
            values = value if isinstance(value, list) else [value]
            sides.append([read_item(entry, f"{name}[{index}]") for index, entry in enumerate(values)])
        left, right = sides
        if len(left) not in (1, len(right)):
            raise bad_request(f"{names[0]}: expected 1 entry or {len(right)}, as many as {names[1]}", names[0])
        items = await self._items([*left, *right])
        queries, documents = items[: len(left)], items[len(left) :]
        with self._queued(len(documents)):
            if len(left) == 1:
                scores = await self._scores("/score", queries[0], documents, right, left[0].param)
            else:
                parts = (
                    self._scores("/score", query, [document], [draft], own.param)
                    for query, document, own, draft in zip(queries, documents, left, right, strict=True)
                )
                scores = list(chain.from_iterable(await asyncio.gather(*parts)))
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        return {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": model,
            "data": data,
        }

    def _reranker_for(self, body: Body) -> str:
        name = self.settings.reranker_id
        if name is None:
            raise ApiError(404, "no reranker is served; start the server with --reranker NAME", code="no_reranker")
        check_model(body, name)
        return name

    async def _scores(
        self,
        endpoint: str,
        query: Item,
        items: Sequence[Item],
        drafts: Sequence[ItemDraft] | None,
        param: str = "query",
    ) -> list[float]:
        """Scores of documents in their order; without drafts unreadable ones get 0."""
        assert self.reranker is not None
        calls = [RerankCall(query, chunk) for chunk in _chunks(items)]
        answers = await asyncio.gather(*(self._call(self.reranker.rerank, call) for call in calls))
        _check_rows(answers, drafts, param)
        self.metrics.items.labels(endpoint).inc(len(items))
        return [0.0 if math.isnan(score) else score for answer in answers for score in answer.scores]

    async def _search(self, body: Body) -> Body:
        check_fields(body, ("query", "top_k", "query_prompt", "rerank", *_IGNORED))
        check_model(body, self.settings.model_id)
        if self.settings.index is None:
            raise ApiError(404, "no index is served; start the server with --index DIR", code="no_index")
        top = integer_field(body, "top_k", at_most=_MAX_HITS) or 10
        prompt, rerank = text_field(body, "query_prompt"), boolean_field(body, "rerank", False)
        if rerank and self.reranker is None:
            raise bad_request("rerank: no reranker is served; start the server with --reranker NAME", "rerank")
        if "query" not in body:
            raise bad_request("query is missing", "query")
        (query,) = await self._items([read_item(body["query"], "query")])
        with self._queued(1):
            answer = await self._call(self.embedder.search, SearchCall(query, top, prompt))
        if answer.reasons:
            raise bad_request(f"query: {_public(answer.reasons[-1])}", "query")
        hits: list[Body] = [
            {"id": name, "score": similarity, "similarity": similarity, "text": item.text}
            for name, similarity, item in answer.hits
        ]
        if rerank and hits:
            items = [item for _, _, item in answer.hits]
            with self._queued(len(items)):
                scores = await self._scores("/search", query, items, None)
            for hit, score in zip(hits, scores, strict=True):
                hit["score"] = score
            hits.sort(key=lambda hit: -hit["score"])
        self.metrics.items.labels("/search").inc()
        return {"object": "list", "model": self.settings.model_id, "data": hits}


def _chunks(items: Sequence[Item]) -> list[list[Item]]:
    """Items of the calls of a request."""
    return [list(items[start : start + CHUNK]) for start in range(0, len(items), CHUNK)]


def _check_rows(answers: Sequence[Answer], drafts: Sequence[ItemDraft] | None, query_param: str = "query") -> None:
    """Refuse a request one of whose items, or whose query, has no result; without drafts items are not looked at."""
    for number, answer in enumerate(answers):
        for row, reason in answer.reasons.items():
            if row < 0:
                raise bad_request(f"{query_param}: {_public(reason)}", query_param)
            if drafts is not None:
                param = drafts[number * CHUNK + row].param
                raise bad_request(f"{param}: {_public(reason)}", param)


def _encode_vector(vector: np.ndarray, encoding: str) -> object:
    """Vector as a list of numbers, or base64 of little-endian float32."""
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()


def _public(reason: str) -> str:
    """Reason of the engine without the number that it gives an item."""
    return reason.partition(": ")[2] if reason.startswith("item ") else reason
