"""Collation of the pre-training examples: judgements packed into one row equal unpacked ones."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from train_scripts.tiny.collation import collate
from train_scripts.tiny.curriculum import CURRICULA, Example, draw_batch
from unime_st.paths import PACKAGED

IMAGE = "<|vision_start|>"


def _alone(example: Example) -> list[Example]:
    """Every judgement of a packed example as an ordinary prompt."""
    first = example.prefix.count(IMAGE)
    shared, rest = example.images[:first], example.images[first:]
    found = []
    for text, answer in example.turns:
        own, rest = rest[: text.count(IMAGE)], rest[text.count(IMAGE) :]
        found.append(Example([*shared, *own], [(example.prefix + text, answer)]))
    return found


@pytest.mark.parametrize("task", sorted(name for name in CURRICULA["deciding"] if name.startswith("decide")))
@pytest.mark.slow
def test_packed_judgements_attend_to_the_prefix_only(task: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(PACKAGED).eval()
    processor = AutoProcessor.from_pretrained(PACKAGED)
    rng = random.Random(task)
    name, examples = draw_batch(rng, "deciding", 0.5)
    while name != task:
        name, examples = draw_batch(rng, "deciding", 0.5)
    batch = collate(examples[:2], processor)
    labels = batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch).logits
    for row, example in enumerate(examples[:2]):
        assert isinstance(example, Example)
        answered = (labels[row] != -100).nonzero()[:, 0].tolist()[::2]  # the word; its end follows
        assert len(answered) == len(example.turns)
        for position, single in zip(answered, _alone(example)):
            # Without positions and mask of ours: the model numbers the tokens itself.
            plain = {
                key: value
                for key, value in collate([single], processor).items()
                if key not in ("labels", "position_ids", "attention_mask")
            }
            with torch.no_grad():
                alone = model(**plain, attention_mask=torch.ones_like(plain["input_ids"])).logits
            # The last two labels are the word and the end of the turn: the word is read one position before its own.
            torch.testing.assert_close(packed[row, position - 1], alone[0, -3], atol=1e-4, rtol=1e-4)
