"""Judges and rerankers on videos: equal to the model's own forward, in every method; families without are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from unime_st import Item, UniMEReranker
from unime_st.judging import Group, LocalJudge, PairError


def clip(count: int, seed: int = 0, size: tuple[int, int] = (40, 56)) -> list[Image.Image]:
    values = np.random.default_rng(seed).integers(0, 255, (count, *size, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in values]


QUERIES = [Item("a red circle", video=clip(3)), Item("a red circle")]
DOCUMENTS = [
    Item("a"),
    Item("b", video=clip(2, seed=1)),
    Item("c", image=clip(1)[0]),
    Item(video=clip(4, 2, (56, 30))),
]


def test_judge_and_reranker_give_the_models_own_scores() -> None:
    judge = LocalJudge("unime-tiny", template="tiny", device="cpu")
    reranker = UniMEReranker("unime-tiny", template="tiny", device="cpu")
    scores = judge.score([Group(query, DOCUMENTS) for query in QUERIES])
    for query, found in zip(QUERIES, scores, strict=True):
        pairs = [(query, document) for document in DOCUMENTS]
        assert np.abs(reranker.predict(pairs, activation_fn=torch.nn.Identity()) - found).max() < 1e-4
        best = DOCUMENTS.index(DOCUMENTS[int(found.argmax())])
        for method in ("pairwise", "listwise", "hybrid"):
            ranking = reranker.rank(query, DOCUMENTS, method=method)
            assert sorted(entry["corpus_id"] for entry in ranking) == [0, 1, 2, 3]
            assert method != "pairwise" or ranking[0]["corpus_id"] == best
    colors = [Image.new("RGB", (56, 40), color) for color in ("red", "green", "blue")]
    turns = [Group(Item("a red circle", video=frames), DOCUMENTS) for frames in (colors, colors[::-1])]
    forwards, backwards = judge.score(turns)
    assert np.abs(backwards - forwards).min() > 1e-3
    tokens, unshared = judge.count_tokens([Group(query, DOCUMENTS) for query in QUERIES])
    assert 400 < tokens < unshared


def test_a_template_without_a_slot_is_refused_by_name() -> None:
    judge = LocalJudge("unime-tiny", template="tiny", device="cpu")
    template = judge.scorer.whole_prompts.template.replace("video", "audio")
    judge.scorer.whole_prompts.template = template
    errors: list[PairError] = []
    (scores,) = judge.score([Group("a", DOCUMENTS)], errors=errors)
    assert np.isnan(scores).tolist() == [False, True, False, True]
    assert all("takes no video: use one of the families Qwen2-VL" in error.reason for error in errors)
    with pytest.raises(ValueError, match=r"candidate 1: this model .* takes no video"):
        judge.score([Group("a", DOCUMENTS)])
