"""Pre-training tasks of `unime-tiny`: captioning, question answering, judging pairs, choosing from a list."""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image

from train_scripts.tiny.summaries import TURN, Summary, draw_summary, object_list, prompt_text
from train_scripts.tiny.telling_apart import Example, tell_captions, tell_long, tell_twins
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

# Curriculum -> task -> (share of the batches, examples per batch).
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
        "judge_images": (0.50, 32),
        "judge_long": (0.05, 32),
        "choose": (0.05, 24),
    },
    "refining": {
        "describe": (0.03, 64),
        "describe_long": (0.03, 24),
        "answer": (0.10, 48),
        "judge_texts": (0.24, 40),
        "judge_images": (0.27, 32),
        "judge_long_images": (0.12, 24),
        "judge_edits": (0.11, 32),
        "judge_long": (0.05, 32),
        "choose": (0.05, 24),
    },
    "deciding": {
        "describe": (0.03, 64),
        "describe_long": (0.03, 24),
        "answer": (0.08, 48),
        "decide_texts": (0.37, 40),
        "decide_images": (0.26, 32),
        "decide_long_images": (0.05, 20),
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
        "decide_images": (0.09, 32),
        "decide_long_images": (0.02, 20),
        "decide_edits": (0.03, 28),
        "judge_long": (0.015, 32),
        "choose": (0.015, 24),
    },
    "telling_apart": {
        "tell_captions": (0.50, 16),
        "tell_long": (0.14, 16),
        "sum_up": (0.12, 48),
        "describe": (0.02, 32),
        "describe_long": (0.01, 16),
        "answer": (0.04, 24),
        "decide_texts": (0.05, 24),
        "decide_images": (0.08, 20),
        "decide_edits": (0.01, 16),
        "judge_long": (0.01, 16),
        "choose": (0.02, 12),
    },
    "rounding_off": {
        "tell_captions": (0.35, 16),
        "tell_long": (0.06, 16),
        "sum_up": (0.16, 48),
        "describe": (0.02, 32),
        "describe_long": (0.01, 16),
        "answer": (0.06, 32),
        "decide_texts": (0.14, 40),
        "decide_images": (0.15, 32),
        "decide_edits": (0.02, 16),
        "judge_long": (0.01, 16),
        "choose": (0.02, 12),
    },
    "near_twins": {
        "tell_twins": (0.42, 16),
        "tell_captions": (0.10, 16),
        "tell_long": (0.05, 16),
        "sum_up": (0.14, 48),
        "describe": (0.02, 32),
        "describe_long": (0.01, 16),
        "answer": (0.05, 32),
        "decide_texts": (0.08, 40),
        "decide_images": (0.10, 32),
        "decide_edits": (0.01, 16),
        "judge_long": (0.01, 16),
        "choose": (0.01, 12),
    },
}
_LONG = {kind: share for kind, share in TRAINING_MIX.items() if kind.startswith("long")}
_SHORT = {kind: share for kind, share in TRAINING_MIX.items() if kind not in _LONG}
_TEXTS = {"short_i2t": 0.5, "vqa": 0.4, "classification": 0.1}


def _list(rng: random.Random, counts: tuple[int, ...]) -> Example:
    """Every object in reading order: the task with the densest signal, from which vision is learned first."""
    scene = sample_scene(rng, "train", counts)
    images: list[Image.Image] = []
    prompt = prompt_text(scene_image(scene, rng), images)
    return Example(images, [(f"{prompt}list.{TURN}", object_list(scene, rng))])


def _describe(rng: random.Random, long: bool) -> Example:
    scene = sample_scene_for("short", rng, "train")
    images: list[Image.Image] = []
    shown = prompt_text(scene_image(scene, rng), images)
    if long:
        return Example(images, [(f"{shown}describe in detail.{TURN}", long_caption(scene, rng))])
    turns = [(f"{shown}describe.{TURN}", short_caption(describe(scene, rng, 0.8), rng))]
    return Example(images, turns)


def _answer(rng: random.Random) -> Example:
    scene = sample_scene_for("vqa", rng, "train")
    images: list[Image.Image] = []
    shown = prompt_text(scene_image(scene, rng), images)
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
    if not right and rng.random() < 0.25:  # easy negatives too: the positive of another query
        candidate = contrastive_record(kind, sample_scene_for(kind, rng, "train"), rng).negatives[0]
    images: list[Image.Image] = []
    prompt = f"Query:{prompt_text(record.query, images)}Candidate:{prompt_text(candidate, images)}{TURN}"
    return Example(images, [(prompt, "Yes" if right else "No")])


