"""Every family of models: what shares its beginning scores like the model's own forward, pair by pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_reranker as tiny
import torch
from sentence_transformers.util import batch_to_device
from tiny_pairs import ITEMS

from unime_st.judging import Group, LocalJudge
from unime_st.scoring.loading import load_cross_encoder
from unime_st.scoring.prompts import conversation

GROUPS = [Group(ITEMS[query], [item for item in ITEMS if item is not ITEMS[query]]) for query in (0, 3, 6)]
GROUPS.append(Group(ITEMS[1], ITEMS[4:5]))
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}\n{% endfor %}Does it? "
)
PLACEHOLDERS = {
    "internvl3": "<IMG_CONTEXT>",
    "llava": "<image>",
    "smol": "<image>",
    "qwen": "<|vision_start|><|image_pad|><|vision_end|>",
}
BACKWARDS = (
    "{% for m in messages | reverse %}{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %} and {% endfor %}"
)


@torch.inference_mode()
def pair_by_pair(judge: LocalJudge, groups: list[Group], *, backwards: bool = False) -> list[np.ndarray]:
    """Log-odds of the model's own forward on what the processor makes of one conversation at a time."""
    transformer, head = judge.model[0], judge.model[-1]
    found = []
    for group in groups:
        scores = []
        for item in group.candidates:
            messages = conversation(group.query, [item])
            options = {"image": judge.scorer.whole_prompts.image_options, "text": {"truncation": False}}
            options["chat_template"] = {"chat_template": judge.scorer.whole_prompts.template}
            features = transformer.preprocess([messages[::-1] if backwards else messages], processing_kwargs=options)
            logits = transformer(batch_to_device(features, "cpu"))["causal_logits"][0, -1].float()
            scores.append(float(logits[head.true_token_id] - logits[head.false_token_id]))
        found.append(np.array(scores))
    return found


def difference(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    "family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl3", "llava-onevision", "llava-1.6", "smolvlm"]
)
def test_shared_beginning(family: str, checkpoint: Callable[[str], Path]):
    template = TEMPLATE.replace("IMAGE", next(text for key, text in PLACEHOLDERS.items() if family.startswith(key)))
    judge = LocalJudge(checkpoint(family), template=template, batch_size=5, device="cpu")
    assert judge.scorer.obstacle is None
    found = judge.score(GROUPS)
    assert difference(found, pair_by_pair(judge, GROUPS)) < 1e-4
    assert np.ptp(found[0]) > 0.05  # else the comparison would say little


class Capped(torch.nn.Module):
    """A head of another kind, as Gemma's: its logits stay within bounds."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(self.head(hidden) / 3)


def test_a_model_that_cannot_share_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = load_cross_encoder(tiny.checkpoint(tmp_path), device="cpu")
    model[0].model.lm_head = Capped(model[0].model.lm_head)
    judge = LocalJudge(model, batch_size=3)
    assert "no linear language-model head" in judge.scorer.obstacle and "by itself" in caplog.text
    assert difference(judge.score(GROUPS[:2]), pair_by_pair(judge, GROUPS[:2])) < 1e-4


def test_a_model_that_reads_images_in_its_own_way_is_found_out(tmp_path: Path):
    model = load_cross_encoder(tiny.checkpoint(tmp_path), device="cpu")

    def nudge(module: torch.nn.Module, args: tuple, out: Any) -> None:
        out.last_hidden_state[..., 0] += 3

    model[0].model.model.register_forward_hook(nudge)
    judge = LocalJudge(model, batch_size=3)
    assert "made-up query" in judge.scorer.obstacle
    assert difference(judge.score(GROUPS[:2]), pair_by_pair(judge, GROUPS[:2])) < 1e-4


def test_a_template_that_shows_the_candidate_first(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    judge = LocalJudge(tiny.checkpoint(tmp_path), template=BACKWARDS, batch_size=5, device="cpu")
    assert "candidate before the query" in caplog.text
    assert difference(judge.score(GROUPS), pair_by_pair(judge, GROUPS, backwards=True)) < 1e-4
