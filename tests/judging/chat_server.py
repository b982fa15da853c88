"""Chat server with log-probabilities for the tests: a tiny model behind OpenAI's protocol, and faults on demand."""

from __future__ import annotations

import base64
import itertools
import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from unime_st.data import Item
from unime_st.judging import LocalJudge
from unime_st.scoring.prompts import conversation


class Model:
    """`unime-tiny` with its short prompt; one request at a time."""

    def __init__(self) -> None:
        judge = LocalJudge("unime-tiny", template="tiny", device="cpu")
        self.transformer, self.template = judge.model[0], judge.scorer.whole_prompts.template
        self.lock = threading.Lock()

    @torch.inference_mode()
    def answer(self, content: list[dict[str, Any]], top: int) -> dict[str, Any]:
        indices = [index for index, part in enumerate(content) if part.get("text") in ("Query:", "Candidate:")]
        query, candidate = (_item(content[indices[0] + 1 : indices[1]]), _item(content[indices[1] + 1 :]))
        with self.lock:
            options = {"chat_template": {"chat_template": self.template}}
            features = self.transformer.preprocess([conversation(query, [candidate])], processing_kwargs=options)
            best = self.transformer(features)["causal_logits"][0, -1].log_softmax(-1).topk(top)
        words = self.transformer.tokenizer.convert_ids_to_tokens(best.indices.tolist())
        listed = [{"token": word, "logprob": value} for word, value in zip(words, best.values.tolist())]
        return {"choices": [{"logprobs": {"content": [{**listed[0], "top_logprobs": listed}]}}]}


def _item(parts: list[dict[str, Any]]) -> Item:
    text = next((part["text"] for part in parts if part["type"] == "text"), None)
    image = next((part["image_url"]["url"].split(",")[1] for part in parts if part["type"] == "image_url"), None)
    return Item(text, image and base64.b64decode(image))


class Handler(BaseHTTPRequestHandler):
    """Answers, but for every n-th request."""

    model: Model
    faults: list[str]
    every: int
    served = itertools.count(1)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        turn, rest = divmod(next(Handler.served), self.every)
        if self.faults and not rest:
            fault = self.faults[turn % len(self.faults)]
            if fault == "stall":
                threading.Event().wait()  # until the server is killed
            elif fault == "half":
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
            else:
                self._send(int(fault), {"error": "on demand"})
            return
        content = request["messages"][0]["content"]
        if any(part.get("text") == "refuse me" for part in content):
            self._send(400, {"error": "bad pair"})
            return
        self._send(200, self.model.answer(content, request["top_logprobs"]))

    def _send(self, status: int, body: dict[str, Any]) -> None:
        encoded = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def serve(model: Model, port_file: Path, faults: Sequence[str], every: int) -> None:
    """Serve until killed, on a free port that is written to a file.

    Args:
        model: The model.
        port_file: File for the port; it appears when the server listens.
        faults: Kinds of faults, in turn: a status code, "half" an answer, or "stall".
        every: Every so many requests, one has a fault.
    """
    torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
    Handler.model, Handler.faults, Handler.every = model, list(faults), every
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    temporary = port_file.with_suffix(".tmp")
    temporary.write_text(str(server.server_address[1]))
    temporary.replace(port_file)
    server.serve_forever()
