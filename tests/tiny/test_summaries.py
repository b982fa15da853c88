"""Reconstruction task: the answer depends on the item through its embedding alone, which is the embedder's."""

from __future__ import annotations

import random

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from train_scripts.tiny.collation import collate_summaries
from train_scripts.tiny.curriculum import draw_batch
from train_scripts.tiny.summaries import Summary, summary_loss
from unime_st import UniME
from unime_st.paths import PACKAGED


def _examples(count: int) -> list[Summary]:
    rng = random.Random(0)
    name, examples = draw_batch(rng, "summing_up", 0.5)
    while name != "sum_up":
        name, examples = draw_batch(rng, "summing_up", 0.5)
    return examples[:count]  # type: ignore[return-value]


def test_the_vector_is_the_embedding() -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(PACKAGED), AutoProcessor.from_pretrained(PACKAGED)
    examples = _examples(12)
    assert any(example.images for example in examples) and not all(example.images for example in examples)
    batch = collate_summaries(examples, processor)
    with torch.no_grad():
        hidden = model.model(**batch["items"]).last_hidden_state
    vectors = torch.nn.functional.normalize(hidden[torch.arange(12), batch["last"]], dim=-1)
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    inputs = [
        {"text": example.text.replace(placeholder, ""), "image": example.images[0]} if example.images else example.text
        for example in examples
    ]
    embedder = UniME("unime-tiny", device="cpu")
    expected = torch.stack([embedder.encode([value], convert_to_tensor=True)[0] for value in inputs])
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-4)


def test_the_item_reaches_the_answer_through_its_vector_alone() -> None:
    """Cut the gradient of the one vector, and no weight of the vision tower has any."""
    model, processor = AutoModelForImageTextToText.from_pretrained(PACKAGED), AutoProcessor.from_pretrained(PACKAGED)
    batch = collate_summaries([example for example in _examples(24) if example.images][:4], processor)
    loss, accuracy = summary_loss(model, batch)
    loss.backward()
    seen = [weight.grad for name, weight in model.named_parameters() if "visual" in name]
    assert 0 <= accuracy <= 1 and all(grad is not None and grad.abs().sum() > 0 for grad in seen)

    model.zero_grad()
    last = batch["last"]

    def cut(module: object, arguments: object, output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] != batch["items"]["input_ids"].shape[1]:
            return output  # the second pass, which answers
        mask = torch.ones(output.shape[:2], dtype=torch.bool)
        mask[torch.arange(len(last)), last] = False
        return torch.where(mask[..., None], output, output.detach())

    hook = model.model.language_model.norm.register_forward_hook(cut)
    summary_loss(model, batch)[0].backward()
    hook.remove()
    assert all(w.grad is None or not w.grad.any() for name, w in model.named_parameters() if "visual" in name)
