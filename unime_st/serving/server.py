"""Server process: starts Ray and the deployments, waits for a signal, and stops both."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from unime_st.serving.settings import ServeSettings

if TYPE_CHECKING:  # Ray takes seconds to import
    from ray.serve.handle import DeploymentHandle

_NAME = "unime"
"""Name of the application in Ray Serve."""
_STOP_SECONDS = 2.0
"""Time for running requests to finish after a signal."""
_END_SECONDS = 20.0
"""Time for Ray to end; then its processes are killed."""
_MIN_STORE = 256 << 20
_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no request to another server
    "RAY_worker_niceness": "0",  # replicas are not background jobs
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 are too few on a busy machine
    # What Ray records for its dashboard, which does not run, takes a tenth of a core.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Calls between proxy, gateway and models cost less CPU time over gRPC and on one event loop in each replica.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str((1 << 31) - 1),  # the body is bounded before
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""Environment variables of Ray, for what is not set."""


class _Stopped(BaseException):
    """Raised in the main thread by SIGINT and SIGTERM."""


def run_server(settings: ServeSettings, host: str, port: int, *, verbose: bool = False) -> int:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: What to serve.
        host: Address to listen at.
        port: Port to listen at; 0 takes a free one.
        verbose: Show what Ray and the models log. Defaults to False.

    Returns:
        int: Exit status: 0 after a signal, 1 if a model or the index could not be loaded.

    Raises:
        OSError: If the port is in use.
        ImportError: If Ray Serve is not installed.
    """
    try:
        import ray
        import ray.serve
    except ImportError as error:
        raise ImportError("the server needs Ray Serve: pip install 'unime-st[serve]'") from error
    port = _checked_port(host, port)
    _on_signal(_raise_stopped)
    started: list[psutil.Process] = []
    gateway: DeploymentHandle | None = None
    status = 1
    try:
        gateway, reason = _start(settings, host, port, verbose=verbose)
        started = _ray_processes()
        if reason is not None:
            sys.stderr.write(f"unime serve: {_line(reason)}\n")
            return status
        sys.stdout.write(f"Ready: http://{host}:{port}/v1\n")
        sys.stdout.flush()
        threading.Event().wait()
    except _Stopped:
        status = 0
    finally:
        _on_signal(signal.SIG_IGN)
        if ray.is_initialized():
            _shut_down(gateway, started, status)
    return status


def _shut_down(gateway: DeploymentHandle | None, started: list[psutil.Process], status: int) -> None:
    """Let running requests finish, and end what was started: the application, and Ray unless it is a cluster's."""
    import ray
    from ray import serve

    own = not os.environ.get("RAY_ADDRESS")
    if own:  # Ray waits without a limit for a process of its own that does not answer
        threading.Thread(target=_end_hard, args=(status,), daemon=True).start()
    if gateway is not None:
        with suppress(Exception):  # it may not run any longer
            gateway.drain.remote(_STOP_SECONDS).result(timeout_s=_STOP_SECONDS + 0.5)
    if own:  # one after the other, as Ray ends them, takes seconds
        _kill({*started, *_ray_processes()})
    else:
        serve.delete(_NAME)
    ray.shutdown()


def _end_hard(status: int) -> None:
    """Kill what is left of Ray after a while, and end this process."""
    time.sleep(_END_SECONDS)
    _kill(psutil.Process().children(recursive=True))
    os._exit(status)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def _ray_processes() -> list[psutil.Process]:
    """Replicas, proxy and controller: children of Ray's own processes, which a signal to the group ends first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.name().startswith("ray::"):
                found.append(process)
    return found


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _on_signal(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _checked_port(host: str, port: int) -> int:
    """The port, or a free one for 0; OSError if it is in use, which Ray would tell late and in many lines."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot listen at {host}:{port}: {error.strerror or error}. Choose another --port."
            ) from error
        return int(probe.getsockname()[1])


def _start(settings: ServeSettings, host: str, port: int, *, verbose: bool) -> tuple[DeploymentHandle, str | None]:
    """Start Ray, or join the cluster of ``RAY_ADDRESS``, and the deployments.

    Returns:
        tuple[DeploymentHandle, str | None]: The gateway, and why a model did not load.
    """
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from unime_st.serving.deployments import build

    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(level)
    options: dict[str, object] = {"address": os.environ.get("RAY_ADDRESS")}
    if options["address"] is None:
        cores = os.cpu_count() or 1
        options = {
            "address": "local",
            "num_cpus": max(cores, settings.num_models * (settings.max_replicas or settings.replicas)),
            "include_dashboard": False,
            "object_store_memory": max(_MIN_STORE, 2 * settings.max_bytes),
        }
    quiet = LoggingConfig(log_level=logging.getLevelName(level), enable_access_log=False)
    _start_ray(
        {"log_to_driver": verbose, "logging_level": level, **options},
        {
            "proxy_location": "HeadOnly",
            "http_options": {"host": host, "port": port, "keep_alive_timeout_s": 75},
            "logging_config": quiet,
        },
    )
    application = build(settings, graceful_seconds=_STOP_SECONDS)
    try:
        gateway = serve.run(application, name=_NAME, logging_config=quiet)
        return gateway, gateway.load_error.remote().result()
    except Exception as error:  # Ray raises many kinds, also a bare RuntimeError
        raise OSError(f"the models did not start: {_line(error)}") from error


def _start_ray(ray_options: dict[str, Any], serve_options: dict[str, Any]) -> None:
    """Start Ray and Ray Serve; again if one gives up, as Ray does after 30 and Ray Serve after 60 seconds."""
    import ray
    from ray import serve

    for attempts_left in (2, 1, 0):
        try:
            ray.init(**ray_options)
            _on_signal(_raise_stopped)  # Ray sets its own
            serve.start(**serve_options)
            return
        except Exception as error:  # Ray raises a bare Exception
            ray.shutdown()
            if not attempts_left:
                message = f"Ray Serve did not start: {_line(error)}. Try again when the machine is less busy."
                raise OSError(message) from error


def _line(text: object) -> str:
    """A text or error on one line."""
    return " ".join(str(text).split())
