"""Stage folders that were damaged, truncated, swapped or mixed: found when they are opened, by the name of the file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_embedder import tiny_embedder
from unime_st import Item
from unime_st.data import PairRecord, RecordSet
from unime_st.data.importing import import_records
from unime_st.data.manifest import MANIFEST, PLAN
from unime_st.encoding import VectorShards, encode_to_shards
from unime_st.files import FolderInUseError, file_digests, folder_lock
from unime_st.judging import Group
from unime_st.judging.judge_pools import judge_pools
from unime_st.judging.score_store import Scores
from unime_st.judging.select_rows import select_rows
from unime_st.retrieval.mining import Pools, mine

WORDS = ("circle", "star", "ring", "square", "triangle", "cross")


class WordJudge:
    name, revision, prompt_hash = "words", "1", "none"

    def score(self, groups: list[Group], *, errors: object = None) -> list[np.ndarray]:
        return [np.float32([len(item.text or "") - 5.5 for item in group.candidates]) for group in groups]


@pytest.fixture
def records(tmp_path: Path) -> RecordSet:
    pairs = [PairRecord(Item(f"a red {word}"), Item(word)) for word in WORDS]
    return RecordSet.write(tmp_path / "records", pairs, {"source": "test"})


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def flip_and_keep_the_times(path: Path) -> None:
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def remove(path: Path) -> None:
    path.unlink()


def add_another(path: Path) -> None:
    path.with_name(path.name.replace("00000", "00001")).write_bytes(path.read_bytes())


DAMAGE: list[Callable[[Path], None]] = [truncate, empty, flip, flip_and_keep_the_times, remove, add_another]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("stem", ["items", "rows"])
def test_finished_folder(records: RecordSet, damage: Callable[[Path], None], stem: str):
    damage(records.folder / f"{stem}-00000.parquet")
    with pytest.raises(ValueError, match=rf"{stem}-0000\d.parquet .*remove .* and run the stage"):
        RecordSet.load(records.folder)


def test_folder_with_files_of_another(records: RecordSet, tmp_path: Path):
    other = RecordSet.write(tmp_path / "other", [records[0]], {"source": "test"})
    for name in ("items", "rows"):
        os.replace(other.folder / f"{name}-00000.parquet", records.folder / f"{name}-00000.parquet")
    with pytest.raises(ValueError, match="has changed since its stage wrote it"):
        RecordSet.load(records.folder)


def test_finished_stage_that_was_damaged_is_not_taken_for_done(records: RecordSet, tmp_path: Path):
    model = tiny_embedder()
    pools = mine(records, model, tmp_path / "pools", num_candidates=2, max_similarity=None)
    flip(pools.folder / "rows-00000.parquet")
    with pytest.raises(ValueError, match="run the stage"):
        mine(records, model, tmp_path / "pools", num_candidates=2, max_similarity=None)
    again = mine(records, model, tmp_path / "pools", num_candidates=2, max_similarity=None, overwrite=True)
    assert len(again) == len(WORDS)


def unfinished(folder: Path) -> None:
    """As a kill before the manifest leaves it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    lines = [f"{digest}  {name}\n" for name, digest in manifest["files"].items()]
    (folder / "shards.sha256").write_text("".join(lines))
    os.replace(folder / MANIFEST, folder / PLAN)


def nan(path: Path) -> None:
    np.save(path, np.full_like(np.load(path), np.nan))


def other_numbers(path: Path) -> None:
    np.save(path, np.load(path)[::-1])


@pytest.mark.parametrize(
    "damage", [truncate, empty, flip, remove, nan, other_numbers], ids=lambda damage: damage.__name__
)
def test_damaged_vectors_of_an_interrupted_run_are_computed_again(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    model, folder = tiny_embedder(), tmp_path / "vectors"
    right = encode_to_shards(model, list(WORDS), folder, show_progress_bar=False)[:]
    unfinished(folder)
    damage(folder / "vectors-00000.npy")
    with caplog.at_level(logging.WARNING):
        found = encode_to_shards(model, list(WORDS), folder, show_progress_bar=False)[:]
    assert np.array_equal(found, right)
    assert ("vectors-00000.npy is damaged" in caplog.text) == (damage is not remove)


def test_damaged_scores_of_an_interrupted_run_are_judged_again(records: RecordSet, tmp_path: Path):
    pools = mine(records, tiny_embedder(), tmp_path / "pools", num_candidates=2, max_similarity=None)
    right = judge_pools(pools, WordJudge(), tmp_path / "scores", shard_size=2).rows.to_pylist()
    for damage in (truncate, empty, flip):
        unfinished(tmp_path / "scores")
        damage(tmp_path / "scores" / "rows-00001.parquet")
        assert judge_pools(pools, WordJudge(), tmp_path / "scores", shard_size=2).rows.to_pylist() == right


def test_digests_are_kept_and_follow_every_change(tmp_path: Path):
    file = tmp_path / "large.bin"
    file.write_bytes(bytes(3 << 20))
    os.utime(file, ns=(0, 0))
    before = file_digests(tmp_path, [file.name])
    for position in (0, 1 << 20, (3 << 20) - 1):
        with file.open("r+b") as handle:
            handle.seek(position)
            handle.write(b"x")
        os.utime(file, ns=(0, 0))
        found = file_digests(tmp_path, [file.name])
        assert found != before
        before = found


def test_every_stage_names_the_process_that_holds_its_folder(records: RecordSet, tmp_path: Path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"query": "a", "positive": "b"}\n')
    model, output = tiny_embedder(), tmp_path / "output"
    pools = mine(records, model, tmp_path / "pools", num_candidates=2, max_similarity=None)
    scores = judge_pools(pools, WordJudge(), tmp_path / "scores")
    stages: dict[str, Callable[[], object]] = {
        "import": lambda: import_records(source, output),
        "mine": lambda: mine(records, model, output),
        "encode": lambda: encode_to_shards(model, list(WORDS), output),
    }
    with folder_lock(output):
        for stage in stages.values():
            with pytest.raises(FolderInUseError, match=f"output is in use by process {os.getpid()} on "):
                stage()
    with folder_lock(tmp_path / "output.part-0-of-1"), pytest.raises(FolderInUseError, match="in use by process"):
        judge_pools(pools, WordJudge(), output)
    assert not output.exists()
    assert len(select_rows(scores, output)) == len(pools) and not list(tmp_path.glob(".*.lock"))


def test_wrong_kind_of_folder(records: RecordSet, tmp_path: Path):
    vectors = encode_to_shards(tiny_embedder(), list(WORDS), tmp_path / "vectors", show_progress_bar=False)
    pools = mine(records, tiny_embedder(), tmp_path / "pools", num_candidates=2, max_similarity=None)
    for kind, folder, message in (
        (RecordSet, vectors.folder, "no items-.*parquet"),
        (RecordSet, pools.folder, "expected pair records, .* the stage 'mine'"),
        (Pools, records.folder, "expected candidate pools"),
        (Scores, pools.folder, "expected judge scores, found rows without logits, positive_logit"),
        (VectorShards, records.folder, "expected vectors"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            kind(folder)
