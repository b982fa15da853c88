"""Deployments of Ray Serve: the gateway before replicas of the models."""

from __future__ import annotations

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


def build(settings: ServeSettings, *, graceful_seconds: float = 2.0) -> Application:
    """Application for ``serve.run``.

    Args:
        settings: What to serve.
        graceful_seconds: Time for running requests to finish at shutdown. Defaults to 2.

    Returns:
        Application: The gateway, bound to the models.
    """
    common: dict[str, Any] = {
        "max_ongoing_requests": _CALLS,
        "graceful_shutdown_timeout_s": graceful_seconds,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    copies: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None and settings.max_replicas > settings.replicas:
        copies = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": _BUSY,
            }
        }
    gpus = settings.gpus
    if gpus is None:
        gpus = float(settings.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
    actor: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus}
    models = [
        _deployment(kind, name, actor, **common, **copies).bind(settings)
        for kind, name, wanted in ((Embedder, "embedder", True), (Reranker, "reranker", settings.reranker is not None))
        if wanted
    ]
    ingress = _deployment(serve.ingress(build_app)(Gateway), "gateway", {"num_cpus": 0}, **common)
    return ingress.bind(settings, *models)


def _deployment(kind: type, name: str, actor: dict[str, Any], **options: Any) -> Deployment:
    """Deployment of a class; Ray's types know ``serve.deployment`` only as a decorator."""
    return cast("Deployment", serve.deployment(kind, name=name, ray_actor_options=actor, **options))