def _easy_text(kind: str, scene: Scene, right: str, rng: random.Random) -> str:
    """An easy negative: a caption of another scene, or another answer."""
    while True:
        if kind == "short_i2t":
            description = describe(sample_scene_for(kind, rng, "train"), rng, 0.6)
            if not description.true_of(scene):
                return short_caption(description, rng)
        elif (answer := rng.choice(all_answers())) != right:
            return answer


def _judge_texts(rng: random.Random, mix: dict[str, float]) -> Example:
    """One image and several texts, judged in turn: more signal per image."""
    (kind,) = rng.choices(list(mix), list(mix.values()))
    scene = sample_scene_for(kind, rng, "train")
    record = contrastive_record(kind, scene, rng)
    images: list[Image.Image] = []
    prompt, turns = f"Query:{prompt_text(record.query, images)}", []
    for _ in range(5):
        draw = rng.random()
        candidate = record.positive if draw < 0.5 else record.negatives[0]
        text = _easy_text(kind, scene, record.positive.text or "", rng) if draw > 0.75 else candidate.text
        turns.append((f"{prompt}Candidate:{text}{TURN}", "Yes" if draw < 0.5 else "No"))
        prompt = ""
        if kind == "short_i2t":
            record = contrastive_record(kind, scene, rng)
    return Example(images, turns)


def _false_scene(description: Description, scene: Scene, rng: random.Random) -> Scene:
    """A scene that the description is false of: an edit of the given one, or another one of its size."""
    while True:
        other = sample_edit(scene, rng)[1] if rng.random() < 0.5 else sample_scene(rng, "train", (len(scene.things),))
        if not description.true_of(other):
            return other


def _judge_images(rng: random.Random, counts: tuple[int, ...]) -> Example:
    """A caption or a referring expression and several images, judged in turn."""
    scene = sample_scene(rng, "train", counts)
    images: list[Image.Image] = []
    description = describe(scene, rng, 0.5)
    grounding = len(scene.things) > 1 and rng.random() < 0.35
    if grounding:
        thing, words = sample_grounding_target(scene, rng)
        query = with_instruction("grounding", words, scene_image(scene, rng))
    else:
        query = with_instruction("t2i", short_caption(description, rng))
    prompt, turns = f"Query:{prompt_text(query, images)}", []
    for _ in range(3):
        right = rng.random() < 0.5
        if grounding:
            candidate = crop(scene, thing, rng) if right else wrong_crop(scene, thing, rng)
        else:
            candidate = scene_image(scene if right else _false_scene(description, scene, rng), rng)
        turns.append((f"{prompt}Candidate:{prompt_text(candidate, images)}{TURN}", "Yes" if right else "No"))
        prompt = ""
    return Example(images, turns)


def _judge_scenes(rng: random.Random, progress: float, edits: bool) -> Example:
    """A long caption, or an image and an edit, and several images, judged in turn.

    Negatives are other scenes at first; with ``progress``, more of them differ by a single attribute.
    """
    wanted = sample_scene(rng, "train", (1, 2, 2) if progress < 0.3 else (2, 2, 2, 3, 3, 4))
    images: list[Image.Image] = []
    before = wanted
    if edits:
        words, wanted = sample_edit(before, rng)
        query = with_instruction("composed", words, scene_image(before, rng))
    else:
        query = with_instruction("t2i", long_caption(wanted, rng))
    prompt, turns = f"Query:{prompt_text(query, images)}", []
    for _ in range(3):
        shown, right = wanted, rng.random() < 0.5
        while not right and shown == wanted:
            near = rng.random() < 0.2 + progress
            other = sample_edit(wanted, rng)[1] if near else sample_scene(rng, "train", (len(wanted.things),))
            shown = before if edits and rng.random() < 0.4 else other
        turns.append(
            (f"{prompt}Candidate:{prompt_text(scene_image(shown, rng), images)}{TURN}", "Yes" if right else "No")
        )
        prompt = ""
    return Example(images, turns)


def _alone(example: Example) -> Example:
    """The same judgements, each independent of the others.

    With earlier answers in view, the model compares candidates with each other instead of with the query.
    """
    first, answer = example.turns[0]
    prefix, candidate = first.split("Candidate:", 1)
    return Example(example.images, [(f"Candidate:{candidate}", answer), *example.turns[1:]], prefix)


