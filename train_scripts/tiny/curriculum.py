"""What the embedded default learns as a language model: describing, answering, judging pairs, choosing from a list."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from train_scripts.tiny.summaries import TURN, Summary, draw_summary, listed, written
from unime_st.data.scenes.contrast import (
    INSTRUCTIONS,
    contrastive_record,
    crop,
    sample_grounding_target,
    sample_scene_for,
    scene_image,
    with_instruction,
    wrong_crop,
)
from unime_st.data.scenes.language import (
    all_answers,
    long_caption,
    sample_edit,
    sample_question,
    short_caption,
)
from unime_st.data.scenes.scene_pairs import TRAINING_MIX
from unime_st.data.scenes.world import Description, Scene, describe, sample_scene

# Name of a curriculum -> kind of lesson -> (share of the batches, examples per batch). It learns to see first.
CURRICULA = {
    "seeing": {
        "list": (0.15, 64),
        "describe": (0.10, 64),
        "describe_long": (0.05, 24),
        "answer": (0.25, 48),
        "judge": (0.35, 72),
        "judge_long": (0.05, 32),
        "choose": (0.05, 24),
    },
    "judging": {
        "list": (0.04, 64),
        "describe": (0.05, 64),
        "describe_long": (0.05, 24),
        "answer": (0.11, 48),
        "judge_texts": (0.45, 40),
        "judge": (0.20, 64),
        "judge_long": (0.05, 32),
        "choose": (0.05, 24),
    },
    "comparing": {
        "describe": (0.04, 64),
        "describe_long": (0.04, 24),
        "answer": (0.10, 48),
        "judge_texts": (0.22, 40),
        "judge_pictures": (0.50, 32),
        "judge_long": (0.05, 32),
        "choose": (0.05, 24),
    },
    "refining": {
        "describe": (0.03, 64),
        "describe_long": (0.03, 24),
        "answer": (0.10, 48),
        "judge_texts": (0.24, 40),
        "judge_pictures": (0.27, 32),
        "judge_long_pictures": (0.12, 24),
        "judge_edits": (0.11, 32),
        "judge_long": (0.05, 32),
        "choose": (0.05, 24),
    },
    "deciding": {
        "describe": (0.03, 64),
        "describe_long": (0.03, 24),
        "answer": (0.08, 48),
        "decide_texts": (0.37, 40),
        "decide_pictures": (0.26, 32),
        "decide_long_pictures": (0.05, 20),
        "decide_edits": (0.08, 28),
        "judge_long": (0.05, 32),
        "choose": (0.05, 24),
    },
    "summing_up": {
        "sum_up": (0.65, 64),
        "describe": (0.01, 64),
        "describe_long": (0.01, 24),
        "answer": (0.03, 48),
        "decide_texts": (0.13, 40),
        "decide_pictures": (0.09, 32),
        "decide_long_pictures": (0.02, 20),
        "decide_edits": (0.03, 28),
        "judge_long": (0.015, 32),
        "choose": (0.015, 24),
    },
}
_LONG = {kind: share for kind, share in TRAINING_MIX.items() if kind.startswith("long")}
_SHORT = {kind: share for kind, share in TRAINING_MIX.items() if kind not in _LONG}
_TEXTS = {"short_i2t": 0.5, "vqa": 0.4, "classification": 0.1}


@dataclass
class Example:
    """Pictures and alternating pieces of text: (what is said, what has to be answered).

    After a ``beginning``, every turn goes on from the beginning alone and sees no other turn.
    """

    images: list[Image.Image]
    turns: list[tuple[str, str]]
    beginning: str = ""


def _list(rng: random.Random, counts: tuple[int, ...]) -> Example:
    """Every object in reading order: the densest lesson, from which seeing is learnt first."""
    scene = sample_scene(rng, "train", counts)
    images: list[Image.Image] = []
    said = written(scene_image(scene, rng), images)
    return Example(images, [(f"{said}list.{TURN}", listed(scene, rng))])


def _describe(rng: random.Random, long: bool) -> Example:
    scene = sample_scene_for("short", rng, "train")
    images: list[Image.Image] = []
    shown = written(scene_image(scene, rng), images)
    if long:
        return Example(images, [(f"{shown}describe in detail.{TURN}", long_caption(scene, rng))])
    turns = [(f"{shown}describe.{TURN}", short_caption(describe(scene, rng, 0.8), rng))]
    return Example(images, turns)


def _answer(rng: random.Random) -> Example:
    scene = sample_scene_for("vqa", rng, "train")
    images: list[Image.Image] = []
    shown = written(scene_image(scene, rng), images)
    turns = []
    for _ in range(4):
        question, answer = sample_question(scene, rng)
        turns.append((f"{shown}{INSTRUCTIONS['vqa'].format(question)}{TURN}", answer))
        shown = ""
    return Example(images, turns)


def _judge(rng: random.Random, mix: dict[str, float]) -> Example:
    (kind,) = rng.choices(list(mix), list(mix.values()))
    scene = sample_scene_for(kind, rng, "train")
    record = contrastive_record(kind, scene, rng)
    right = rng.random() < 0.5
    candidate = record.positive if right else record.negatives[0]
    if not right and rng.random() < 0.25:  # easy negatives too: the right answer to another question
        candidate = contrastive_record(kind, sample_scene_for(kind, rng, "train"), rng).negatives[0]
    images: list[Image.Image] = []
    prompt = f"Query:{written(record.query, images)}Candidate:{written(candidate, images)}{TURN}"
    return Example(images, [(prompt, "Yes" if right else "No")])


def _easy_text(kind: str, scene: Scene, right: str, rng: random.Random) -> str:
    """A wrong text that is easy to tell: about another scene, or any other answer."""
    while True:
        if kind == "short_i2t":
            description = describe(sample_scene_for(kind, rng, "train"), rng, 0.6)
            if not description.true_of(scene):
                return short_caption(description, rng)
        elif (answer := rng.choice(all_answers())) != right:
            return answer


def _judge_texts(rng: random.Random, mix: dict[str, float]) -> Example:
    """One picture, several texts judged one after the other: more to learn from each picture."""
    (kind,) = rng.choices(list(mix), list(mix.values()))
    scene = sample_scene_for(kind, rng, "train")
    record = contrastive_record(kind, scene, rng)
    images: list[Image.Image] = []
    said, turns = f"Query:{written(record.query, images)}", []
    for _ in range(5):
        draw = rng.random()
        candidate = record.positive if draw < 0.5 else record.negatives[0]
        text = _easy_text(kind, scene, record.positive.text or "", rng) if draw > 0.75 else candidate.text
        turns.append((f"{said}Candidate:{text}{TURN}", "Yes" if draw < 0.5 else "No"))
        said = ""
        if kind == "short_i2t":
            record = contrastive_record(kind, scene, rng)
    return Example(images, turns)


def _false_scene(description: Description, scene: Scene, rng: random.Random) -> Scene:
    """A scene of which the description is false: an edit of the true one, or any other of its size."""
    while True:
        other = sample_edit(scene, rng)[1] if rng.random() < 0.5 else sample_scene(rng, "train", (len(scene.things),))
        if not description.true_of(other):
            return other


def _judge_pictures(rng: random.Random, counts: tuple[int, ...]) -> Example:
    """A caption or an expression, several pictures judged one after the other."""
    scene = sample_scene(rng, "train", counts)
    images: list[Image.Image] = []
    description = describe(scene, rng, 0.5)
    grounding = len(scene.things) > 1 and rng.random() < 0.35
    if grounding:
        thing, words = sample_grounding_target(scene, rng)
        query = with_instruction("grounding", words, scene_image(scene, rng))
    else:
        query = with_instruction("t2i", short_caption(description, rng))
    said, turns = f"Query:{written(query, images)}", []
    for _ in range(3):
        right = rng.random() < 0.5
        if grounding:
            candidate = crop(scene, thing, rng) if right else wrong_crop(scene, thing, rng)
        else:
            candidate = scene_image(scene if right else _false_scene(description, scene, rng), rng)
        turns.append((f"{said}Candidate:{written(candidate, images)}{TURN}", "Yes" if right else "No"))
        said = ""
    return Example(images, turns)


def _judge_scenes(rng: random.Random, progress: float, edits: bool) -> Example:
    """A long caption, or a picture and an edit of it, and several pictures judged one after the other.

    Wrong pictures are other scenes first; more and more of them differ by a single attribute.
    """
    wanted = sample_scene(rng, "train", (1, 2, 2) if progress < 0.3 else (2, 2, 2, 3, 3, 4))
    images: list[Image.Image] = []
    before = wanted
    if edits:
        words, wanted = sample_edit(before, rng)
        query = with_instruction("composed", words, scene_image(before, rng))
    else:
        query = with_instruction("t2i", long_caption(wanted, rng))
    said, turns = f"Query:{written(query, images)}", []
    for _ in range(3):
        shown, right = wanted, rng.random() < 0.5
        while not right and shown == wanted:
            near = rng.random() < 0.2 + progress
            other = sample_edit(wanted, rng)[1] if near else sample_scene(rng, "train", (len(wanted.things),))
            shown = before if edits and rng.random() < 0.4 else other
        turns.append((f"{said}Candidate:{written(scene_image(shown, rng), images)}{TURN}", "Yes" if right else "No"))
        said = ""
    return Example(images, turns)


def _alone(example: Example) -> Example:
    """The same judgements, each without sight of the others.

    Seeing earlier answers, the model compares candidates with them instead of looking at the pictures.
    """
    first, answer = example.turns[0]
    beginning, candidate = first.split("Candidate:", 1)
    return Example(example.images, [(f"Candidate:{candidate}", answer), *example.turns[1:]], beginning)


def _decide_texts(rng: random.Random) -> Example:
    """One picture; captions and answers to questions about it, each judged alone."""
    single = rng.random() < 0.1
    scene = sample_scene_for("classification" if single else "short", rng, "train")
    images: list[Image.Image] = []
    beginning, turns = f"Query:{written(scene_image(scene, rng), images)}", []
    for _ in range(6):
        kinds = ("classification", "vqa") if single else ("short_i2t", "vqa")
        kind, draw = rng.choice(kinds), rng.random()
        record = contrastive_record(kind, scene, rng)
        text = (record.positive if draw < 0.5 else record.negatives[0]).text
        if draw > 0.85:
            text = _easy_text(kind, scene, record.positive.text or "", rng)
        said = f"{record.query.text}Candidate:{text}{TURN}"
        turns.append((said, "Yes" if draw < 0.5 else "No"))
    return Example(images, turns, beginning)


def _choose(rng: random.Random) -> Example:
    (kind,) = rng.choices(list(_SHORT), list(_SHORT.values()))
    record = contrastive_record(kind, sample_scene_for(kind, rng, "train"), rng)
    others = [
        contrastive_record(kind, sample_scene_for(kind, rng, "train"), rng).negatives[0]
        for _ in range(rng.randint(0, 4))
    ]
    candidates = [record.positive, *record.negatives, *others]
    order = rng.sample(range(len(candidates)), len(candidates))
    images: list[Image.Image] = []
    prompt = f"Query:{written(record.query, images)}Candidates:"
    for place, index in enumerate(order, start=1):
        prompt += f"({place}) {written(candidates[index], images)}"
    return Example(images, [(f"{prompt}{TURN}Ans: (", f"{order.index(0) + 1})")])


_MAKERS: dict[str, Callable[[random.Random], Example]] = {
    "describe": lambda rng: _describe(rng, long=False),
    "describe_long": lambda rng: _describe(rng, long=True),
    "answer": _answer,
    "judge": lambda rng: _judge(rng, _SHORT),
    "judge_long": lambda rng: _judge(rng, _LONG),
    "judge_texts": lambda rng: _judge_texts(rng, _TEXTS),
    "judge_pictures": lambda rng: _judge_pictures(rng, (2, 2, 2, 3, 3, 4)),
    "choose": _choose,
    "decide_texts": _decide_texts,
    "decide_pictures": lambda rng: _alone(_judge_pictures(rng, (2, 2, 2, 3, 3, 4))),
    "decide_long_pictures": lambda rng: _alone(_judge_scenes(rng, 1.0, edits=False)),
    "decide_edits": lambda rng: _alone(_judge_scenes(rng, 1.0, edits=True)),
}


def draw_batch(rng: random.Random, curriculum: str, progress: float) -> tuple[str, list[Example] | list[Summary]]:
    """A batch of examples of one random kind of lesson.

    Args:
        rng: Source of randomness.
        curriculum: A name of :data:`CURRICULA`.
        progress: Share of the training that is over. Learning to see starts with lists of one or two objects, then
            of more: a model that does not see yet learns next to nothing from the other lessons. Learning to judge
            starts with one-word answers about one object: on everything at once it stays at chance.
    """
    lessons = CURRICULA[curriculum]
    (lesson,) = rng.choices(list(lessons), [share for share, _ in lessons.values()])
    if lesson == "sum_up":
        return lesson, [draw_summary(rng) for _ in range(lessons[lesson][1])]
    if curriculum == "seeing" and rng.random() < 1.2 - 4 * progress:
        lesson = "list"
    size = lessons[lesson][1]
    if lesson == "list":
        young = curriculum == "seeing" and progress < 0.2
        counts = (2, 3, 4) if not young else (1, 2, 3) if progress > 0.1 else (1, 1, 2)
        return lesson, [_list(rng, counts) for _ in range(size)]
    if curriculum == "judging" and rng.random() < 1.1 - 4 * progress:
        mix = {"classification": 1.0} if progress < 0.1 else {"classification": 0.3, "vqa": 0.7}
        return "judge_texts", [_judge_texts(rng, mix) for _ in range(lessons["judge_texts"][1])]
    if curriculum == "comparing" and rng.random() < 1.1 - 4 * progress:
        few = (1,) if progress < 0.15 else (1, 2, 2)
        return "judge_pictures", [_judge_pictures(rng, few) for _ in range(lessons["judge_pictures"][1])]
    if lesson in ("judge_long_pictures", "judge_edits"):
        return lesson, [_judge_scenes(rng, progress, lesson == "judge_edits") for _ in range(size)]
    return lesson, [_MAKERS[lesson](rng) for _ in range(size)]
