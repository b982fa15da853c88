"""HTTP judge: log-odds from an OpenAI-compatible chat server with log-probabilities, such as vLLM or SGLang."""

from __future__ import annotations

import base64
import copy
import http.client
import io
import json
import logging
import math
import queue
import random
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing

import numpy as np

from unime_st.data import BadImageError, Item
from unime_st.data.items import raise_for_video
from unime_st.files import Json
from unime_st.options import check_count
from unime_st.scoring.groups import Group, PairError, PairOrder, orders_of, record_error
from unime_st.scoring.prompts import (
    ANSWERS,
    LEAST_ANSWER_SHARE,
    NO_ANSWER_ADVICE,
    PAIR_PROMPT,
    clean_text,
    prompt_hash,
)

logger = logging.getLogger(__name__)

_TOP = 20  # the maximum of the protocol
_ROUNDING = 0.01  # of probabilities that a server computes in half precision
_LONGEST_PAUSE = 30.0  # seconds
_SPECIAL_TOKEN = re.compile(r"<\|(\w+)\|>")
_MANY = 8  # pairs of one call that all fail by the server's answer: then the pairs are not the reason


class ServerError(ConnectionError):
    """The server does not answer, or refuses every request; finished shards are kept."""


class HttpJudge:
    """Judges pairs with a model behind ``/v1/chat/completions`` that returns log-probabilities.

    The score is the difference of the log-probabilities of Yes and No at the first answer position. It equals the
    difference of their logits as long as the server uses temperature 1, which is sent. Requests go out query by query,
    so that the server's prefix cache computes the query once. Throttling (429), server errors (5xx), broken
    connections and stalls are retried with growing pauses. A run of :func:`~unime_st.judging.judge_pools.judge_pools`
    that gives up continues with the next unfinished shard.

    The client is Python's own. ``huggingface_hub.InferenceClient`` sends the same request, but refuses every server
    with ``HF_HUB_OFFLINE=1`` and sends the user's Hugging Face token to it where no key is given.

    Args:
        url: Address up to and including ``/v1``.
        model: Name of the model on the server.
        revision: Version of what the server runs; scores with different ones are not mixed. Defaults to "unknown".
        concurrency: Simultaneous requests. Defaults to 32.
        timeout: Seconds to wait for an answer. Defaults to 120.
        retries: Retries of a request. Defaults to 6.
        pause: Seconds before the first retry, doubled each time (at most 30) and drawn at random from half of it on.
            Defaults to 0.5.
        api_key: Sent as a bearer token. Defaults to None.
        pair_order: Order of the two items in the prompt, as for :class:`~unime_st.judging.LocalJudge`; "both" sends two
            requests per pair. Defaults to "query_first", the paper's order.

    Attributes:
        tries: Number of requests sent so far.

    Raises:
        ValueError: If an option is out of range.

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
        pair_order: PairOrder = "query_first",
    ) -> None:
        if not str(url).startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        check_count("concurrency", concurrency)
        check_count("retries", retries, at_least=0)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a finite number of seconds above 0, got {timeout!r}")
        self.url = url.rstrip("/") + "/chat/completions"
        self.name, self.revision = model, revision
        self._set_order(pair_order)
        self.concurrency, self.timeout, self.retries, self.pause = concurrency, timeout, retries, pause
        self.tries = 0
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def _set_order(self, pair_order: PairOrder) -> None:
        orders_of(pair_order)
        self.pair_order = pair_order
        # The hash of the paper's order is that of scores which were stored before there was a choice.
        order = [] if pair_order == "query_first" else [pair_order]
        self.prompt_hash = prompt_hash(PAIR_PROMPT, "chat", ANSWERS, *order)

    def in_order(self, pair_order: PairOrder) -> HttpJudge:
        """Return this judge for another order of the two items.

        Example:
            >>> from unime_st.judging import HttpJudge
            >>> HttpJudge("http://127.0.0.1:8000/v1", "model").in_order("both").pair_order
            'both'
        """
        other = copy.copy(self)
        other._set_order(pair_order)
        return other

    def score(self, groups: Sequence[Group], *, errors: list[PairError] | None = None) -> list[np.ndarray]:
        """Score every candidate of every group, see :meth:`~unime_st.judging.Judge.score`.

        A pair cannot be judged if its image is unreadable, the server refuses the request as bad, or the answer is
        without Yes and No.

        Raises:
            ServerError: If the server cannot be reached, refuses the caller, keeps failing, or answers no pair of the
                call with Yes or No.
            ValueError: If a pair cannot be judged and ``errors`` is None.
        """
        scores = [np.full(len(group.candidates), np.nan, dtype=np.float32) for group in groups]
        indices = [(row, column) for row, group in enumerate(groups) for column in range(len(group.candidates))]
        pairs = [(groups[row].query, groups[row].candidates[column]) for row, column in indices]
        orders = orders_of(self.pair_order)
        asked = [pair if order == "query_first" else pair[::-1] for pair in pairs for order in orders]
        refused: list[ValueError] = []
        with closing(self._outcomes(asked)) as outcomes:
            for row, column in indices:
                answer = _mean([next(outcomes) for _ in orders])
                if isinstance(answer, ValueError):
                    record_error(errors, row, column, answer)
                    refused += [] if isinstance(answer, BadImageError) else [answer]
                else:
                    scores[row][column] = answer
        if len(refused) == len(pairs) >= _MANY:
            raise ServerError(
                f"{self.url}: none of {len(pairs)} pairs could be judged ({refused[0]}): check url and model"
            )
        return scores

    def _outcomes(self, pairs: Sequence[tuple[Item, Item]]) -> Generator[float | ValueError, None, None]:
        """Log-odds of pairs in their order, or the reason why a pair has none.

        The threads are daemons, so that a stalled request does not keep an interrupted process alive.
        """
        answers: list[Future[float | ValueError]] = [Future() for _ in pairs]
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(pairs)):
            waiting.put(index)
        stopped = threading.Event()

        def work() -> None:
            while not stopped.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    answers[index].set_result(self._outcome(*pairs[index], stopped))
                except BaseException as error:  # raised where the answer is awaited
                    answers[index].set_exception(error)

        for _ in range(min(self.concurrency, len(pairs))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for answer in answers:
                yield answer.result()
        finally:
            stopped.set()

    def _outcome(self, query: Item, candidate: Item, stopped: threading.Event) -> float | ValueError:
        try:
            return self._log_odds(self._post(self._request(query, candidate), stopped))
        except ValueError as error:
            return error

    def _request(self, query: Item, candidate: Item) -> bytes:
        content = [
            {"type": "text", "text": PAIR_PROMPT},
            {"type": "text", "text": "Query:"},
            *_parts(query),
            {"type": "text", "text": "Candidate:"},
            *_parts(candidate),
        ]
        request: dict[str, object] = {"model": self.name, "messages": [{"role": "user", "content": content}]}
        request |= {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": _TOP}
        return json.dumps(request).encode()

    def _post(self, body: bytes, stopped: threading.Event) -> Json:
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
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                reason = str(error) or type(error).__name__  # no connection, a stall, half an answer
            logger.info("%s: %s; retry in %.1f s", self.url, reason, wait)
            if stopped.wait(wait):
                break
        raise ServerError(
            f"{self.url} has not answered in {self.retries + 1} tries ({reason}). Start the same command again when the "
            "server is back: finished shards are kept."
        )

    def _pauses(self) -> Iterator[float]:
        for number in range(self.retries + 1):
            wait = min(_LONGEST_PAUSE, self.pause * 2**number)
            yield 0.0 if number == self.retries else random.uniform(wait / 2, wait)

    def _log_odds(self, answer: Json) -> float:
        try:
            top = list(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"])
            found = {str(entry["token"]).strip(): _log_probability(entry["logprob"]) for entry in reversed(top)}
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"{self.url} answers without log-probabilities; a judge needs a server that returns `top_logprobs`"
            ) from error
        share = sum(math.exp(found[word]) for word in ANSWERS if word in found)
        if share > 1 + _ROUNDING:
            raise ValueError(f"the probabilities of {' and '.join(ANSWERS)} sum to {share:.2f}: expected at most 1")
        if share < LEAST_ANSWER_SHARE:
            raise ValueError(f"{NO_ANSWER_ADVICE}. Likeliest first tokens: {[entry['token'] for entry in top[:5]]}")
        missing = [word for word in ANSWERS if word not in found]
        if missing and len(top) < _TOP:
            raise ValueError(
                f"the server returned {len(top)} of {_TOP} log-probabilities and {missing[0]} is not among them: raise "
                "its limit (vLLM: --max-logprobs 20)"
            )
        # What is not listed is at most as likely as the least of the list: a bound, far enough to decide the pair.
        least = min(found.values())
        yes, no = (found.get(word, least) for word in ANSWERS)
        if not math.isfinite(yes - no):
            raise ValueError(f"the log-odds are {yes - no}")
        return yes - no


def _mean(answers: Sequence[float | ValueError]) -> float | ValueError:
    """Mean of the log-odds of a pair in all orders, or the reason why one of them is missing."""
    found = []
    for answer in answers:
        if isinstance(answer, ValueError):
            return answer
        found.append(answer)
    return sum(found) / len(found)


def _log_probability(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value <= _ROUNDING:
        raise ValueError(f"the server returned {value!r:.40} as a log-probability: expected a number of at most 0")
    return min(float(value), 0.0)


def _parts(item: Item) -> list[dict[str, object]]:
    """Return the content of a message, image before text."""
    parts: list[dict[str, object]] = []
    raise_for_video(item, "a judge behind a server")
    if item.image is not None:
        image = item.image.open()  # an unreadable image is an error of the pair, not of the server
        data = item.image.read()
        kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
        if kind == "png" and not data.startswith(b"\x89PNG"):  # not every server reads other formats
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data = buffer.getvalue()
        encoded = base64.b64encode(data).decode("ascii")
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{encoded}"}})
    if item.text is not None:
        # A special token inside a text would end the turn on the server, too: it is sent as text.
        parts.append({"type": "text", "text": _SPECIAL_TOKEN.sub(r"< |\1|>", clean_text(item.text))})
    return parts


def _seconds(header: str | None) -> float:
    try:
        return min(_LONGEST_PAUSE, max(0.0, float(header or 0)))
    except ValueError:  # a date
        return 0.0
