"""Serving benchmark: `unime serve` on loopback beside `UniME.encode`, and a soak test with faults.

python benchmarks/serve.py [--items 192 --clients 1 8 64 --soak 10000]
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock, local
from typing import Any

import harness
import numpy as np
import psutil
from workloads import SIZES, mixed, random_qwen2_vl, sentences

from unime_st import UniME

Body = dict[str, Any]
LEAST_COSINE = 0.99999


@dataclass
class Server:
    """A server process and its connections, one for each thread."""

    process: subprocess.Popen[str]
    port: int
    connections: local = field(default_factory=local)

    def post(self, body: Body | bytes) -> tuple[int, Any]:
        """Status and content of a response to `/v1/embeddings`."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if not hasattr(self.connections, "open"):
            self.connections.open = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        self.connections.open.request("POST", "/v1/embeddings", content, {"Content-Type": "application/json"})
        response = self.connections.open.getresponse()
        return response.status, json.loads(response.read())

    def processes(self, name: str = "ray::") -> list[psutil.Process]:
        """Processes of Ray whose command line begins so."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(name):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def cpu_seconds(self) -> float:
        """CPU time of the server's processes until now."""
        processes = [psutil.Process(self.process.pid), *self.processes("")]
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def megabytes(self) -> dict[str, float]:
        """Resident memory of gateway and model."""
        kinds = {"gateway": "ray::ServeReplica:unime:gateway", "embedder": "ray::ServeReplica:unime:embedder"}
        return {
            kind: round(sum(process.memory_info().rss for process in self.processes(name)) / 2**20, 1)
            for kind, name in kinds.items()
        }


@contextmanager
def served(model: str, work: Path, *words: str) -> Iterator[Server]:
    """A server process on a free port."""
    log = work / "server.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "unime_st.cli", "serve", model, "--port", "0", *words]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True)
    try:
        while (ready := re.search(r"Ready: http://127\.0\.0\.1:(\d+)/v1", log.read_text())) is None:
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.2)
        yield Server(process, int(ready[1]))
    finally:
        process.terminate()
        process.wait()


def request_of(item: Any) -> Body:
    """Body of the request for an item of `encode`; base64 vectors, as the client of OpenAI asks for."""
    if not isinstance(item, dict):
        item = {"text": item} if not str(item).endswith(".jpg") else {"image": item}
    item = dict(item)
    if "image" in item:
        item["image"] = f"data:image/jpeg;base64,{base64.b64encode(Path(item['image']).read_bytes()).decode()}"
    return {"input": item, "encoding_format": "base64"}


def vector_of(content: Body) -> np.ndarray:
    """Vector of a response."""
    return np.frombuffer(base64.b64decode(content["data"][0]["embedding"]), dtype="<f4")


def load(server: Server, bodies: Sequence[bytes], expected: np.ndarray, clients: int) -> dict[str, Any]:
    """Send every request once with so many clients in a closed loop: speed, CPU time, latencies, least cosine."""

    def one(row: int) -> tuple[float, float]:
        began = time.perf_counter()
        status, content = server.post(bodies[row])
        seconds = time.perf_counter() - began
        assert status == 200, content
        return seconds, float(vector_of(content) @ expected[row])

    before, began = server.cpu_seconds() + time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(one, range(len(bodies))))
    spent = time.perf_counter() - began
    cpu = server.cpu_seconds() + time.process_time() - before
    latencies = [1000 * seconds for seconds, _ in found]
    return {
        "items_per_second": len(bodies) / spent,
        "cpu_ms_per_item": 1000 * cpu / len(bodies),
        "p50_ms": float(np.percentile(latencies, 50)),
        "p99_ms": float(np.percentile(latencies, 99)),
        "least_cosine": min(cosine for _, cosine in found),
    }


def throughput(options: Any, work: Path) -> dict[str, Any]:
    """Throughput beside `encode` on the same items, in turns."""
    folder = str(random_qwen2_vl(work, options.size))
    items = mixed(work / "images", options.items, repeats=0.0)
    model, bodies = UniME(folder, device=options.device), [json.dumps(request_of(item)).encode() for item in items]
    expected = model.encode(items)
    rounds: dict[str, list[dict[str, Any]]] = {}
    with served(folder, work, "--device", options.device) as server:
        load(server, bodies[:8], expected, 8)
        for _ in range(options.repeats):
            cpu, began = time.process_time(), time.perf_counter()
            model.encode(items)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            rounds.setdefault("encode", []).append(
                {"items_per_second": len(items) / seconds, "cpu_ms_per_item": 1000 * cpu / len(items)}
            )
            for clients in options.clients:
                rounds.setdefault(f"{clients} clients", []).append(load(server, bodies, expected, clients))
    return {name: _medians(found) for name, found in rounds.items()}


