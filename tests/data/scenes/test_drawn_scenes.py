"""Synthetic scenes: captions are true, splits are disjoint, false negatives exist."""

from __future__ import annotations

import random

import numpy as np
import pytest

from unime_st.data.scenes import FOIL_CATEGORIES, SCENE_TASKS, TWIN_TASKS, foils, retrieval_data, training_records
from unime_st.data.scenes.contrast import contrastive_record, sample_scene_for
from unime_st.data.scenes.draw import draw_scene
from unime_st.data.scenes.foils import sample_foil
from unime_st.data.scenes.language import all_answers, long_caption, sample_edit, sample_question, sample_wrong_answer
from unime_st.data.scenes.world import OPPOSITE, RELATIONS, Scene, Thing, describe, related, sample_scene


def _clip_tokens(text: str) -> int:
    """A lower bound of CLIP's token count: words and punctuation marks."""
    return len(text.replace(".", " .").replace(",", " ,").split())


@pytest.mark.parametrize("seed", range(3))
def test_descriptions_are_true_and_foils_are_false(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        scene = sample_scene(rng)
        assert describe(scene, rng).true_of(scene)
        for category in FOIL_CATEGORIES:
            pair = sample_foil(category, scene, rng)
            if pair is not None:
                true, false = pair
                assert true.true_of(scene) and not false.true_of(scene)


def test_relations_follow_the_cells() -> None:
    first, second = Thing("red", "circle", "large", "plain", (0, 2)), Thing("blue", "star", "small", "plain", (1, 0))
    assert [name for name in RELATIONS if related(first, name, second)] == ["right of", "above"]
    assert all(related(second, OPPOSITE[name], first) for name in ("right of", "above"))


def test_splits_are_disjoint_by_content_and_not_by_order() -> None:
    rng = random.Random(0)
    seen = {split: set() for split in ("train", "validation", "test")}
    for _ in range(3000):
        scene = sample_scene(rng)
        assert Scene(tuple(reversed(scene.things)), scene.background).split == scene.split
        seen[scene.split].add((frozenset(scene.things), scene.background))
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert 0.08 < len(seen["test"]) / 3000 < 0.18


def test_long_captions_exceed_what_clip_reads() -> None:
    rng = random.Random(1)
    lengths = [_clip_tokens(long_caption(sample_scene(rng, counts=(1, 2, 3, 4)), rng)) for _ in range(500)]
    assert min(lengths) > 77


def test_an_edit_changes_exactly_one_attribute() -> None:
    rng = random.Random(2)
    for _ in range(200):
        scene = sample_scene(rng)
        _, changed = sample_edit(scene, rng)
        differences = [
            name
            for before, after in zip(scene.things, changed.things)
            for name in ("color", "shape", "size", "texture", "cell")
            if getattr(before, name) != getattr(after, name)
        ]
        assert len(differences) == 1 and changed.background == scene.background


def test_questions_have_known_answers_and_wrong_ones_differ() -> None:
    rng = random.Random(3)
    known = set(all_answers())
    for _ in range(500):
        _, answer = sample_question(sample_scene(rng), rng)
        wrong = sample_wrong_answer(answer, rng)
        assert answer in known and wrong in known and wrong != answer


@pytest.mark.parametrize("kind", SCENE_TASKS)
def test_every_kind_of_record_has_different_positive_and_negative(kind: str) -> None:
    rng = random.Random(4)
    for _ in range(20):
        record = contrastive_record(kind, sample_scene_for(kind, rng, "train"), rng)
        assert record.positive != record.negatives[0] and record.dataset == kind


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown kind"):
        contrastive_record("audio", sample_scene(random.Random(0)), random.Random(0))
    with pytest.raises(ValueError, match="short_t2i"):
        retrieval_data("audio")
    with pytest.raises(ValueError, match="swap_att"):
        foils("audio")


def test_images_differ_by_what_they_show() -> None:
    scene = sample_scene(random.Random(5))
    same = [np.asarray(draw_scene(scene, random.Random(seed)), dtype=float) for seed in (0, 1)]
    other = np.asarray(draw_scene(sample_edit(scene, random.Random(0))[1], random.Random(0)), dtype=float)
    assert same[0].shape == (84, 84, 3) and (same[0] != same[1]).any()
    assert (same[0] != other).any()


def test_training_records_are_seeded_and_hold_duplicates() -> None:
    first, second = (list(training_records(300, seed=7)) for _ in range(2))
    assert [record.query.id for record in first] == [record.query.id for record in second]
    assert [record.query.id for record in first] != [record.query.id for record in training_records(300, seed=8)]
    assert all(not record.negatives for record in first)
    assert {record.dataset for record in first} == set(SCENE_TASKS)


@pytest.mark.parametrize("task", [*SCENE_TASKS, *TWIN_TASKS])
def test_every_query_has_a_right_answer_among_its_candidates(task: str) -> None:
    data = retrieval_data(task, size=40)
    assert len(data.queries) == 40
    for query in data.queries:
        candidates = data.candidates[query] if data.candidates else list(data.corpus)
        right = data.relevant[query]
        assert right and right <= set(candidates) and len(right) < len(candidates)


def test_short_captions_are_true_of_several_images() -> None:
    """Without them there would be no false negatives to filter."""
    data = retrieval_data("short_t2i", size=200)
    assert sum(len(right) > 1 for right in data.relevant.values()) > 10


@pytest.mark.parametrize("category", FOIL_CATEGORIES)
def test_foils_are_seeded_pairs_of_different_captions(category: str) -> None:
    first, second = foils(category, size=30), foils(category, size=30)
    assert [(foil.caption, foil.foil) for foil in first] == [(foil.caption, foil.foil) for foil in second]
    assert all(foil.caption != foil.foil and foil.category == category for foil in first)
