"""A tiny generative checkpoint and the judge made of it."""

from __future__ import annotations

import pytest
import tiny_reranker as tiny

from unime_st.judging import LocalJudge


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bare Qwen2-VL checkpoint."""
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny-judge"))


@pytest.fixture(scope="session")
def judge(folder: str) -> LocalJudge:
    """The checkpoint with the official prompt."""
    return LocalJudge(folder, batch_size=4, device="cpu")
