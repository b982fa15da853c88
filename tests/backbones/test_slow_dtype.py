"""Images in 16 bits on a CPU: one warning, at the first image."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from transformers import Qwen2VLModel
from transformers.utils import logging

from unime_st.backbones.qwen import UniMEQwen2VLModel
from unime_st.checkpoints.checks import sample_image


@pytest.mark.parametrize("name", ["unime-v2-2b", "unime-v2", "unime-v1-phi3.5"])
def test_the_first_image_warns_once(
    converted: Callable[[str], Path], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    logging.warning_once.cache_clear()
    exact = SentenceTransformer(str(converted(name)), device="cpu")
    exact.encode([sample_image(60, 60)])
    model = SentenceTransformer(str(converted(name)), device="cpu", model_kwargs={"dtype": "bfloat16"})
    model.encode(["a text"])
    assert "on a CPU take" not in caplog.text
    for _ in range(2):
        model.encode([sample_image(60, 60)])
    assert caplog.text.count("Images in bfloat16 on a CPU take up to 7 times as long as in float32") == 1


def test_signatures_stay() -> None:
    assert signature(UniMEQwen2VLModel.get_image_features) == signature(Qwen2VLModel.get_image_features)
