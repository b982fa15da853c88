"""What the embedded default learns from: judgements packed into one row are those that stand alone."""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from train_scripts.tiny.collation import collate
from train_scripts.tiny.curriculum import CURRICULA, Example, draw_batch

FOLDER = Path(str(resources.files("unime_st"))) / "tiny" / "model"
PICTURE = "<|vision_start|>"


def _alone(example: Example) -> list[Example]:
    """Every judgement of a packed example as an ordinary prompt."""
    first = example.beginning.count(PICTURE)
    shared, rest = example.images[:first], example.images[first:]
    found = []
    for said, answer in example.turns:
        own, rest = rest[: said.count(PICTURE)], rest[said.count(PICTURE) :]
        found.append(Example([*shared, *own], [(example.beginning + said, answer)]))
    return found


@pytest.mark.parametrize("lesson", sorted(name for name in CURRICULA["deciding"] if name.startswith("decide")))
def test_packed_judgements_see_the_beginning_only(lesson: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(FOLDER).eval()
    processor = AutoProcessor.from_pretrained(FOLDER)
    rng = random.Random(lesson)
    name, examples = draw_batch(rng, "deciding", 0.5)
    while name != lesson:
        name, examples = draw_batch(rng, "deciding", 0.5)
    batch = collate(examples[:2], processor)
    labels = batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch).logits
    for row, example in enumerate(examples[:2]):
        answered = (labels[row] != -100).nonzero()[:, 0].tolist()[::2]  # the word; its end follows
        assert len(answered) == len(example.turns)
        for place, single in zip(answered, _alone(example)):
            # Without positions and mask of ours: the model numbers the tokens itself.
            plain = {
                key: value
                for key, value in collate([single], processor).items()
                if key not in ("labels", "position_ids", "attention_mask")
            }
            with torch.no_grad():
                alone = model(**plain, attention_mask=torch.ones_like(plain["input_ids"])).logits
            # The last two labels are the word and the end of the turn: the word is read one place before its own.
            torch.testing.assert_close(packed[row, place - 1], alone[0, -3], atol=1e-4, rtol=1e-4)
