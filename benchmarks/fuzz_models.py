"""Cases of the fuzz campaign around models: inputs of `encode`, arguments of functions, judge servers, reports."""

from __future__ import annotations

import csv
import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.fuzz import Case
from benchmarks.fuzz_data import JUNK, TEXTS
from unime_st import Item, UniME, losses
from unime_st.encoding import encode_items
from unime_st.judging import Group, HttpJudge
from unime_st.retrieval import top_k
from unime_st.selection import select_negatives

HOSTILE_NAMES = (
    "=1+1",
    "+cmd",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "[x](javascript:alert(1))",
    "![p](http://h/x.png)",
    "<img src=http://h>",
    "<script>",
    "a|b",
    "http://h/x",
    "`code`",
    "a\nb",
    "<javascript:x>",
    "www.h.org",
)
"""Names that a spreadsheet, a Markdown reader or a browser would act on."""


@cache
def model() -> UniME:
    """The embedded model."""
    return UniME("unime-tiny", device="cpu")


def items(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Inputs of ``encode``: a vector of the right content, or an error that names the input."""
    image = Image.new("RGB", (40, 40), "red")
    image.save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    (folder / "empty.jpg").touch()
    pixels = np.asarray(image)
    images: list[Any] = [
        image,
        *(image.convert(mode) for mode in ("L", "P", "RGBA", "CMYK", "1")),
        pixels,
        pixels / 255.0,
        pixels.astype(np.int64),
        torch.from_numpy(pixels.copy()),
        pixels.transpose(2, 0, 1),
        pixels[..., 0],
        pixels * float("nan"),
        pixels[:0],
        pixels.astype(complex),
        pixels[None],
        np.zeros((5,)),
        pixels.astype(np.float32) * 1e9,
        str(folder / "good.png"),
        folder / "good.png",
        str(folder / "bad.png"),
        folder / "empty.jpg",
        folder / "nope.png",
        folder,
        b"junk",
        (folder / "good.png").read_bytes(),
        {"bytes": b"junk", "path": None},
        {"bytes": None, "path": None},
        "data:image/png;base64,xx",
        "http://127.0.0.1:9/x.png",
        5,
        [],
        [image, image],
        {},
        object(),
        Image.new("RGB", (0, 5)),
        Image.new("RGB", (1, 4000)),
    ]
    for number, value in enumerate(images):
        yield Case(f"image {number} {type(value).__name__} {value!r:.60}", partial(_encodes, {"image": value}))
        yield Case(
            f"image and text {number} {value!r:.60}",
            partial(_encodes, {"image": value, "text": draw.choice(TEXTS)}),
        )
    for value in JUNK:
        yield Case(f"{value!r:.60}", partial(_encodes, value))
        yield Case(f"text {value!r:.60}", partial(_encodes, {"text": value}))
    for value in (
        ("a", "b"),
        {"txt": "a"},
        {"text": "a", "sound": 1},
        b"bytes",
        np.array(["a"]),
        {"text": ["a", "b"]},
        [{"role": "user"}],
    ):
        yield Case(f"{value!r:.60}", partial(_encodes, value))


def _encodes(value: Any) -> bool:
    """Whether the vectors are finite, the other input of the batch keeps its vector, and the value is not absent."""
    vectors = np.asarray(model().encode([value, "a blue star"]))
    alone = np.asarray(model().encode(["a blue star"]))[0]
    finite = bool(np.isfinite(vectors).all()) and vectors.shape == (2, 128)
    return finite and float(vectors[1] @ alone) > 0.999 and not _absent(value)


def _absent(value: Any) -> bool:
    return value is None or value == {} or (isinstance(value, float) and value != value)


def arguments(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Arguments of public functions and losses that are out of range or of a wrong type."""
    numbers: list[Any] = [0, -1, float("nan"), True, "x", None, 1.5, float("inf"), [1]]
    vectors = np.eye(4, dtype=np.float32)
    similarities = (0, -1, None, 1.5, [1], float("inf"))
    calls: list[tuple[str, Callable[[Any], Any], tuple[Any, ...]]] = [
        ("batch_size", lambda value: encode_items(model(), ["a"], batch_size=value), ()),
        ("encode batch_size", lambda value: model().encode(["a"], batch_size=value), ()),
        ("truncate_dim", lambda value: encode_items(model(), ["a"], truncate_dim=value), (None,)),
        ("prompt", lambda value: encode_items(model(), ["a"], prompt=value), (None, "x")),
        ("k", lambda value: top_k(vectors, vectors, value), ()),
        ("max_similarity", lambda value: top_k(vectors, vectors, 2, max_similarity=value), similarities),
        ("queries", lambda value: top_k(value, vectors, 2), ()),
        ("num_negatives", lambda value: select_negatives([0.1, 0.2], 0.9, num_negatives=value), ()),
        ("stride", lambda value: select_negatives([0.1, 0.2], 0.9, stride=value), ()),
        ("margin", lambda value: select_negatives([0.1, 0.2], 0.9, margin=value), (0, -1, 1.5)),
        ("scores", lambda value: select_negatives([0.1, value], 0.9), (0, True)),
        ("positive_score", lambda value: select_negatives([0.1], value), (0, True)),
        ("hard temperature", lambda value: losses.HardNegativeRankingLoss(model(), temperature=value), (1.5,)),
        ("hard negatives", lambda value: losses.HardNegativeRankingLoss(model(), num_negatives=value), ()),
        ("soft temperature", lambda value: losses.SoftLabelDistillationLoss(model(), temperature=value), (1.5,)),
        ("soft divergence", lambda value: losses.SoftLabelDistillationLoss(model(), divergence=value), ()),
        ("distill temperature", lambda value: losses.SimilarityDistillationLoss(model(), temperature=value), (1.5,)),
        ("distill direction", lambda value: losses.SimilarityDistillationLoss(model(), direction=value), ()),
        ("mini_batch_size", lambda value: losses.HardNegativeRankingLoss(model(), mini_batch_size=value), (None,)),
        ("concurrency", lambda value: HttpJudge("http://h/v1", "m", concurrency=value), ()),
        ("timeout", lambda value: HttpJudge("http://h/v1", "m", timeout=value), (1.5,)),
        ("url", lambda value: HttpJudge(value, "m"), ()),
    ]  # fmt: skip
    for name, call, right in calls:
        for value in numbers:
            valid = any(
                value is entry or (type(value) is type(entry) and repr(value) == repr(entry)) for entry in right
            )
            yield Case(f"{name}={value!r}", partial(_calls, call, value, valid), valid=valid)


def _calls(call: Callable[[Any], Any], value: Any, valid: bool) -> bool:
    call(value)
    return valid


class _Server(BaseHTTPRequestHandler):
    """Chat server that sends the same answer to every request."""

    answer: bytes = b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(_Server.answer)

    def log_message(self, *args: Any) -> None:
        """Write nothing."""


@cache
def _judge() -> HttpJudge:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return HttpJudge(f"http://127.0.0.1:{server.server_port}/v1", "m", retries=0, pause=0.01, timeout=5)


def judge_answers(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Answers of a chat server: log-odds of Yes and No that are log-probabilities, or an error."""
    good: list[Any] = [{"token": "Yes", "logprob": -0.1}, {"token": "No", "logprob": -2.4}]
    filler = [{"token": f"t{number}", "logprob": -9.0 - number} for number in range(18)]
    yield Case("good", partial(_judges, _answer(good + filler), 2.3), valid=True)
    values: tuple[Any, ...] = (None, "x", True, float("nan"), float("inf"), 3.0, [], {}, -1e400)
    for wrong in values:
        yield Case(
            f"logprob {wrong!r}",
            partial(_judges, _answer([{"token": "Yes", "logprob": wrong}, good[1], *filler]), None),
        )
        yield Case(
            f"token {wrong!r}",
            partial(_judges, _answer([{"token": wrong, "logprob": -0.1}, *filler]), None),
        )
        yield Case(f"entry {wrong!r}", partial(_judges, _answer([wrong]), None))
        yield Case(f"list {wrong!r}", partial(_judges, _answer(wrong), None))
        yield Case(f"answer {wrong!r}", partial(_judges, json.dumps(wrong).encode(), None))
        yield Case(f"choices {wrong!r}", partial(_judges, json.dumps({"choices": [wrong]}).encode(), None))
    for tokens in (
        [],
        filler,
        good[:1],
        good[1:],
        [{"token": "Yes"}],
        [{"logprob": -1}],
        [{"token": "<think>", "logprob": 0.0}],
    ):
        yield Case(f"{tokens!r:.80}", partial(_judges, _answer(tokens), None))
    sure = [{"token": "Yes", "logprob": 0.0}, {"token": "No", "logprob": 0.0}]
    yield Case("two certainties", partial(_judges, _answer(sure + filler), None))
    for content in (b"", b"<html>", b"{", b"[" * 3000, b"\xff", b"null", json.dumps(_answer(good).decode()).encode()):
        yield Case(repr(content[:40]), partial(_judges, content, None))


def _answer(top: Any) -> bytes:
    return json.dumps(
        {"choices": [{"logprobs": {"content": [{"token": "Yes", "logprob": 0.0, "top_logprobs": top}]}}]}
    ).encode()


def _judges(answer: bytes, expected: float | None) -> bool:
    _Server.answer = answer
    found = _judge().score([Group(Item("q"), [Item("a")])])[0]
    return expected is not None and abs(float(found[0]) - expected) < 1e-5


def reports(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Results of mteb with hostile names and wrong contents: an inert report, or an error that names the file."""
    for number, name in enumerate((*HOSTILE_NAMES, *TEXTS[1:])):
        for field in ("task_name", "model", "hf_subset", "revision", "mteb_version"):
            yield Case(f"{field} {name!r:.60}", partial(_reports, folder / f"{number}{field}", {field: name}))
    for number, junk in enumerate(JUNK):
        for field in ("scores", "main_score", "split", "row"):
            yield Case(f"{field} {junk!r:.60}", partial(_reports, folder / f"junk{number}{field}", {field: junk}))


def _reports(folder: Path, change: dict[str, Any]) -> bool:
    from mteb_tasks.report import write_report

    row = {"hf_subset": "default", "main_score": 0.5, "languages": ["eng-Latn"]}
    good = {"task_name": "Other", "dataset_revision": "1", "mteb_version": "2", "evaluation_time": 1.0}
    good["scores"] = {"test": [{**row, "main_score": 0.25}]}
    row |= {name: change[name] for name in ("hf_subset", "main_score") if name in change}
    tried = {
        **good,
        "task_name": change.get("task_name", "MyTask"),
        "dataset_revision": change.get("revision", "1"),
        "mteb_version": change.get("mteb_version", "2"),
        "scores": change.get("scores", {"test": change.get("split", [change.get("row", row)])}),
    }
    for model_name, task, result in (("org__model", "MyTask", tried), ("org__good", "Other", good)):
        path = folder / "results" / model_name / "rev" / f"{task}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result))
    meta = {"name": change.get("model", "org/model"), "revision": "rev"}
    (folder / "results" / "org__model" / "rev" / "model_meta.json").write_text(json.dumps(meta))
    write_report([folder], folder / "report")
    return _inert(folder / "report") and _whole(folder / "report")


def _inert(report: Path) -> bool:
    tables = [row for path in report.glob("*.csv") for row in csv.reader(path.open(encoding="utf-8", newline=""))]
    number = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?$")
    formulas = [cell for row in tables for cell in row if re.match(r"\s*[=+\-@]", cell) and not number.match(cell)]
    markdown = "".join(path.read_text(encoding="utf-8") for path in report.glob("*.md"))
    page = "".join(path.read_text(encoding="utf-8") for path in report.glob("*.html"))
    links = re.search(r"(?<!\\)\]\(|<(img|script|javascript:|https?:)|(?<![\\\w])(https?://|www\.)h", markdown)
    active = re.search(r"<img src=[\"']?http|<script>alert|href=[\"']?javascript", page)
    return not formulas and links is None and active is None


def _whole(report: Path) -> bool:
    """Whether the table holds the score of the other model, and no NaN."""
    text = "".join(path.read_text(encoding="utf-8") for path in report.glob("*.csv"))
    return "nan" not in text.lower().replace("nano", "") and "25.0" in text


KINDS: tuple[Callable[[random.Random, Path], Iterator[Case]], ...] = (items, arguments, judge_answers, reports)
