from __future__ import annotations

import json
import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_embedder import tiny_embedder
from tqdm import tqdm

from unime_st.data import Item, PairRecord, RecordSet, StageConflictError, is_complete
from unime_st.encoding import encode_items
from unime_st.retrieval import Pools, mine, mining


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8))


def pairs() -> list[PairRecord]:
    """Names to pictures, pictures to names, and a query with several right answers."""
    made = []
    for index in range(12):
        name, image = Item(f"thing number {index}"), Item(image=picture(index))
        made += [PairRecord(name, image, "t2i"), PairRecord(image, name, "i2t")]
    made += [PairRecord(Item("any thing"), Item(image=picture(index)), "many") for index in range(5)]
    return made


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RecordSet:
    return RecordSet.write(tmp_path_factory.mktemp("records") / "set", pairs(), {})


@pytest.fixture(scope="module")
def vectors(records: RecordSet) -> dict[str, np.ndarray]:
    items = list(records.items)
    return dict(zip([item.id for item in items], encode_items(tiny_embedder(), items).astype(np.float64)))


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
    assert 0 < sum(lengths) and pools.manifest["empty_pools"] == lengths.count(0)


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


def test_same_picture_in_other_bytes_is_not_below_the_ceiling(tmp_path: Path):
    picture(0).save(tmp_path / "a.bmp")
    twins = [Item(image=picture(0)), Item(image=tmp_path / "a.bmp")]
    rows = [PairRecord(Item(f"name {index}"), twin) for index, twin in enumerate(twins)]
    pools = mine(RecordSet.write(tmp_path / "set", rows, {}), tiny_embedder(), tmp_path / "pools")
    assert [len(pool.candidates) for pool in pools] == [0, 0]


def test_unreadable_images_are_set_aside(tmp_path: Path):
    picture(0).save(tmp_path / "0.png")
    picture(1).save(tmp_path / "1.png")
    rows = [PairRecord(Item(f"name {index}"), Item(image=tmp_path / f"{index}.png")) for index in (0, 1)]
    rows += [PairRecord(Item("other"), Item(image=picture(2)))]
    records = RecordSet.write(tmp_path / "set", rows, {}, image_root=tmp_path)
    (tmp_path / "1.png").write_bytes(b"gone")
    pools = mine(records, tiny_embedder(), tmp_path / "pools", max_similarity=None)
    assert [len(pool.candidates) for pool in pools] == [1, 1]
    entry = json.loads((tmp_path / "pools" / "rejected.jsonl").read_text())
    assert entry["row"] == 1 and pools.manifest["rejected"] == 1


def test_finished_pools_are_kept_and_other_options_refused(records: RecordSet, tmp_path: Path):
    first = mine(records, tiny_embedder(), tmp_path / "pools", num_candidates=3)
    again = mine(records.folder, tiny_embedder(), tmp_path / "pools", num_candidates=3)
    assert first.manifest == again.manifest and not list((tmp_path / "pools").glob("vectors*"))
    with pytest.raises(StageConflictError, match="num_candidates: 3 there, 4 now"):
        mine(records, tiny_embedder(), tmp_path / "pools", num_candidates=4)
    with pytest.raises(ValueError, match="pool must be one of"):
        mine(records, tiny_embedder(), tmp_path / "other", pool="everything")
    with pytest.raises(ValueError, match="max_similarity"):
        mine(records, tiny_embedder(), tmp_path / "other", max_similarity="postive")


def _mine_slowly(folder: Path, output: Path) -> None:
    tqdm.set_lock(threading.RLock())  # killed while it holds the shared lock, it would block the parent for ever
    torch.set_num_threads(1)  # the parent's thread pool does not survive the fork
    mining._CHUNK, encode = 4, mining.encode_items

    def slow(*arguments: object, **options: object) -> object:
        time.sleep(0.3)
        return encode(*arguments, **options)

    mining.encode_items = slow
    mine(folder, tiny_embedder(), output, num_candidates=5)


def test_killed_and_started_again(records: RecordSet, tmp_path: Path):
    output = tmp_path / "pools"
    tiny_embedder()
    process = multiprocessing.get_context("fork").Process(target=_mine_slowly, args=(records.folder, output))
    process.start()
    while not (output / "vectors.json").exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    done = json.loads((output / "vectors.json").read_text())["done"][-1][1]
    assert 0 < done < len(records.items) and not is_complete(output)
    before = np.load(output / "vectors.npy", mmap_mode="r")[:done].copy()
    assert np.isfinite(before).all()
    with pytest.raises(StageConflictError):
        mine(records, tiny_embedder(), output, num_candidates=6)
    resumed = mine(records, tiny_embedder(), output, num_candidates=5)
    straight = mine(records, tiny_embedder(), tmp_path / "straight", num_candidates=5)
    assert resumed.rows["candidates"].equals(straight.rows["candidates"])
    np.testing.assert_allclose(
        np.concatenate(resumed.rows["similarities"].to_pylist()),
        np.concatenate(straight.rows["similarities"].to_pylist()),
        atol=1e-5,
    )
    assert len(Pools(output)) == len(records)
