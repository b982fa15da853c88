"""Models of every family survive pickle and deepcopy, before their first image and after it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

NAMES = ("unime-v2", "unime-v1-llava1.6", "unime-v1-phi3.5", "unime-v2-2b", "llava-1.6", "llava-onevision", "smolvlm")
OTHER_PROCESS = """
import pickle, sys
from pathlib import Path
import numpy as np
import unime_st
for path in Path(sys.argv[1]).glob("*.pickle"):
    model, inputs = pickle.loads(path.read_bytes())
    np.save(path.with_suffix(".npy"), np.concatenate([model.encode([item]) for item in inputs]))
"""


def inputs() -> list[dict[str, object]]:
    return [{"text": "a b"}, {"image": Image.linear_gradient("L").convert("RGB").resize((90, 60)), "text": "c"}]


@pytest.mark.slow
def test_pickled_models_embed_alike_in_another_process(converted: Callable[[str], Path], tmp_path: Path) -> None:
    expected = {}
    for name in NAMES:
        model = SentenceTransformer(str(converted(name)), device="cpu")
        (tmp_path / f"{name}-before.pickle").write_bytes(pickle.dumps((model, inputs())))
        expected[name] = np.concatenate([model.encode([item]) for item in inputs()])
        (tmp_path / f"{name}-after.pickle").write_bytes(pickle.dumps((model, inputs())))
        twin = copy.deepcopy(model)
        assert np.array_equal(np.concatenate([twin.encode([item]) for item in inputs()]), expected[name]), name
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, str(tmp_path)], check=True)
    for name in NAMES:
        for when in ("before", "after"):
            assert np.array_equal(np.load(tmp_path / f"{name}-{when}.npy"), expected[name]), f"{name} {when}"
