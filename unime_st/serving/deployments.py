"""Deployments of Ray Serve: the gateway before replicas of the models."""

from __future__ import annotations

import math
import os
from typing import Any, cast

import ray
from ray import serve
from ray.serve import Application, Deployment

from unime_st.serving.gateway import Gateway
from unime_st.serving.model_actors import Embedder, Reranker
from unime_st.serving.routes import build_app
from unime_st.serving.settings import ServeSettings

_CALLS = 100_000
"""Calls that a replica takes; the gateway bounds the queue in items."""
_BUSY = 16
"""Calls per replica that autoscaling aims at."""
_GPU_UNITS = 10_000  # in which Ray counts parts of a GPU


def build(settings: ServeSettings, *, graceful_seconds: float = 2.0) -> Application:
    """Application for ``serve.run``.

    Args:
        settings: What to serve.
        graceful_seconds: Time for running requests to finish at shutdown. Defaults to 2.

    Returns:
        Application: The gateway, bound to the models.
    """
    common: dict[str, object] = {
        "max_ongoing_requests": _CALLS,
        "graceful_shutdown_timeout_s": graceful_seconds,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    scaling: dict[str, object] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None and settings.max_replicas > settings.replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": _BUSY,
            }
        }
    available = float(ray.cluster_resources().get("GPU", 0))
    actor: dict[str, object] = {"num_cpus": 1, "num_gpus": gpus_per_replica(settings, available)}
    kinds: dict[str, type] = {"embedder": Embedder}
    if settings.reranker is not None:
        kinds["reranker"] = Reranker
    models = [_deployment(kind, name, actor, **common, **scaling).bind(settings) for name, kind in kinds.items()]
    ingress = _deployment(serve.ingress(build_app)(Gateway), "gateway", {"num_cpus": 0}, **common)
    return ingress.bind(settings, *models)


def gpus_per_replica(settings: ServeSettings, available: float) -> float:
    """GPUs of a replica: the number of the settings, or so much that all replicas find room, at most 1.

    Raises:
        ValueError: If there are too few GPUs, for which Ray would wait; not with ``RAY_ADDRESS``, as clusters grow.

    Example:
        >>> gpus_per_replica(ServeSettings("unime-v2", reranker="unime-v2-reranker"), available=1.0)
        0.5
    """
    gpus, replicas = settings.gpus, settings.num_models * settings.replicas
    if gpus is None:
        if not available or settings.device == "cpu":
            return 0.0
        most = settings.num_models * (settings.max_replicas or settings.replicas)
        return math.floor(_GPU_UNITS / math.ceil(most / available)) / _GPU_UNITS
    room = math.inf if not gpus else available // gpus if gpus >= 1 else available * (1 // gpus)
    if room < replicas and not os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            f"{replicas} replicas with {gpus:g} GPUs each do not fit {available:g} GPUs; lower --gpus-per-replica"
        )
    return gpus


def _deployment(kind: type, name: str, actor: dict[str, Any], **options: Any) -> Deployment:
    """Deployment of a class; Ray's types know ``serve.deployment`` only as a decorator."""
    return cast("Deployment", serve.deployment(kind, name=name, ray_actor_options=actor, **options))
