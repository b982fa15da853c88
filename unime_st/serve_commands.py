"""Subcommands `unime serve` and `unime parity`: a model over HTTP, and whether a server gives the expected vectors."""

from __future__ import annotations

import argparse
import os
import sys

from unime_st.options import OptionError


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `unime serve`."""
    from unime_st.serving.settings import API_KEY_VARIABLE, ServeSettings

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "serve a model over HTTP on Ray Serve, in the shapes of OpenAI, vLLM, Jina and Cohere:\n"
        "POST /v1/embeddings, /v1/rerank, /v1/score, /search; GET /v1/models, /health, /metrics.\n"
        f"Clients send the bearer token of the environment variable {API_KEY_VARIABLE}, if it is set."
    )
    parser.epilog = (
        "example: unime serve unime-tiny --port 8000\n"
        "         curl localhost:8000/v1/embeddings -H 'Content-Type: application/json' -d '{\"input\": \"a red circle\"}'"
    )
    parser.add_argument("model", metavar="ALIAS_OR_FOLDER", help="embedding model, e.g. unime-v2")
    parser.add_argument("--reranker", metavar="MODEL", help="model of /v1/rerank and /v1/score")
    parser.add_argument(
        "--index", metavar="DIR", help="index of /search, written by `unime index` with the same model"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0 for a free one (default: 8000)")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="replicas of each model (default: 1)")
    parser.add_argument(
        "--max-replicas", type=int, metavar="N", help="replicas that Ray may start under load (default: --replicas)"
    )
    parser.add_argument(
        "--gpus-per-replica",
        type=float,
        metavar="N",
        help="GPUs of a replica, e.g. 0.5 (default: an equal share of what is there, at most 1)",
    )
    parser.add_argument("--device", help="device of the models, e.g. cpu or cuda (default: cuda if available)")
    parser.add_argument(
        "--max-body", type=float, default=32.0, metavar="MIB", help="largest request body in MiB (default: 32)"
    )
    for name, what in (
        ("max_pixels", "largest image in pixels"),
        ("max_items", "largest number of items in a request"),
        ("max_queue", "items that wait before 429 is sent"),
        ("read_timeout", "seconds for a body to arrive"),
        ("timeout", "seconds until a request is given up"),
    ):
        default = getattr(ServeSettings, name)
        kind, word = (int, "N") if isinstance(default, int) else (float, "S")
        parser.add_argument(
            _flag(name), type=kind, default=default, metavar=word, help=f"{what} (default: {default:.9g})"
        )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="largest number of tokens of an item (default: what the model takes)",
    )
    parser.add_argument(
        "--allow-urls",
        action="append",
        default=[],
        metavar="HOST",
        help="public host from which images are fetched; repeat it for several (default: none)",
    )


def _flag(name: str) -> str:
    """Option of a field of the settings."""
    return f"--{name.replace('_', '-')}"


def serve(options: argparse.Namespace) -> int:
    """Run the server."""
    from unime_st.paths import AliasError, find_model
    from unime_st.serving.server import run_server
    from unime_st.serving.settings import API_KEY_VARIABLE, MIB, ServeSettings, key_digest

    _check_numbers(options)
    token = os.environ.get(API_KEY_VARIABLE)
    if token is not None and not token.strip():
        raise OptionError(f"{API_KEY_VARIABLE} is empty: set it to a token, or unset it to serve without one")
    for name in filter(None, (options.model, options.reranker)):
        if find_model(name) is None:
            raise AliasError(f"Unknown model {name!r}: neither a folder nor the alias of a model on this machine.")
    if options.index is not None:
        from unime_st.data.manifest import read_manifest

        if (stage := read_manifest(options.index).get("stage")) != "index":
            raise ValueError(f"{options.index}: holds the stage {stage!r}, not an index")
    if token is None and options.host not in ("127.0.0.1", "localhost", "::1"):
        sys.stderr.write(
            f"unime serve: anybody who reaches {options.host} can use the models; set {API_KEY_VARIABLE}\n"
        )
    same = ("replicas", "max_replicas", "device", "max_pixels", "max_items", "max_tokens", "max_queue", "timeout")
    settings = ServeSettings(
        model=_absolute(options.model),
        reranker=None if options.reranker is None else _absolute(options.reranker),
        index=None if options.index is None else os.path.abspath(options.index),
        gpus=options.gpus_per_replica,
        threads=_threads(options.replicas),
        max_body=int(options.max_body * MIB),
        read_timeout=options.read_timeout,
        allow_urls=tuple(host.lower() for host in options.allow_urls),
        key_digest=None if token is None else key_digest(token.strip()),
        **{name: getattr(options, name) for name in same},
    )
    return run_server(settings, options.host, options.port, verbose=options.verbose)


def _check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers outside their range; OptionError."""
    for name in ("replicas", "max_replicas", "max_pixels", "max_items", "max_tokens", "max_queue"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise OptionError(f"{_flag(name)} must be at least 1, got {getattr(options, name)}")
    for name in ("max_body", "timeout", "read_timeout"):
        if not 0 < getattr(options, name) < float("inf"):
            raise OptionError(f"{_flag(name)} must be above 0, got {getattr(options, name)}")
    if options.gpus_per_replica is not None and not 0 <= options.gpus_per_replica < float("inf"):
        raise OptionError(f"--gpus-per-replica must be at least 0, got {options.gpus_per_replica}")
    if options.gpus_per_replica is not None and options.gpus_per_replica > 1 and options.gpus_per_replica % 1:
        raise OptionError(f"--gpus-per-replica above 1 must be a whole number, got {options.gpus_per_replica}")
    if options.max_replicas is not None and options.max_replicas < options.replicas:
        raise OptionError(f"--max-replicas {options.max_replicas} is below --replicas {options.replicas}")
    if not 0 <= options.port < 1 << 16:
        raise OptionError(f"--port must be between 0 and 65535, got {options.port}")


def _absolute(name: str) -> str:
    """A folder by its absolute path, because replicas run in other directories; an alias as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def _threads(replicas: int) -> int:
    """CPU threads of a replica: OMP_NUM_THREADS, which Ray would set to 1, or its share of the cores."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdigit() and int(named) else max(1, len(os.sched_getaffinity(0)) // replicas)


def parity_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `unime parity`."""
    parser.epilog = "example: unime parity http://localhost:8000/v1 --file exported/parity.json"
    parser.add_argument("target", metavar="FOLDER_OR_URL", help="exported folder, or server up to /v1")
    parser.add_argument("--file", metavar="FILE", help="parity file (default: parity.json in the folder)")
    parser.add_argument("--model", metavar="NAME", help="name of the model on the server (default: the first)")
    parser.add_argument(
        "--least", type=float, default=0.99999, metavar="COSINE", help="lowest cosine that passes (default: 0.99999)"
    )
    parser.add_argument("--device", help="device of the folder's model, e.g. cpu or cuda (default: cuda if available)")


def parity(options: argparse.Namespace) -> int:
    """Compare a folder or server with a parity file."""
    from unime_st.checkpoints.parity_check import check_parity

    if not -1 <= options.least <= 1:
        raise OptionError(f"--least must be between -1 and 1, got {options.least}")
    found = check_parity(options.target, options.file, model=options.model, device=options.device)
    for comparison in found:
        measure = "1 - difference" if comparison.kind == "pair" else "cosine"
        causes = f"  likely cause: {', '.join(comparison.causes) or 'none of the usual ones'}"
        passed = comparison.closeness >= options.least
        sys.stdout.write(f"{measure} {comparison.closeness:.6f}  {comparison.kind}{'' if passed else causes}\n")
    return 0 if all(comparison.closeness >= options.least for comparison in found) else 1
