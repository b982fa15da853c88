"""Collation of the pre-training examples: judgements packed into one row equal unpacked ones."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from train_scripts.tiny import telling_apart
from train_scripts.tiny.collation import collate
from train_scripts.tiny.curriculum import CURRICULA, draw_batch
from train_scripts.tiny.telling_apart import Example
from unime_st.data.items import Item
from unime_st.data.scenes.contrast import scene_image
from unime_st.data.scenes.language import long_caption, short_caption
from unime_st.data.scenes.world import Description, Scene
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


PACKED = [
    (curriculum, task)
    for curriculum, prefix in (("deciding", "decide"), ("telling_apart", "tell"), ("near_twins", "tell_twins"))
    for task in CURRICULA[curriculum]
    if task.startswith(prefix)
]


@pytest.mark.parametrize(("curriculum", "task"), PACKED)
@pytest.mark.slow
def test_packed_judgements_attend_to_the_prefix_only(curriculum: str, task: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(PACKAGED).eval()
    processor = AutoProcessor.from_pretrained(PACKAGED)
    rng = random.Random(task)
    name, examples = draw_batch(rng, curriculum, 0.5)
    while name != task:
        name, examples = draw_batch(rng, curriculum, 0.5)
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


def test_answers_about_captions_are_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each caption of a near-twin was worded from a description that is true of the image, or false of it."""
    described: dict[str, Description] = {}
    shown: list[Scene] = []

    def worded(description: Description, rng: random.Random) -> str:
        text = short_caption(description, rng)
        described[text] = description
        return text

    def drawn(scene: Scene, rng: random.Random) -> Item:
        shown.append(scene)
        return scene_image(scene, rng)

    monkeypatch.setattr(telling_apart, "short_caption", worded)
    monkeypatch.setattr(telling_apart, "scene_image", drawn)
    rng = random.Random(0)
    answers = []
    for tell in (telling_apart.tell_twins, telling_apart.tell_captions):
        for _ in range(40):
            described.clear()
            example = tell(rng)
            assert example.prefix.count(IMAGE) == len(example.images) == 1
            for text, answer in example.turns:
                caption = text.removeprefix("Candidate:").split("<|im_end|>")[0]
                if caption in described:
                    assert described[caption].true_of(shown[-1]) == (answer == "Yes")
                answers.append(answer)
    assert set(answers) == {"Yes", "No"} and 0.35 < answers.count("Yes") / len(answers) < 0.65


def test_long_captions_are_of_the_image_or_of_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Scene] = []
    shown: list[Scene] = []
    monkeypatch.setattr(
        telling_apart, "long_caption", lambda scene, rng: told.append(scene) or long_caption(scene, rng)
    )
    monkeypatch.setattr(
        telling_apart, "scene_image", lambda scene, rng: shown.append(scene) or scene_image(scene, rng)
    )
    answers = [answer for number in range(40) for _, answer in telling_apart.tell_long(random.Random(number)).turns]
    assert [answer == "Yes" for answer in answers] == [
        scene == shown[number // 3] for number, scene in enumerate(told)
    ]
    assert 0.3 < answers.count("Yes") / len(answers) < 0.7
