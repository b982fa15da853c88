"""The additions that docs/architecture.md describes, used: a backbone, a loss, a task, a judge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mteb
import pytest
import torch
from sentence_transformers import SentenceTransformer

from mteb_tasks import wrap
from unime_st.data import Item, PairRecord, RecordSet
from unime_st.judging.judge_pools import judge_pools
from unime_st.recipes.bare import BARE
from unime_st.retrieval import mine

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def added() -> dict[str, Any]:
    """Names that the blocks of the page define."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unime_st.recipes.bare.BARE", dict(BARE))
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(block, names)
    return names


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return SentenceTransformer("unime-tiny", device="cpu")


def test_backbone(added: dict[str, Any]) -> None:
    assert added["BARE"]["my-vl"].family == "qwen2_vl"


def test_loss_is_cached_without_further_code(added: dict[str, Any], model: SentenceTransformer) -> None:
    texts = [["a red star", "a blue ring"], ["red", "blue"], ["green", "yellow"]]
    found = []
    for mini_batch_size in (None, 1):
        model.zero_grad()
        loss = added["TripletMarginLoss"](model, mini_batch_size=mini_batch_size)
        value = loss([model.preprocess(column) for column in texts], None)
        value.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((value.item(), gradient))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6) and found[0][0] > 0
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


def test_task(added: dict[str, Any], model: SentenceTransformer) -> None:
    result = mteb.evaluate(wrap(model), added["NamedColors"](), cache=None)
    assert result.task_results[0].get_score() == 1.0


def test_judge(added: dict[str, Any], model: SentenceTransformer, tmp_path: Path) -> None:
    pairs = [PairRecord(Item(f"a {color} ring"), Item(f"the ring is {color}")) for color in ("red", "blue", "green")]
    records = RecordSet.write(tmp_path / "records", pairs, {})
    pools = mine(records, model, tmp_path / "pools", num_candidates=2, max_similarity=None)
    scores = judge_pools(pools, added["WordOverlapJudge"](), tmp_path / "scores")
    assert [row.positive_logit for row in scores] == [0.5] * 3
    assert all(logit == -0.5 for row in scores for logit in row.logits)
