"""A server for all tests of this folder, and the model, images and index that it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server_process import ITEMS, PIXELS, QUEUE, ServerProcess, start

from unime_st import UniME
from unime_st.data.scenes import write_example_images
from unime_st.retrieval import Index


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return list(write_example_images(tmp_path_factory.mktemp("images")))


@pytest.fixture(scope="session")
def model() -> UniME:
    return UniME("unime-tiny", device="cpu")


@pytest.fixture(scope="session")
def index(images: list[Path], model: UniME, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "index"
    Index.build(map(str, images), model, ids=[path.stem for path in images], folder=folder)
    return folder


@pytest.fixture(scope="session")
def running_server(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], ServerProcess]]:
    """The server of the session; a new one if a test has stopped it."""
    servers: list[ServerProcess] = []

    def running() -> ServerProcess:
        if not servers or servers[-1].process.poll() is not None:
            servers.append(start(
                tmp_path_factory.mktemp("server"), "unime-tiny", "--reranker", "unime-tiny", "--index", str(index),
                "--device", "cpu", "--max-body", "1", "--max-pixels", str(PIXELS), "--max-items", str(ITEMS),
                "--max-queue", str(QUEUE), "--read-timeout", "3", "--allow-urls", "127.0.0.1", "--allow-urls",
                "images.example",
            ))  # fmt: skip
        return servers[-1]

    yield running
    if servers and servers[-1].process.poll() is None:
        servers[-1].stop()


@pytest.fixture
def server(running_server: Callable[[], ServerProcess]) -> ServerProcess:
    return running_server()
