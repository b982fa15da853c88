"""Datasets of scenes: training records, retrieval tasks of MMEB's four kinds, and SugarCrepe-style foils."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from unime_st.data.items import Item
from unime_st.data.records import PairRecord
from unime_st.data.scenes.contrast import (
    class_label,
    contrastive_record,
    sample_grounding_target,
    sample_scene_for,
    scene_image,
    with_instruction,
)
from unime_st.data.scenes.draw import crop_thing, draw_scene, to_png
from unime_st.data.scenes.foils import FOIL_CATEGORIES, sample_foil
from unime_st.data.scenes.language import (
    all_answers,
    full_pattern,
    long_caption,
    sample_edit,
    sample_question,
    short_caption,
)
from unime_st.data.scenes.twins import held_out_twins
from unime_st.data.scenes.world import COLORS, SHAPES, describe

TRAINING_MIX = {
    "short_t2i": 0.22,
    "short_i2t": 0.22,
    "long_t2i": 0.08,
    "long_i2t": 0.08,
    "vqa": 0.18,
    "grounding": 0.12,
    "composed": 0.05,
    "classification": 0.05,
}
"""Share of each kind of record in the training data."""

_DUPLICATES = 0.1  # share of scenes that occur twice, with another drawing and wording
_GROUNDING_CANDIDATES = 20


def training_records(size: int, *, split: str = "train", seed: int = 0) -> Iterator[PairRecord]:
    """Generate pair records of all kinds about scenes of one split, including near-duplicates and paraphrases.

    Args:
        size: Number of records.
        split: ``"train"`` (default), ``"validation"`` or ``"test"``. Scenes of different splits never coincide.
        seed: Seed of scenes, drawing and words. Defaults to 0.

    Yields:
        PairRecord: Query and positive, without negatives.

    Example:
        >>> from unime_st.data.scenes import training_records
        >>> record = next(training_records(1))
        >>> record.dataset in ("short_t2i", "short_i2t", "long_t2i", "long_i2t", "vqa", "grounding")
        True
    """
    rng = random.Random(f"records-{split}-{seed}")
    kinds, weights = zip(*TRAINING_MIX.items())
    made = 0
    while made < size:
        (kind,) = rng.choices(kinds, weights)
        scene = sample_scene_for(kind, rng, split)
        for _ in range(2 if rng.random() < _DUPLICATES else 1):
            if made < size:
                yield replace(contrastive_record(kind, scene, rng), negatives=())
                made += 1


@dataclass
class RetrievalData:
    """Retrieval dataset of one task.

    Args:
        queries: Queries by id.
        corpus: Documents by id.
        relevant: Ids of the relevant documents of each query.
        candidates: Ids of the candidates of each query. Defaults to None, the whole corpus.
        grades: Grade of each relevant document of each query, in the order of the judgements. Defaults to None, 1 each.
    """

    queries: dict[str, Item]
    corpus: dict[str, Item]
    relevant: dict[str, set[str]]
    candidates: dict[str, list[str]] | None = None
    grades: dict[str, dict[str, int]] | None = None


def _captions(rng: random.Random, split: str, size: int, long: bool, to_image: bool) -> RetrievalData:
    scenes = [sample_scene_for("short", rng, split) for _ in range(size)]
    descriptions = [describe(scene, rng, detail=0.7) for scene in scenes]
    words = [long_caption(s, rng) if long else short_caption(d, rng) for s, d in zip(scenes, descriptions)]
    images = [scene_image(scene, rng) for scene in scenes]

    def right(caption: int, image: int) -> bool:
        if long:
            return caption == image or set(scenes[caption].things) == set(scenes[image].things)
        return descriptions[caption].true_of(scenes[image])

    ids = range(size)
    if to_image:
        return RetrievalData(
            {f"q{i}": with_instruction("t2i", words[i]) for i in ids},
            {f"d{i}": images[i] for i in ids},
            {f"q{i}": {f"d{j}" for j in ids if right(i, j)} for i in ids},
        )
    return RetrievalData(
        {f"q{i}": with_instruction("i2t", image=images[i]) for i in ids},
        {f"d{i}": Item(text=words[i]) for i in ids},
        {f"q{i}": {f"d{j}" for j in ids if right(j, i)} for i in ids},
    )


def _answers(rng: random.Random, split: str, size: int) -> RetrievalData:
    corpus = {f"d{i}": Item(text=answer) for i, answer in enumerate(all_answers())}
    id_of = {item.text: name for name, item in corpus.items()}
    data = RetrievalData({}, corpus, {})
    for i in range(size):
        scene = sample_scene_for("vqa", rng, split)
        question, answer = sample_question(scene, rng)
        data.queries[f"q{i}"] = with_instruction("vqa", question, scene_image(scene, rng))
        data.relevant[f"q{i}"] = {id_of[answer]}
    return data


def _crops(rng: random.Random, split: str, size: int) -> RetrievalData:
    data, candidates = RetrievalData({}, {}, {}), {}
    meaning, of_scene = {}, []
    asked = []
    for i in range(size):
        scene = sample_scene_for("grounding", rng, split)
        thing, words = sample_grounding_target(scene, rng)
        drawing = draw_scene(scene, rng)
        names = {f"d{i}_{j}": other for j, other in enumerate(scene.things)}
        for name, other in names.items():
            data.corpus[name] = Item(image=to_png(crop_thing(drawing, other)))
            meaning[name] = (full_pattern(other), scene.background)
        of_scene.append(list(names))
        asked.append((full_pattern(thing), scene.background))
        data.queries[f"q{i}"] = with_instruction("grounding", words, Item(image=to_png(drawing)))
    everything = list(data.corpus)
    for i, own in enumerate(of_scene):
        others = [
            name for name in rng.sample(everything, min(len(everything), _GROUNDING_CANDIDATES)) if name not in own
        ]
        listed = (own + others)[:_GROUNDING_CANDIDATES]
        candidates[f"q{i}"] = listed
        data.relevant[f"q{i}"] = {name for name in listed if meaning[name] == asked[i]}
    return replace(data, candidates=candidates)


def _edits(rng: random.Random, split: str, size: int) -> RetrievalData:
    data, meaning, wanted = RetrievalData({}, {}, {}), {}, {}
    for i in range(size):
        scene = sample_scene_for("composed", rng, split)
        words, changed = sample_edit(scene, rng)
        before = scene_image(scene, rng)
        data.queries[f"q{i}"] = with_instruction("composed", words, before)
        wanted[f"q{i}"] = changed
        for name, item, content in ((f"d{i}", scene_image(changed, rng), changed), (f"r{i}", before, scene)):
            data.corpus[name] = item
            meaning[name] = (set(content.things), content.background)
    for query, scene in wanted.items():
        right = (set(scene.things), scene.background)
        data.relevant[query] = {name for name, content in meaning.items() if content == right}
    return data


def _labels(rng: random.Random, split: str, size: int) -> RetrievalData:
    labels = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    data = RetrievalData({}, {f"d{i}": Item(text=label) for i, label in enumerate(labels)}, {})
    for i in range(size):
        scene = sample_scene_for("classification", rng, split)
        data.queries[f"q{i}"] = with_instruction("classification", image=scene_image(scene, rng))
        data.relevant[f"q{i}"] = {f"d{labels.index(class_label(scene))}"}
    return data


def _twins(split: str, size: int, seed: int, to_image: bool) -> RetrievalData:
    members, asked, true = held_out_twins(split, size, seed)
    right = true if to_image else true.T
    items = [member.items() for member in members]
    query, document = (0, 1) if to_image else (2, 3)
    return RetrievalData(
        {f"q{i}": items[i][query] for i in asked},
        {f"d{i}": item[document] for i, item in enumerate(items)},
        {f"q{i}": {f"d{j}" for j in right[i].nonzero()[0]} for i in asked},
    )


def retrieval_data(task: str, *, split: str = "test", size: int = 300, seed: int = 0) -> RetrievalData:
    """Generate the retrieval dataset of one scene task.

    Args:
        task: One of ``SCENE_TASKS``, ``"twins_t2i"`` or ``"twins_i2t"``.
        split: Split of the scenes. Defaults to "test".
        size: Number of queries. Defaults to 300. The gallery of a twins task is twice as large.
        seed: Seed of scenes, drawing and words. Defaults to 0.

    Returns:
        RetrievalData: Queries, corpus and relevant documents. A short caption is relevant for every image of which it
        is true.

    Raises:
        ValueError: If the task is unknown.
    """
    rng = random.Random(f"{task}-{split}-{seed}")
    makers: dict[str, Callable[[], RetrievalData]] = {
        "short_t2i": lambda: _captions(rng, split, size, long=False, to_image=True),
        "short_i2t": lambda: _captions(rng, split, size, long=False, to_image=False),
        "long_t2i": lambda: _captions(rng, split, size, long=True, to_image=True),
        "long_i2t": lambda: _captions(rng, split, size, long=True, to_image=False),
        "vqa": lambda: _answers(rng, split, size),
        "grounding": lambda: _crops(rng, split, size),
        "composed": lambda: _edits(rng, split, size),
        "classification": lambda: _labels(rng, split, size),
        "twins_t2i": lambda: _twins(split, size, seed, to_image=True),
        "twins_i2t": lambda: _twins(split, size, seed, to_image=False),
    }
    if task not in makers:
        raise ValueError(f"Unknown scenes task {task!r}; expected one of {', '.join(makers)}.")
    return makers[task]()


@dataclass
class Foil:
    """An image with a true caption and a foil, a false caption that differs by a small edit."""

    image: Item
    caption: str
    foil: str
    category: str


def foils(category: str, *, split: str = "test", size: int = 150, seed: int = 0) -> list[Foil]:
    """Generate compositional foils of one of SugarCrepe's categories.

    Args:
        category: One of :data:`FOIL_CATEGORIES`.
        split: Split of the scenes. Defaults to "test".
        size: Number of foils. Defaults to 150.
        seed: Seed of scenes, drawing and words. Defaults to 0.

    Returns:
        list[Foil]: The foils.

    Raises:
        ValueError: If the category is unknown.
    """
    if category not in FOIL_CATEGORIES:
        raise ValueError(f"Unknown category {category!r}; expected one of {', '.join(FOIL_CATEGORIES)}.")
    rng = random.Random(f"{category}-{split}-{seed}")
    made: list[Foil] = []
    while len(made) < size:
        scene = sample_scene_for("foil", rng, split)
        pair = sample_foil(category, scene, rng)
        if pair is not None:
            words = rng.getrandbits(32)  # the same choice of synonyms on both sides
            true, false = (short_caption(description, random.Random(words)) for description in pair)
            made.append(Foil(scene_image(scene, rng), true, false, category))
    return made