def _medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(entry[key] for entry in found), 7) for key in found[0]}


def soak(options: Any, work: Path) -> dict[str, Any]:
    """Many requests of `unime-tiny` with malformed ones between them and a killed replica: every vector is checked."""
    texts = sentences(500, least=3, most=40)
    expected = UniME("unime-tiny", device=options.device).encode(texts)
    bad: list[Callable[[int], Body | bytes]] = [
        lambda number: b'{"input": ',
        lambda number: {"input": {"image": "data:image/png;base64,aGVsbG8="}},
        lambda number: {"input": "a", "dimensions": -number},
    ]
    statuses: Counter[str] = Counter()
    numbers, lock = count(), Lock()
    lowest = [1.0]

    def one(_: int) -> None:
        with lock:
            number = next(numbers)
        if number % 20 == 0:
            status, content = server.post(bad[number % len(bad)](number))
            name = f"malformed {status}"
        else:
            row = number % len(texts)
            status, content = server.post({"input": texts[row], "encoding_format": "base64"})
            name = str(status)
        with lock:
            statuses[name] += 1
            if status == 200:
                lowest[0] = min(lowest[0], float(vector_of(content) @ expected[row]))

    with served("unime-tiny", work, "--device", options.device) as server, ThreadPoolExecutor(16) as pool:
        warm = max(1, options.soak // 5)
        list(pool.map(one, range(warm)))
        before, began = server.megabytes(), time.perf_counter()
        list(pool.map(one, range(options.soak - warm)))
        seconds, after = time.perf_counter() - began, server.megabytes()
        for process in server.processes("ray::ServeReplica:unime:embedder"):
            process.kill()
        list(pool.map(one, range(50)))
    return {
        "requests": options.soak + 50,
        "requests_per_second": round((options.soak - warm) / seconds, 1),
        "statuses": dict(sorted(statuses.items())),
        "least_cosine": lowest[0],
        "megabytes_after_warm_up": before,
        "megabytes_at_the_end": after,
    }


def report(result: dict[str, Any]) -> str:
    """Markdown of the result."""
    lines = [harness.where(result), ""]
    if found := result.get("load"):
        whole = found["encode"]["items_per_second"]
        lines += [
            f"{result['items']} mixed items, random Qwen2-VL ({result['size']}), one item per request, beside `UniME.encode`. "
            f"Both models have {result['machine']['threads']} threads; clients, Ray, gateway and model share the cores.",
            "",
            "| side | items/s | share of encode | CPU ms/item | p50 ms | p99 ms | least cosine |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in found.items():
            share = f"{row['items_per_second'] / whole:.2f}"
            tail = [f"{row[key]:.0f}" if key in row else "" for key in ("cpu_ms_per_item", "p50_ms", "p99_ms")]
            cosine = f"{row['least_cosine']:.6f}" if "least_cosine" in row else ""
            lines.append(f"| {name} | {row['items_per_second']:.2f} | {share} | {' | '.join(tail)} | {cosine} |")
        lines.append("")
    if found := result.get("soak"):
        lines += [
            f"{found['requests']} requests to `unime-tiny` by 16 clients, one in 20 malformed, and a replica killed before "
            f"the last 50: {found['requests_per_second']} requests/s, least cosine {found['least_cosine']:.6f}.",
            "",
            "| statuses | " + ", ".join(f"{name}: {number}" for name, number in found["statuses"].items()) + " |",
            "|---|---|",
            *(
                f"| {kind} MB, after the first fifth / before the kill | "
                f"{megabytes} / {found['megabytes_at_the_end'][kind]} |"
                for kind, megabytes in found["megabytes_after_warm_up"].items()
            ),
        ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Run the benchmark and print the results."""
    parser = harness.options(__doc__, repeats=2)
    parser.add_argument("--size", choices=tuple(SIZES), default="mid", help="size of the random Qwen2-VL")
    parser.add_argument("--items", type=int, default=192, help="number of items; 0 skips the throughput")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="numbers of clients")
    parser.add_argument("--soak", type=int, default=10_000, help="number of requests of the soak test; 0 skips it")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    kept = harness.RESULTS / "serve.json"  # of a part that is skipped
    result: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {"name": "serve"}
    result["machine"] = harness.machine()
    with tempfile.TemporaryDirectory() as work:
        if options.items:
            result |= {"load": throughput(options, Path(work)), "items": options.items, "size": options.size}
            harness.save(result, report(result))
        if options.soak:
            result["soak"] = soak(options, Path(work))
    sys.stdout.write(harness.save(result, report(result)))


if __name__ == "__main__":
    main()