def _decide_texts(rng: random.Random) -> Example:
    """One image, and captions and answers to questions about it, each judged independently."""
    single = rng.random() < 0.1
    scene = sample_scene_for("classification" if single else "short", rng, "train")
    images: list[Image.Image] = []
    prefix, turns = f"Query:{prompt_text(scene_image(scene, rng), images)}", []
    for _ in range(6):
        kinds = ("classification", "vqa") if single else ("short_i2t", "vqa")
        kind, draw = rng.choice(kinds), rng.random()
        record = contrastive_record(kind, scene, rng)
        text = (record.positive if draw < 0.5 else record.negatives[0]).text
        if draw > 0.85:
            text = _easy_text(kind, scene, record.positive.text or "", rng)
        prompt = f"{record.query.text}Candidate:{text}{TURN}"
        turns.append((prompt, "Yes" if draw < 0.5 else "No"))
    return Example(images, turns, prefix)


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
    prompt = f"Query:{prompt_text(record.query, images)}Candidates:"
    for number, index in enumerate(order, start=1):
        prompt += f"({number}) {prompt_text(candidates[index], images)}"
    return Example(images, [(f"{prompt}{TURN}Ans: (", f"{order.index(0) + 1})")])


_MAKERS: dict[str, Callable[[random.Random], Example]] = {
    "describe": lambda rng: _describe(rng, long=False),
    "describe_long": lambda rng: _describe(rng, long=True),
    "answer": _answer,
    "judge": lambda rng: _judge(rng, _SHORT),
    "judge_long": lambda rng: _judge(rng, _LONG),
    "judge_texts": lambda rng: _judge_texts(rng, _TEXTS),
    "judge_images": lambda rng: _judge_images(rng, (2, 2, 2, 3, 3, 4)),
    "choose": _choose,
    "tell_captions": tell_captions,
    "tell_twins": tell_twins,
    "tell_long": tell_long,
    "decide_texts": _decide_texts,
    "decide_images": lambda rng: _alone(_judge_images(rng, (2, 2, 2, 3, 3, 4))),
    "decide_long_images": lambda rng: _alone(_judge_scenes(rng, 1.0, edits=False)),
    "decide_edits": lambda rng: _alone(_judge_scenes(rng, 1.0, edits=True)),
}


def draw_batch(rng: random.Random, curriculum: str, progress: float) -> tuple[str, list[Example] | list[Summary]]:
    """Draw a batch of examples of one random task.

    Args:
        rng: Source of randomness.
        curriculum: A name of :data:`CURRICULA`.
        progress: Fraction of the training that is done. "seeing" starts with lists of one or two objects, then of
            more: before that, the model learns next to nothing from the other tasks. "judging" starts with one-word
            answers about one object: with all tasks at once it stays at chance.

    Returns:
        Name of the task, and the examples.
    """
    tasks = CURRICULA[curriculum]
    (task,) = rng.choices(list(tasks), [share for share, _ in tasks.values()])
    if task == "sum_up":
        return task, [draw_summary(rng) for _ in range(tasks[task][1])]
    if curriculum == "seeing" and rng.random() < 1.2 - 4 * progress:
        task = "list"
    size = tasks[task][1]
    if task == "list":
        young = curriculum == "seeing" and progress < 0.2
        counts = (2, 3, 4) if not young else (1, 2, 3) if progress > 0.1 else (1, 1, 2)
        return task, [_list(rng, counts) for _ in range(size)]
    if curriculum == "judging" and rng.random() < 1.1 - 4 * progress:
        mix = {"classification": 1.0} if progress < 0.1 else {"classification": 0.3, "vqa": 0.7}
        return "judge_texts", [_judge_texts(rng, mix) for _ in range(tasks["judge_texts"][1])]
    if curriculum == "comparing" and rng.random() < 1.1 - 4 * progress:
        few = (1,) if progress < 0.15 else (1, 2, 2)
        return "judge_images", [_judge_images(rng, few) for _ in range(tasks["judge_images"][1])]
    if task in ("judge_long_images", "judge_edits"):
        return task, [_judge_scenes(rng, progress, task == "judge_edits") for _ in range(size)]
    return task, [_MAKERS[task](rng) for _ in range(size)]
