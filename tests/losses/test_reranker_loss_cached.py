"""RerankerLoss with gradient caching and on two processes equals the plain loss on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import reranker_worker as worker
import tiny_reranker as tiny
import torch
from safetensors.torch import load_file

from tests.programs import run_ranks
from unime_st import Item, UniMEReranker
from unime_st.losses import RerankerLoss


@pytest.fixture(scope="module")
def model(reranker_folder: str) -> UniMEReranker:
    return UniMEReranker(reranker_folder, device="cpu")


def with_dropout(folder: str, rate: float) -> UniMEReranker:
    model = UniMEReranker(folder, device="cpu")
    for layer in model[0].model.model.language_model.layers:
        layer.self_attn.attention_dropout = rate
    return model.train()


def computed(loss: RerankerLoss) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Values and gradients; the factor stands for the loss scaling of a trainer."""
    torch.manual_seed(0)
    parts = loss(worker.rows(4), worker.scores(4))
    (3.0 * worker.summed(parts)).backward()
    return {name: part.item() for name, part in parts.items()}, worker.gradients(loss.model)


def assert_alike(left: tuple[dict, dict], right: tuple[dict, dict]) -> None:
    assert left[0] == pytest.approx(right[0], rel=1e-5)
    assert left[1].keys() == right[1].keys()
    assert max((left[1][name] - right[1][name]).abs().max() for name in left[1]) < 2e-5
    assert max(gradient.abs().max() for gradient in left[1].values()) > 1e-2


@pytest.mark.parametrize("mini_batch_size", [1, 3, 100])
def test_cached_gradient_is_the_plain_one(reranker_folder: str, mini_batch_size: int):
    plain, cached = (
        computed(RerankerLoss(with_dropout(reranker_folder, 0.0), 0.7, 1.3, mini_batch_size=size))
        for size in (None, mini_batch_size)
    )
    assert_alike(plain, cached)


def test_cached_dropout_is_replayed(reranker_folder: str):
    """The second pass draws the masks of the first: it equals a plain pass prompt by prompt."""
    cached = computed(RerankerLoss(with_dropout(reranker_folder, 0.3), mini_batch_size=1))
    loss = RerankerLoss(with_dropout(reranker_folder, 0.3))
    whole = loss._logits
    loss._logits = lambda column, begin, end: torch.cat(  # type: ignore[method-assign]
        [whole(column, row, row + 1) for row in range(begin, end)]
    )
    assert_alike(computed(loss), cached)


def test_images_are_decoded_for_their_mini_batch_only(model: UniMEReranker, monkeypatch: pytest.MonkeyPatch):
    opened: list[int] = []
    original = Item.to_input
    monkeypatch.setattr(Item, "to_input", lambda self: opened.append(1) or original(self))
    per_forward = []
    hook = model[0].register_forward_pre_hook(lambda *_: per_forward.append(len(opened)) or opened.clear())
    columns = [[Item(image=tiny.png(4 * index + row)) for row in range(4)] for index in range(4)]
    RerankerLoss(model, mini_batch_size=1)(columns)
    hook.remove()
    assert max(per_forward) == 4  # a query and three candidates, of 4 rows


def test_evaluation_needs_no_graph(model: UniMEReranker):
    for size in (None, 2):
        with torch.no_grad():
            parts = RerankerLoss(model, mini_batch_size=size)(worker.rows(3))
        assert not worker.summed(parts).requires_grad and torch.isfinite(worker.summed(parts))


@pytest.mark.distributed
def test_two_processes_equal_one(reranker_folder: str, model: UniMEReranker, tmp_path: Path):
    run_ranks(worker.train_on_half, reranker_folder, str(tmp_path))
    results = load_file(tmp_path / "results.safetensors")
    single = UniMEReranker(reranker_folder, device="cpu")
    torch.manual_seed(11)
    parts = RerankerLoss(single)(worker.rows(6), worker.scores(6))
    worker.summed(parts).backward()
    expected = worker.gradients(single)
    for mode in ("plain", "cached"):
        assert torch.allclose(
            results[f"{mode}/values"], torch.stack([part.detach() for part in parts.values()]), rtol=1e-5
        ), mode
        assert max((results[f"{mode}/{name}"] - expected[name]).abs().max() for name in expected) < 1e-5, mode
