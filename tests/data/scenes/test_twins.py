"""Families of near-twins: known truth, duplicates and vague captions in training, near-twins in the gallery."""

from __future__ import annotations

import random
from itertools import chain, islice

import numpy as np
import pytest

from unime_st.data.scenes import TWIN_TASKS, TwinTruth, retrieval_data, twin_records
from unime_st.data.scenes.twins import MEMBERS, SceneTable, held_out_twins, sample_family, twins


def test_records_are_seeded_pairs_of_both_directions() -> None:
    first, second = (list(twin_records(101, seed=7)) for _ in range(2))
    assert [(record.query.id, record.positive.id) for record in first] == [
        (record.query.id, record.positive.id) for record in second
    ]
    assert first[0].query.id != next(twin_records(1, seed=8)).query.id
    assert len(first) == 101 and [record.dataset for record in first[:3]] == [*TWIN_TASKS, TWIN_TASKS[0]]
    assert all(not record.negatives for record in first)


def test_the_truth_of_a_pair_is_that_of_its_caption() -> None:
    records, truth = list(twin_records(160, seed=1)), TwinTruth(160, seed=1)
    members = list(islice(twins("train", 1), 80))
    assert all(truth(record.query.id, record.positive.id) for record in records)
    captions, images = records[::2], records[1::2]
    for one in range(0, 80, 7):
        for other in range(80):
            expected = members[one].description.true_of(members[other].scene)
            assert truth(captions[one].query.id, captions[other].positive.id) == expected
            assert truth(images[other].query.id, images[one].positive.id) == expected
    with pytest.raises(ValueError, match="a caption and an image"):
        truth(captions[0].query.id, images[0].positive.id)


def test_all_scenes_at_once_give_the_truth_of_each() -> None:
    members = list(islice(twins("train", 2), 120))
    table = SceneTable([member.scene for member in members])
    for member in members:
        expected = [member.description.true_of(other.scene) for other in members]
        assert table.true_of(member.description).tolist() == expected
        assert member.description.true_of(member.scene)


def test_captions_are_often_true_of_several_members() -> None:
    """Without them there would be no false negatives to filter."""
    members = list(islice(twins("train", 3), 100 * MEMBERS))
    others = [
        sum(member.description.true_of(other.scene) for other in family) - 1
        for family in zip(*[iter(members)] * MEMBERS)
        for member in family
    ]
    assert 2.0 < np.mean(others) < 4.0 and min(others) == 0
    distinct = len({member.scene for member in members}) / len(members)
    assert distinct == pytest.approx((1 + 0.8 * (MEMBERS - 1)) / MEMBERS, abs=0.03)  # a fifth of those after the first


def test_copies_are_as_many_as_are_asked_for() -> None:
    rng = random.Random(3)
    families = [sample_family(rng, "train", duplicates=0.35) for _ in range(100)]
    scenes = list(chain.from_iterable(families))
    assert len(scenes) == 100 * MEMBERS and len(set(scenes)) < 0.75 * len(scenes)
    assert all(len(set(sample_family(rng, "train", duplicates=0.0))) == MEMBERS for _ in range(10))


def test_galleries_hold_the_near_twins_of_every_query() -> None:
    members, asked, true = held_out_twins("test", 40, 0)
    assert len(members) == 80 and len(asked) == 40 and true[asked, asked].all()
    for task in TWIN_TASKS:
        data = retrieval_data(task, size=40)
        assert len(data.queries) == 40 and len(data.corpus) == 80
        assert any(len(right) > 1 for right in data.relevant.values())
    scenes = [member.scene for member in members[:MEMBERS]]
    assert 1 < len(set(scenes)) <= MEMBERS
    assert {len(scene.things) for scene in scenes} == {len(scenes[0].things)}
