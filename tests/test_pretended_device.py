"""Every engine path on a pretended CUDA device: no operator mixes devices, and values equal those of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretended_devices import MixedDevicesError, on_both, pretended_devices
from tiny_pairs import ITEMS

from mteb_tasks import TwoStage, evaluate, wrap
from mteb_tasks.scenes import ScenesCompositional, ScenesVQA
from unime_st import Item, UniME, UniMEReranker
from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records
from unime_st.encoding import encode_items, encode_to_shards
from unime_st.encoding.list_inputs import encode_list
from unime_st.judging import CascadeJudge, Group, LocalJudge
from unime_st.reranking import search
from unime_st.retrieval import Index, mine, top_k

CLIPS = [
    [Image.fromarray(frame) for frame in np.random.default_rng(seed).integers(0, 255, (3, 40, 56, 3), dtype=np.uint8)]
    for seed in range(2)
]
VIDEOS = [Item(text, video=clip) for text in ("a red circle", "blue") for clip in CLIPS]


@pytest.fixture
def cuda() -> Iterator[str]:
    """A pretended device, for as long as a test runs."""
    with pretended_devices(2):
        yield "cuda"


MIXED: dict[str, Callable[[], object]] = {
    "operator": lambda: torch.ones(2, device="cuda") + torch.ones(2),
    "two cards": lambda: torch.ones((), device="cuda:0") + torch.ones((), device="cuda:1"),
    "layer": lambda: torch.nn.Linear(2, 2).to("cuda")(torch.ones(1, 2)),
    "indices": lambda: torch.ones(2)[torch.tensor([0], device="cuda")],
    "scalars": lambda: torch.stack([torch.ones((), device="cuda"), torch.ones(())]),
    "in place": lambda: torch.zeros(2).add_(torch.ones(2, device="cuda")),
    "numpy": lambda: torch.ones(2, device="cuda").numpy(),
    "array": lambda: np.asarray(torch.ones(2, device="cuda")),
    "pinning": lambda: torch.ones(2, device="cuda").pin_memory(),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_devices_raise(cuda: str, name: str) -> None:
    with pytest.raises((MixedDevicesError, TypeError), match="cuda:"):
        MIXED[name]()


def test_mixed_devices_raise_in_a_backward_pass(cuda: str) -> None:
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.full((2,), 2.0)  # on the CPU

    weight = torch.ones(2, device="cuda", requires_grad=True)
    with pytest.raises(MixedDevicesError, match=r"mul: expected all tensors .* cpu \(2,\)"):
        Careless.apply(weight).sum().backward()


def test_what_a_card_takes_is_taken(cuda: str) -> None:
    """Scalars and indices from the CPU; gradients come back across a copy to the device."""
    values = torch.arange(3.0, device=cuda, requires_grad=True)
    assert (values * torch.tensor(2.0))[torch.tensor([0, 2])].device == torch.device("cuda:0")
    start = torch.ones(3, requires_grad=True)
    (start.to(values) * values).cpu().sum().backward()
    assert start.grad is not None and start.grad.tolist() == [0, 1, 2]
    assert (start.grad.device.type, values.grad.device.type) == ("cpu", "cuda")
    assert [part.device.type for part in (torch.empty(2), values.new_tensor([1]), torch.zeros_like(values))] == [
        "cpu",
        "cuda",
        "cuda",
    ]


def test_nothing_stays_pretended() -> None:
    before = torch.Tensor.to, torch.cuda.is_available()
    with pretended_devices():
        assert torch.cuda.is_available() and torch.Tensor.to is not before[0]
    assert (torch.Tensor.to, torch.cuda.is_available()) == before and torch.ones(1).device.type == "cpu"


@pytest.mark.slow
def test_encoding(tmp_path: Path) -> None:
    items = [*ITEMS, *VIDEOS, ITEMS[0], *(Item(f"text {number}") for number in range(70))]

    def run(device: str) -> list[np.ndarray]:
        model = UniME("unime-tiny", device=device)
        assert model.device.type == device
        tensors = model.encode(items[:4], convert_to_tensor=True)
        assert tensors.device.type == device
        broken = encode_items(model, [*items[:3], Item(image=b"no image")], on_error="skip")
        shards = encode_to_shards(model, items[:9], tmp_path / device, dtype="float16", show_progress_bar=False)
        return [
            model.encode(items, prompt="find: "),
            model.encode(items[0], truncate_dim=32),
            tensors.cpu().numpy(),
            encode_list(model, items, packed=True).cpu().numpy(),
            encode_items(model, items, truncate_dim=64, token_budget=300),
            *broken,
            np.stack([shards[row] for row in range(len(shards))]).astype(np.float32),
        ]

    on_both(run, 1e-3)


def test_several_devices() -> None:
    items = [*ITEMS, *VIDEOS]

    def run(device: str) -> np.ndarray:
        several = [device] if device == "cpu" else ["cuda:0", "cuda:1"]
        return encode_items(UniME("unime-tiny", device=device), items, device=several, token_budget=200)

    on_both(run, count=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision(dtype: str) -> None:
    """On a CPU such a model computes in float32; on a device as it is."""

    def run(device: str) -> np.ndarray:
        return UniME("unime-tiny", device=device, model_kwargs={"dtype": dtype}).encode(ITEMS)

    on_both(run, 3e-2)


@pytest.mark.slow
def test_judges_and_rerankers() -> None:
    items = [*ITEMS, *VIDEOS]

    def run(device: str) -> list[np.ndarray]:
        judge = LocalJudge("unime-tiny", template="tiny", device=device, batch_size=4, pair_order="both")
        strong = LocalJudge("unime-tiny", template="tiny", device=device, pair_order="candidate_first")
        reranker = UniMEReranker("unime-tiny", template="tiny", device=device)
        groups = [Group(query, items) for query in (items[0], items[3], VIDEOS[0])]
        scores = judge.score(groups) + CascadeJudge(judge, strong, band=(-1.0, 1.0)).score(groups)
        for method in ("pairwise", "listwise", "hybrid"):
            ranking = reranker.rank(items[0], items, method=method)
            scores.append(np.array([[entry["corpus_id"], entry["score"]] for entry in ranking]))
        scores.append(reranker.listwise_scores(items[0], items[:4], permutations=2))
        scores.append(reranker.predict([(items[0], items[3]), (items[4], items[1])]))
        return scores

    on_both(run, 1e-4)


@pytest.mark.slow
def test_two_stage_search_and_index(tmp_path: Path) -> None:
    corpus = [*ITEMS, *VIDEOS, *(Item(text) for text in ("a red circle", "a blue star", "two green rings"))]

    def run(device: str) -> list[np.ndarray]:
        embedder = UniME("unime-tiny", device=device)
        reranker = UniMEReranker("unime-tiny", template="tiny", device=device)
        found = []
        for method in ("pairwise", "listwise", "hybrid"):
            rows = search(["a red circle", ITEMS[3]], corpus, embedder, reranker, top_k=4, method=method)
            found.append(np.array([[entry["corpus_id"], entry["score"]] for row in rows for entry in row]))
        index = Index.build(corpus, embedder)
        found.append(np.array([[hit.score for hit in row] for row in index.search(["a red circle"], k=3)]))
        return found

    on_both(run, 1e-4)


@pytest.mark.slow
def test_top_k_and_mining(tmp_path: Path) -> None:
    records = RecordSet.write(tmp_path / "records", training_records(24), {})
    vectors = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float16)
    vectors[100:160] = vectors[0]  # float32 cannot prove the order: searched again in float64

    def run(device: str) -> list[np.ndarray]:
        scores, indices = top_k(vectors[:50], vectors, 7, exclude=[[row] for row in range(50)], device=device)
        assert top_k(vectors[:3], vectors, 2, max_similarity=3.0, device=device)[0].max() < 3.0
        pools = mine(records, UniME("unime-tiny", device=device), tmp_path / device, num_candidates=5, device=device)
        return [scores, indices, np.array([value for pool in pools for value in pool.similarities])]

    on_both(run, 1e-3)


@pytest.mark.slow
def test_mteb_loader() -> None:
    def run(device: str) -> list[float]:
        wrapped = wrap(UniME("unime-tiny", device=device))
        reranker = UniMEReranker("unime-tiny", template="tiny", device=device)
        alone = evaluate(wrapped, [ScenesVQA(size=6), ScenesCompositional(size=2)])
        both = evaluate(TwoStage(wrapped, reranker, top_k=3), [ScenesVQA(size=6)])
        return [
            float(scores["main_score"])
            for found in (alone, both)
            for task in found.values()
            for scores in task.values()
        ]

    on_both(run)
