"""Embedding store of the loader: order, damaged and failed writes, memory, keys."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from mteb_tasks import embedding_store as store_module
from mteb_tasks import item_embedder
from mteb_tasks.embedding_store import EmbeddingStore
from mteb_tasks.loader import UniMELoader
from mteb_tasks.models import cache_folder, folder_revision, metas
from unime_st.data.items import Item
from unime_st.paths import PACKAGED

NAMES = [f"{number:032x}" for number in range(6)]


def process_memory() -> int:
    return psutil.Process().memory_info().rss


def _vectors(rows, dim=3):
    return np.arange(rows * dim, dtype=np.float32).reshape(rows, dim)


@pytest.mark.parametrize("on_disk", [False, True])
def test_vectors_come_back_in_the_order_asked(tmp_path, on_disk):
    store = EmbeddingStore(tmp_path if on_disk else None)
    store.add(NAMES[:2], _vectors(2))
    store.add(NAMES[2:5], _vectors(3) + 100)
    assert len(store) == 5 and NAMES[5] not in store
    np.testing.assert_array_equal(store.take([NAMES[3], NAMES[0]]), [[103, 104, 105], [0, 1, 2]])
    with pytest.raises(KeyError):
        store.take([NAMES[5]])


def test_vectors_of_another_width_do_not_shift_the_others(tmp_path):
    store = EmbeddingStore(tmp_path)
    for index, dim in enumerate((3, 5, 3)):
        store.add([NAMES[index]], _vectors(1, dim) + index)
    store.add([], _vectors(0))
    for found in (store, EmbeddingStore(tmp_path)):
        taken = [found.take([name]).tolist() for name in NAMES[:3]]
        assert taken == [(_vectors(1, dim) + index).tolist() for index, dim in enumerate((3, 5, 3))]


def test_a_write_that_was_cut_off_is_not_read(tmp_path):
    store = EmbeddingStore(tmp_path)
    store.add(NAMES[:4], _vectors(4))
    (vectors,) = tmp_path.glob("*.vectors")
    vectors.write_bytes(vectors.read_bytes()[:-5])
    again = EmbeddingStore(tmp_path)
    assert len(again) == 3 and NAMES[3] not in again
    again.add([NAMES[3]], _vectors(1))
    third = EmbeddingStore(tmp_path)
    np.testing.assert_array_equal(third.take(NAMES[:4]), [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2]])


def test_a_write_that_failed_does_not_shift_those_after_it(tmp_path, monkeypatch):
    store = EmbeddingStore(tmp_path)
    store.add(NAMES[:1], _vectors(1))

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(store_module.os, "fsync", full)
        store.add(NAMES[1:3], _vectors(2) + 50)
    assert NAMES[1] not in store
    store.add(NAMES[3:5], _vectors(2) + 100)
    for found in (store, EmbeddingStore(tmp_path)):
        np.testing.assert_array_equal(
            found.take([NAMES[4], NAMES[0], NAMES[3]]), [[103, 104, 105], [0, 1, 2], [100, 101, 102]]
        )


def test_vectors_on_disk_are_not_in_memory(tmp_path):
    store = EmbeddingStore(tmp_path)
    before = process_memory()
    for block in range(64):
        store.add([f"{block * 1000 + row:032x}" for row in range(1000)], np.ones((1000, 256), dtype=np.float32))
    assert process_memory() - before < 40 << 20, "64,000 vectors of 1 KiB take 62 MiB"
    assert store.take([f"{63_999:032x}"]).shape == (1, 256)


def test_what_is_not_finite_is_never_kept(tmp_path):
    store = EmbeddingStore(tmp_path)
    with pytest.raises(ValueError, match=f"item {NAMES[1]} is not finite"):
        store.add(NAMES[:2], np.array([[1.0], [np.nan]]))
    assert len(EmbeddingStore(tmp_path)) == 0


def test_a_second_run_makes_no_forward_pass(tiny, tmp_path, monkeypatch):
    items = [Item(text=word) for word in ("a", "b", "c", "a")]
    first = UniMELoader("unime/x", "1", model=tiny, cache_folder=tmp_path).embed([items])
    monkeypatch.setattr(tiny, "forward", lambda *args, **kwargs: pytest.fail("a forward pass"))
    second = UniMELoader("unime/x", "1", model=tiny, cache_folder=tmp_path).embed([items[2:], items[:2]])
    np.testing.assert_array_equal(second, first[[2, 3, 0, 1]])


def test_a_run_that_was_stopped_goes_on_after_its_last_window(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(item_embedder, "WINDOW", 4)
    items = [Item(text=f"text {number}") for number in range(60)]
    given = []
    forward = tiny.forward

    def counted(features, **kwargs):
        given.append(len(features["attention_mask"]))
        return forward(features, **kwargs)

    def stopped():
        yield items[:50]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        UniMELoader("unime/x", "1", model=tiny, cache_folder=tmp_path).embed(stopped())
    kept = len(EmbeddingStore(tmp_path))
    assert 1 <= kept <= 50
    monkeypatch.setattr(tiny, "forward", counted)
    UniMELoader("unime/x", "1", model=tiny, cache_folder=tmp_path).embed([items])
    assert sum(given) == len(items) - kept


def test_another_model_or_setting_is_another_folder(tiny_folder, tmp_path, monkeypatch):
    import shutil
    from pathlib import Path

    monkeypatch.setenv("UNIME_HOME", str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    assert folder_revision(copy) == folder_revision(Path(tiny_folder))
    same = cache_folder(copy, "torch.float32", {})
    assert same == cache_folder(Path(tiny_folder), "torch.float32", {}) != cache_folder(copy, "torch.bfloat16", {})
    (copy / "chat_template.jinja").write_text("other")
    assert cache_folder(copy, "torch.float32", {}) != same
    monkeypatch.setenv("UNIME_EMBEDDING_CACHE", "0")
    assert cache_folder(copy, "torch.float32", {}) is None


def test_two_stages_are_known_by_both_folders(tmp_path, monkeypatch):
    for name in ("embedder", "reranker"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"one")
        monkeypatch.setenv("UNIME_MODEL" if name == "embedder" else "UNIME_RERANKER", str(tmp_path / name))
    monkeypatch.setenv("UNIME_HOME", str(tmp_path))
    before = {name: meta.revision for name, meta in metas().items()}
    (tmp_path / "reranker" / "model.safetensors").write_bytes(b"two")
    after = {name: meta.revision for name, meta in metas().items()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.endswith("+reranker")} > {"unime-tiny+reranker"}
    (tmp_path / "embedder" / "model.safetensors").write_bytes(b"two")
    assert metas()["unime-local+reranker"].revision not in (
        before["unime-local+reranker"],
        after["unime-local+reranker"],
    )
    assert before["unime-tiny"] == folder_revision(PACKAGED)
