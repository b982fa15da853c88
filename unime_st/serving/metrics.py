"""Metrics of the server in the format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Requests by endpoint and status, their seconds, items, tokens, batches, and what is waiting.

    Example:
        >>> metrics = Metrics()
        >>> metrics.requests.labels("/v1/embeddings", "200").inc()
        >>> b'unime_requests_total{endpoint="/v1/embeddings",status="200"} 1.0' in metrics.text()
        True
    """

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("unime_requests", "Answered requests.", ("endpoint", "status"), registry=registry)
        self.seconds = Histogram(
            "unime_request_seconds",
            "Seconds from the headers of a request to its answer.",
            ("endpoint",),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
            registry=registry,
        )
        self.items = Counter("unime_items", "Items that were computed.", ("endpoint",), registry=registry)
        self.tokens = Counter("unime_tokens", "Tokens that were embedded.", registry=registry)
        self.batch = Histogram(
            "unime_batch_calls",
            "Calls that a model computed together.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=registry,
        )
        self.waiting = Gauge("unime_queue_items", "Items that are waiting or being computed.", registry=registry)
        self.lost = Counter("unime_replica_failures", "Calls that were lost with a replica.", registry=registry)

    def text(self) -> bytes:
        """All metrics, for ``/metrics``."""
        return generate_latest(self._registry)
