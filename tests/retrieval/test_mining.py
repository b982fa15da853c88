"""Mining of hard-negative candidates: pools, limits, resumption, shared vectors."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_embedder import tiny_embedder

from unime_st.data import Item, PairRecord, RecordSet, StageConflictError, is_complete
from unime_st.encoding import VectorShards, encode_items
from unime_st.retrieval import Pools, mine, mining
from unime_st.retrieval import item_vectors as embedding


def make_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8))


def pairs() -> list[PairRecord]:
    """Names to images, images to names, and a query with several right answers."""
    made = []
    for index in range(12):
        name, image = Item(f"thing number {index}"), Item(image=make_image(index))
        made += [PairRecord(name, image, "t2i"), PairRecord(image, name, "i2t")]
    made += [PairRecord(Item("any thing"), Item(image=make_image(index)), "many") for index in range(5)]
    return made


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RecordSet:
    return RecordSet.write(tmp_path_factory.mktemp("records") / "set", pairs(), {})


@pytest.fixture(scope="module")
def vectors(records: RecordSet) -> dict[str, np.ndarray]:
    items = list(records.items)
    stored = encode_items(tiny_embedder(), items).astype(np.float16).astype(np.float64)
    return dict(zip([item.id for item in items], stored))


def test_pools_hold_the_nearest_positives_of_others(
    records: RecordSet, vectors: dict[str, np.ndarray], tmp_path: Path
):
    pools = mine(records, tiny_embedder(), tmp_path / "pools", num_candidates=6, max_similarity=None)
    assert len(pools) == len(records)
    for pool, record in zip(pools, pairs(), strict=True):
        assert (pool.query, pool.positive, pool.dataset) == (record.query, record.positive, record.dataset)
        relevant = {other.positive.id for other in pairs() if other.query == record.query}
        assert not relevant & {item.id for item in pool.candidates} and len(set(pool.candidates)) == 6
        others = {other.positive for other in pairs() if other.positive.modality == record.positive.modality}
        query = vectors[record.query.id]
        best = sorted((query @ vectors[item.id] for item in others if item.id not in relevant), reverse=True)[:6]
        np.testing.assert_allclose(pool.similarities, best, atol=1e-5)
        assert pool.positive_similarity == pytest.approx(query @ vectors[record.positive.id], abs=1e-5)
    assert pools.manifest["pool_sizes"] == {"image": 12, "text": 12}
    assert pools.manifest["candidates"] == 6 * len(records) and pools.manifest["short_pools"] == 0


@pytest.mark.parametrize("ceiling", ["positive", 0.05, -0.05])
def test_ceiling(records: RecordSet, tmp_path: Path, ceiling: str | float):
    pools = mine(records, tiny_embedder(), tmp_path / "pools", num_candidates=20, max_similarity=ceiling)
    free = mine(records, tiny_embedder(), tmp_path / "free", num_candidates=20, max_similarity=None)
    margin = 0.0 if ceiling == "positive" else ceiling
    lengths = []
    for pool, everything in zip(pools, free):
        expected = [
            item.id
            for item, score in zip(everything.candidates, everything.similarities)
            if score < pool.positive_similarity + margin - 1e-7
        ]
        assert [item.id for item in pool.candidates] == expected
        lengths.append(len(expected))
    assert sum(lengths) > 0 and pools.manifest["empty_pools"] == lengths.count(0)


def test_pool_kinds(records: RecordSet, tmp_path: Path):
    by_set = mine(records, tiny_embedder(), tmp_path / "set", num_candidates=30, pool="dataset", max_similarity=None)
    assert by_set.manifest["pool_sizes"] == {"t2i": 12, "i2t": 12, "many": 5}
    assert [len(pool.candidates) for pool in by_set][-1] == 0, "all five are right answers"
    everything = mine(
        records, tiny_embedder(), tmp_path / "all", num_candidates=30, pool="global", max_similarity=None
    )
    assert everything.manifest["pool_sizes"] == {"": 24}
    for pool in everything:
        assert pool.query not in pool.candidates
    # 24 positives less the own one and, where it is a positive too, the query
    assert [len(pool.candidates) for pool in everything][:24] == [22] * 24


def test_same_image_in_other_bytes_is_not_below_the_ceiling(tmp_path: Path):
    make_image(0).save(tmp_path / "a.bmp")
    twins = [Item(image=make_image(0)), Item(image=tmp_path / "a.bmp")]
    rows = [PairRecord(Item(f"name {index}"), twin) for index, twin in enumerate(twins)]
    pools = mine(RecordSet.write(tmp_path / "set", rows, {}), tiny_embedder(), tmp_path / "pools")
    assert [len(pool.candidates) for pool in pools] == [0, 0]


def test_unreadable_images_are_set_aside(tmp_path: Path):
    make_image(0).save(tmp_path / "0.png")
    make_image(1).save(tmp_path / "1.png")
    rows = [PairRecord(Item(f"name {index}"), Item(image=tmp_path / f"{index}.png")) for index in (0, 1)]
    rows += [PairRecord(Item("other"), Item(image=make_image(2)))]
    records = RecordSet.write(tmp_path / "set", rows, {}, image_root=tmp_path)
    (tmp_path / "1.png").write_bytes(b"gone")
    pools = mine(records, tiny_embedder(), tmp_path / "pools", max_similarity=None)
    assert [len(pool.candidates) for pool in pools] == [1, 1]
    entry = json.loads((tmp_path / "pools" / "rejected.jsonl").read_text())
    assert entry["row"] == 1 and pools.manifest["rejected"] == 1
    entry = json.loads((tmp_path / "pools" / "vectors" / "rejected.jsonl").read_text())
    assert (
        entry["id"] == rows[1].positive.id
        and np.isnan(VectorShards(tmp_path / "pools" / "vectors")[entry["row"]]).all()
    )


def test_finished_pools_are_kept_and_other_options_refused(records: RecordSet, tmp_path: Path):
    first = mine(records, tiny_embedder(), tmp_path / "pools", num_candidates=3)
    again = mine(records.folder, tiny_embedder(), tmp_path / "pools", num_candidates=3)
    assert first.manifest == again.manifest
    with pytest.raises(StageConflictError, match="num_candidates: 3 there, 4 now"):
        mine(records, tiny_embedder(), tmp_path / "pools", num_candidates=4)
    with pytest.raises(ValueError, match="pool must be one of"):
        mine(records, tiny_embedder(), tmp_path / "other", pool="everything")
    with pytest.raises(ValueError, match="num_candidates must be at least 1, got 0"):
        mine(records, tiny_embedder(), tmp_path / "other", num_candidates=0)
    with pytest.raises(ValueError, match="max_similarity"):
        mine(records, tiny_embedder(), tmp_path / "other", max_similarity="postive")


def _mine_slowly(folder: Path, output: Path) -> None:
    torch.set_num_threads(1)  # the parent's thread pool does not survive the fork
    embedding._CHUNK, encode = 4, embedding.encode_items

    def slow(*arguments: object, **options: object) -> object:
        time.sleep(0.3)
        return encode(*arguments, **options)

    embedding.encode_items = slow
    mine(folder, tiny_embedder(), output, num_candidates=5)


def test_killed_and_started_again(records: RecordSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "pools"
    monkeypatch.setattr(embedding, "_CHUNK", 4)
    tiny_embedder()
    process = multiprocessing.get_context("fork").Process(target=_mine_slowly, args=(records.folder, output))
    process.start()
    while not list((output / "vectors").glob("*.npy")):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    before = {path: path.stat().st_mtime_ns for path in (output / "vectors").glob("*.npy")}
    assert 0 < len(before) < len(records.items) // 4 and not is_complete(output / "vectors")
    with pytest.raises(StageConflictError):
        mine(records, tiny_embedder(), output, num_candidates=6)
    resumed = mine(records, tiny_embedder(), output, num_candidates=5)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    straight = mine(records, tiny_embedder(), tmp_path / "straight", num_candidates=5)
    found, expected = (VectorShards(folder / "vectors")[:] for folder in (output, tmp_path / "straight"))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    for left, right in zip(resumed, straight, strict=True):
        assert left.positive_similarity == pytest.approx(right.positive_similarity, abs=1e-3)
    assert len(Pools(output)) == len(records)


def test_vectors_are_stored_in_half_precision_and_serve_other_options(records: RecordSet, tmp_path: Path):
    kept = tmp_path / "vectors"
    first = mine(records, tiny_embedder(), tmp_path / "few", num_candidates=3, vectors=kept)
    shards = VectorShards(kept).shards()
    assert {shard.dtype for shard in shards} == {np.dtype(np.float16)} and len(VectorShards(kept)) == len(
        records.items
    )
    assert is_complete(kept) and not (tmp_path / "few" / "vectors").exists()

    def never(chunks: object) -> object:
        raise AssertionError("embedded again")

    more = mine(
        records, tiny_embedder(), tmp_path / "more", num_candidates=5, max_similarity=None, vectors=kept, embed=never
    )
    again = mine(
        records, tiny_embedder(), tmp_path / "few", num_candidates=5, vectors=kept, overwrite=True, embed=never
    )
    assert [pool.positive_similarity for pool in first] == [pool.positive_similarity for pool in more]
    below = [
        [item for item, score in zip(pool.candidates, pool.similarities) if score < pool.positive_similarity]
        for pool in more
    ]
    assert below == [pool.candidates[: len(found)] for pool, found in zip(again, below)]

    others = RecordSet.write(tmp_path / "others", pairs()[:6], {})
    with pytest.raises(StageConflictError, match=r"vectors was made from other inputs or options.*input data"):
        mine(others, tiny_embedder(), tmp_path / "other pools", vectors=kept)
    assert len(mine(others, tiny_embedder(), tmp_path / "other pools", vectors=kept, overwrite=True)) == 6
    assert len(VectorShards(kept)) == len(others.items)


def test_ceilings_are_exact_for_the_stored_vectors(records: RecordSet, tmp_path: Path):
    """Against a brute force in float64 over what lies on disk."""
    pools = mine(records, tiny_embedder(), tmp_path / "pools", num_candidates=4, pool="global")
    stored = VectorShards(tmp_path / "pools" / "vectors")[:].astype(np.float64)
    index = {item_id: row for row, item_id in enumerate(records.item_ids)}
    rows = pairs()
    positives = {record.positive.id for record in rows}
    for pool in pools:
        query = stored[index[pool.query.id]]
        ceiling = (query * stored[index[pool.positive.id]]).sum()
        hidden = {pool.query.id, *(row.positive.id for row in rows if row.query == pool.query)}
        scores = {item: (query * stored[index[item]]).sum() for item in positives - hidden}
        below = sorted(
            (item for item in scores if scores[item] < ceiling), key=lambda item: (-scores[item], index[item])
        )
        assert [item.id for item in pool.candidates] == below[:4]
        assert pool.positive_similarity == pytest.approx(ceiling, abs=1e-6)


def test_blocks_of_queries_and_order_of_chunks_change_nothing(
    records: RecordSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(embedding, "_CHUNK", 4)
    whole = mine(records, tiny_embedder(), tmp_path / "whole", num_candidates=5, vectors=tmp_path / "vectors")
    monkeypatch.setattr(mining, "_QUERIES", 3)
    monkeypatch.setattr(mining, "_GATHERED", 2)

    def backwards(chunks: Sequence[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
        stored = VectorShards(tmp_path / "vectors")
        return ((start, stored[start:stop]) for start, stop in reversed(chunks))

    blocks = mine(records, tiny_embedder(), tmp_path / "blocks", num_candidates=5, embed=backwards)
    assert {**blocks.manifest, "files": None} == {**whole.manifest, "files": None}  # similarities to the last bit
    for left, right in zip(blocks, whole, strict=True):
        assert (left.query, left.positive, left.dataset) == (right.query, right.positive, right.dataset)
        assert (left.candidates, left.positive_similarity) == (right.candidates, right.positive_similarity)
        assert left.similarities == pytest.approx(right.similarities, abs=1e-6)


def test_a_vector_that_half_precision_cannot_hold_is_an_error(
    records: RecordSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = tiny_embedder()
    forward = model.forward

    def long(*inputs: object, **options: object) -> dict[str, torch.Tensor]:
        found = forward(*inputs, **options)
        return found | {"sentence_embedding": found["sentence_embedding"] * 1e6}

    monkeypatch.setattr(model, "forward", long)
    with pytest.raises(ValueError, match="not finite in float16 for Item"):
        mine(records, model, tmp_path / "pools")
    assert not is_complete(tmp_path / "pools" / "vectors")
