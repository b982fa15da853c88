"""Settings of the server: models, replicas and limits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

API_KEY_VARIABLE = "UNIME_API_KEY"
"""Environment variable with the bearer token that clients have to send."""

CHUNK = 64
"""Largest number of items in one call of a model; larger requests are spread over the replicas."""

MIB = 1 << 20


@dataclass(frozen=True)
class ServeSettings:
    """What a server serves, and its limits.

    Args:
        model: Alias or folder of the embedding model.
        reranker: Alias or folder of the reranker. Defaults to None, no reranking.
        index: Folder of an index of the embedding model. Defaults to None, no search.
        replicas: Replicas of each model.
        max_replicas: Largest number of replicas, which Ray starts under load. Defaults to None, no autoscaling.
        gpus: GPUs of a replica; may be a fraction. Defaults to None: an equal share for all replicas, at most 1; 0 if
            Ray has none, or the device is "cpu".
        threads: CPU threads of a replica.
        device: Device of the models. Defaults to None, the choice of Sentence Transformers.
        max_body: Largest request body in bytes.
        max_pixels: Largest number of pixels of an image.
        max_items: Largest number of items in a request.
        max_tokens: Largest number of tokens of an item. Defaults to None, what the model takes.
        max_queue: Largest number of items that are waiting or being computed; a larger request is taken alone.
        timeout: Seconds until a request is given up.
        read_timeout: Seconds in which a request body has to arrive.
        allow_urls: Hosts from which images are fetched. Defaults to none.
        key_digest: SHA-256 of the bearer token. Defaults to None, no token is asked for.
    """

    model: str
    reranker: str | None = None
    index: str | None = None
    replicas: int = 1
    max_replicas: int | None = None
    gpus: float | None = None
    threads: int = 1
    device: str | None = None
    max_body: int = 32 * MIB
    max_pixels: int = 50_000_000
    max_items: int = 2048
    max_tokens: int | None = None
    max_queue: int = 4096
    timeout: float = 300.0
    read_timeout: float = 30.0
    allow_urls: tuple[str, ...] = ()
    key_digest: bytes | None = None

    @property
    def max_bytes(self) -> int:
        """Largest total size in bytes of the request bodies that are held in memory."""
        return 8 * self.max_body

    @property
    def num_models(self) -> int:
        """Number of models: the embedding model, and the reranker if there is one."""
        return 1 if self.reranker is None else 2

    @property
    def model_id(self) -> str:
        """Name of the embedding model in requests: the alias, or the name of the folder."""
        return Path(self.model).name

    @property
    def reranker_id(self) -> str | None:
        """Name of the reranker in requests; None without one."""
        return None if self.reranker is None else Path(self.reranker).name


def key_digest(token: str) -> bytes:
    """SHA-256 of a bearer token: what the server keeps of it.

    Example:
        >>> key_digest("secret").hex()[:8]
        '2bb80d53'
    """
    return hashlib.sha256(token.encode()).digest()
