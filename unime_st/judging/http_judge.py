"""HTTP judge: log-odds from an OpenAI-compatible chat server with log-probabilities, such as vLLM or SGLang."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import math
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from unime_st.data import Item
from unime_st.scoring.groups import Group, PairError, record_error
from unime_st.scoring.prompts import ANSWERS, PAIR_PROMPT, clean_text, prompt_hash

logger = logging.getLogger(__name__)

_TOP = 20  # as many as the protocol allows
_WAIT_AT_MOST = 30.0
_MANY = 8  # pairs of one call that are refused for the same reason: then it is not the pairs


class ServerError(ConnectionError):
    """The server does not answer, or refuses every request for the same reason; what is finished is kept."""


class HttpJudge:
    """Judge pairs with a model behind ``/v1/chat/completions`` that returns log-probabilities.

    The score is the difference of the log-probabilities of Yes and No at the first answer position, which equals the
    difference of their logits as long as the server is told no temperature, as here. Requests go out query by query,
    so that the server's prefix cache computes the query once. Throttling (429), server errors (5xx), broken connections
    and stalls are tried again with growing pauses. Run through
    :func:`~unime_st.judging.judge_pools.judge_pools`, a run that gives up goes on where it was.

    Args:
        url: Address up to and including ``/v1``.
        model: Name under which the server knows the model.
        revision: What the server runs, as exactly as you know it; scores with another one are not mixed.
        concurrency: Requests under way at once. Defaults to 32.
        timeout: Seconds to wait for an answer. Defaults to 120.
        retries: Tries after the first one. Defaults to 6.
        pause: Seconds before the second try, doubled each time (at most 30) and drawn at random from half of it on.
            Defaults to 0.5.
        api_key: Sent as a bearer token. Defaults to none.

    Raises:
        ValueError: If an option makes no sense.

    Example:
        >>> from unime_st.judging import Group, HttpJudge
        >>> judge = HttpJudge("http://127.0.0.1:8000/v1", "Qwen/Qwen2.5-VL-7B-Instruct")
        >>> judge.score([Group("a red square", ["a red square", "a blue circle"])])  # doctest: +SKIP
        [array([ 4.1, -3.2], dtype=float32)]
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        revision: str = "unknown",
        concurrency: int = 32,
        timeout: float = 120.0,
        retries: int = 6,
        pause: float = 0.5,
        api_key: str | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        if concurrency < 1 or retries < 0 or timeout <= 0:
            raise ValueError("concurrency must be at least 1, retries at least 0, timeout above 0")
        self.url = url.rstrip("/") + "/chat/completions"
        self.name, self.revision = model, revision
        self.prompt_hash = prompt_hash(PAIR_PROMPT, "chat", ANSWERS)
        self.concurrency, self.timeout, self.retries, self.pause = concurrency, timeout, retries, pause
        self.tries = 0  # for those who watch
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def score(self, groups: Sequence[Group], *, errors: list[PairError] | None = None) -> list[np.ndarray]:
        """Score every candidate of every group.

        Args:
            groups: Queries with their candidates.
            errors: Where given, pairs that cannot be judged (an unreadable image, a request that the server refuses as
                bad, an answer without Yes and No) are appended here and scored NaN. Defaults to None: they raise.

        Returns:
            list[np.ndarray]: Per group a float32 array of log-odds, one per candidate in order.

        Raises:
            ServerError: If the server cannot be reached, refuses the caller, or goes on failing.
            ValueError: If a pair cannot be judged and ``errors`` is None.
        """
        scores = [np.full(len(group.candidates), np.nan, dtype=np.float32) for group in groups]
        before = len(errors or ())
        indices = [(row, column) for row, group in enumerate(groups) for column in range(len(group.candidates))]
        with ThreadPoolExecutor(self.concurrency) as pool:
            pairs = ((groups[row].query, groups[row].candidates[column]) for row, column in indices)
            try:
                for (row, column), answer in zip(indices, pool.map(self._outcome, pairs), strict=True):
                    if isinstance(answer, ValueError):
                        record_error(errors, row, column, answer)
                    else:
                        scores[row][column] = answer
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        aside = [error.reason for error in (errors or ())[before:]]
        if len(aside) == len(indices) >= _MANY and len(set(aside)) == 1:
            raise ServerError(
                f"{self.url}: none of {len(indices)} pairs could be judged ({aside[0]}): check url and model"
            )
        return scores

    def _outcome(self, pair: tuple[Item, Item]) -> float | ValueError:
        try:
            return self._log_odds(self._ask(*pair))
        except ValueError as error:
            return error

    def _ask(self, query: Item, candidate: Item) -> dict[str, Any]:
        content = [
            {"type": "text", "text": PAIR_PROMPT},
            {"type": "text", "text": "Query:"},
            *_parts(query),
            {"type": "text", "text": "Candidate:"},
            *_parts(candidate),
        ]
        request: dict[str, Any] = {"model": self.name, "messages": [{"role": "user", "content": content}]}
        request |= {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": _TOP}
        return self._post(json.dumps(request).encode())

    def _post(self, body: bytes) -> dict[str, Any]:
        """Send a request until it is answered."""
        reason = ""
        for wait in self._pauses():
            self.tries += 1
            request = urllib.request.Request(self.url, body, self._headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code}: {error.read(2000).decode('utf-8', 'replace')}"
                if error.code in (400, 413, 422):
                    raise ValueError(f"the server refuses the pair ({reason})") from error
                if error.code not in (408, 425, 429) and error.code < 500:
                    raise ServerError(
                        f"{self.url} refuses the request ({reason}): check url, model and key"
                    ) from error
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (
                OSError,
                http.client.HTTPException,
                json.JSONDecodeError,
            ) as error:  # no connection, a stall, half an answer
                reason = str(error) or type(error).__name__
            logger.info("%s: %s; again in %.1f s", self.url, reason, wait)
            time.sleep(wait)
        raise ServerError(
            f"{self.url} has not answered in {self.retries + 1} tries ({reason}). Start the same command again when the "
            "server is back: finished shards are kept."
        )

    def _pauses(self) -> Iterator[float]:
        for number in range(self.retries + 1):
            wait = min(_WAIT_AT_MOST, self.pause * 2**number)
            yield 0.0 if number == self.retries else random.uniform(wait / 2, wait)

    def _log_odds(self, answer: dict[str, Any]) -> float:
        try:
            first = answer["choices"][0]["logprobs"]["content"][0]
            found = {entry["token"].strip(): float(entry["logprob"]) for entry in reversed(first["top_logprobs"])}
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"{self.url} answers without log-probabilities; a judge needs a server that returns `top_logprobs`"
            ) from error
        if not any(word in found for word in ANSWERS):
            raise ValueError(
                f"neither Yes nor No is among the {len(found)} likeliest answers: {sorted(found)[:5]} ..."
            )
        # What is not listed is at most as likely as the least of the list: a bound, far enough to decide the pair.
        least = min(found.values())
        yes, no = (found.get(word, least) for word in ANSWERS)
        if not math.isfinite(yes - no):
            raise ValueError(f"the log-odds are {yes - no}")
        return yes - no


def _parts(item: Item) -> list[dict[str, Any]]:
    """Content of a message: image before text."""
    parts: list[dict[str, Any]] = []
    if item.image is not None:
        image = item.image.open()  # a broken image is told from a broken server
        data = item.image.read()
        kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
        if kind == "png" and not data.startswith(b"\x89PNG"):  # what not every server reads
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data = buffer.getvalue()
        encoded = base64.b64encode(data).decode("ascii")
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{encoded}"}})
    if item.text is not None:
        parts.append({"type": "text", "text": clean_text(item.text)})
    return parts


def _seconds(header: str | None) -> float:
    try:
        return min(_WAIT_AT_MOST, max(0.0, float(header or 0)))
    except ValueError:  # a date
        return 0.0
