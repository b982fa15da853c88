"""Search index: every kind, ids, removal, saving, resumed builds, shared vectors, other models, damaged folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

from unime_st import Item, UniME, UniMEReranker
from unime_st.data import PairRecord, RecordSet
from unime_st.data.manifest import StageConflictError
from unime_st.encoding import encode_items, encode_to_shards
from unime_st.encoding.model_inputs import Features
from unime_st.files import FolderInUseError, digest, folder_lock
from unime_st.reranking import search
from unime_st.retrieval import Index, IndexSettings, mine, top_k
from unime_st.retrieval.faiss_engine import Kind, make_engine, sample_recall, search_engine

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TEXTS = [f"a {size} {color} {shape}" for size in ("small", "large") for color in COLORS for shape in SHAPES]
KINDS = ("flat", "hnsw", "ivf", "sq8", "binary")


@pytest.fixture(scope="module")
def model() -> UniME:
    return UniME("unime-tiny", device="cpu")


@pytest.fixture(scope="module")
def vectors(model: UniME) -> np.ndarray:
    return encode_items(model, TEXTS, prompt="")


def found(index: Index, queries: list[str], k: int = 5) -> list[list[str]]:
    return [[hit.id for hit in hits] for hits in index.search(queries, k)]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_before_and_after_saving(model: UniME, vectors: np.ndarray, tmp_path: Path, kind: str):
    index = Index.build(TEXTS, model, ids=TEXTS, kind=kind)
    assert len(index) == len(TEXTS) and index.ids == TEXTS
    index.save(tmp_path / "index")
    loaded = Index.load(tmp_path / "index", model)
    queries = ["red circle", "a blue star", "large cross"]
    scores, exact = top_k(encode_items(model, queries, prompt=""), vectors, 5)
    assert found(loaded, queries) == found(index, queries)
    if kind in ("flat", "hnsw"):
        assert found(index, queries) == [[TEXTS[position] for position in row] for row in exact]
        np.testing.assert_allclose([[h.score for h in hits] for hits in index.search(queries, 5)], scores, atol=1e-5)
    else:
        assert all(
            set(own[:3]) & {TEXTS[i] for i in row} for own, row in zip(found(index, queries), exact, strict=True)
        )
    assert len(index.search(["a star"], 10_000)[0]) <= len(TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_add_and_remove_in_memory_and_mapped(model: UniME, tmp_path: Path, kind: str):
    index = Index.build(TEXTS, model, ids=TEXTS, kind=kind, folder=tmp_path / "index")
    best = found(index, ["a small red circle"], 1)[0][0]
    index.remove([best])
    assert best not in found(index, ["a small red circle"], 20)[0] and len(index) == len(TEXTS) - 1
    with pytest.raises(KeyError, match="is not in the index"):
        index.remove([TEXTS[5], best])
    assert len(index) == len(TEXTS) - 1, "nothing is removed if an id is unknown"
    index.add(["a small red circle"], ["new"])
    assert found(index, ["a small red circle"], 1) == [["new"]]
    with pytest.raises(ValueError, match="occurs twice"):
        index.add(["other"], ["new"])
    index.add([best], [best])
    index.save(tmp_path / "again")
    again = Index.load(tmp_path / "again", model)
    assert again.ids == index.ids and found(again, TEXTS[:3]) == found(index, TEXTS[:3])


def test_images_texts_and_both(model: UniME, tmp_path: Path):
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    items = [tmp_path / "red.png", Image.new("RGB", (56, 56), "blue"), {"image": None, "text": "a star"}, Item("x")]
    items += [{"image": np.zeros((56, 56, 3)), "text": "black"}]
    index = Index.build(items, model, folder=tmp_path / "index")
    assert index.ids == ["0", "1", "2", "3", "4"]
    hit = index.search([Image.new("RGB", (56, 56), "red")], 1)[0][0]
    assert hit.id == "0" and hit.item.image is not None and hit.item.image.path == str(tmp_path / "red.png")
    Index.build(items, model, folder=tmp_path / "whole", image_root=None)
    (tmp_path / "red.png").unlink()  # the index holds its bytes
    hit = Index.load(tmp_path / "whole", model).search([Image.new("RGB", (56, 56), "red")], 1)[0][0]
    assert hit.id == "0" and hit.item.image is not None and hit.item.image.size() == (56, 56)
    for bad in ("https://example.org/a.png", {"image": [Image.new("RGB", (9, 9))] * 2}, {"audio": "a"}, None):
        with pytest.raises(ValueError, match="item 1 "):
            Index.build(["fine", bad], model)


def test_unreadable_items_are_left_out(model: UniME, caplog: pytest.LogCaptureFixture, tmp_path: Path):
    items = [Item("a"), Item(image=b"no image"), Item(image=tmp_path / "absent.png"), Item("b")]
    index = Index.build(items, model, ids=["a", "corrupt", "absent", "b"])
    assert index.ids == ["a", "b"] and "corrupt is left out" in caplog.text and "absent is left out" in caplog.text
    with pytest.raises(ValueError, match="nothing to index"):
        Index.build(items[1:2], model)


def test_prompts_and_reranker(tmp_path: Path):
    model = UniME("unime-tiny", device="cpu", prompts={"query": "find: ", "document": ""})
    index = Index.build(TEXTS, model, ids=TEXTS)
    assert (index.settings.query_prompt, index.settings.prompt) == ("find: ", None)
    expected = model.similarity(model.encode_query(["a star"]), model.encode_document(TEXTS)).max()
    assert index.search(["a star"], 1)[0][0].score == pytest.approx(float(expected), abs=1e-5)
    reranker = UniMEReranker("unime-tiny", template="tiny", device="cpu")
    hits = index.search(["a star"], 4, reranker=reranker)[0]
    assert sorted(hit.id for hit in hits) == sorted(hit.id for hit in index.search(["a star"], 4)[0])
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert index.search([], 3) == [] and Index.build(["a"], model, truncate_dim=16).settings.dim == 16


def test_reranker_gets_the_items(model: UniME, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for color in ("red", "blue"):
        Image.new("RGB", (56, 56), color).save(f"{color}.png")
    items = [Item(image=Path("red.png")), Item(image=Path("blue.png")), Item("red.png")]  # the last one is a text
    index = Index.build(items, model, ids=["red", "blue", "name"])
    reranker = UniMEReranker("unime-tiny", template="tiny", device="cpu")
    hits = index.search(["a red circle"], 3, reranker=reranker)[0]
    assert {hit.id: hit.score for hit in hits} == pytest.approx(
        {name: reranker.rank("a red circle", [item])[0]["score"] for name, item in zip(index.ids, items, strict=True)},
        abs=1e-5,
    )
    Path("blue.png").unlink()
    hits = index.search(["a red circle"], 3, reranker=reranker)[0]
    assert [hit.id for hit in hits][-1] == "blue" and hits[-1].item.image is not None


def test_killed_build_resumes(model: UniME, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("unime_st.encoding.engine.WINDOW", 20)
    calls: list[int] = []
    resumed = False
    forward = UniME.forward

    def killed(self: UniME, features: Features, **kwargs: object) -> object:
        calls.append(len(features["input_ids"]))
        if not resumed and sum(calls) > 40:  # in the third window
            raise KeyboardInterrupt
        return forward(self, features, **kwargs)

    monkeypatch.setattr(UniME, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        Index.build(TEXTS, model, ids=TEXTS, folder=tmp_path / "index", batch_size=1)
    assert not (tmp_path / "index").exists()
    with pytest.raises(FileNotFoundError, match="was interrupted; the same call goes on"):
        Index.load(tmp_path / "index", model)
    kept = len(list((tmp_path / "index.build").glob("vectors-*/vectors-*.npy")))
    assert kept >= 1
    calls.clear()
    resumed = True
    index = Index.build(TEXTS, model, ids=TEXTS, folder=tmp_path / "index", batch_size=1)
    assert sum(calls) == len(TEXTS) - 20 * kept and not (tmp_path / "index.build").exists()
    Index.build(TEXTS, model, ids=TEXTS, folder=tmp_path / "whole", batch_size=1)
    for name in ("index.faiss", "rows-00000.parquet", "items-00000.parquet", "manifest.json"):
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert found(index, TEXTS[:4]) == found(Index.build(TEXTS, model, ids=TEXTS), TEXTS[:4])


def test_a_build_of_other_items_or_another_model_does_not_resume(model: UniME, tmp_path: Path):
    work = tmp_path / "index.build"
    encode_to_shards(model, ["a", "b"], work / f"vectors-{digest(Item('a').id, Item('b').id, length=16)}", prompt="x")
    index = Index.build(["a", "b"], model, folder=tmp_path / "index")
    assert index.search(["a"], 1)[0][0].score == pytest.approx(1, abs=1e-5)
    with folder_lock(work), pytest.raises(FolderInUseError, match=r"index.build is in use by process \d+"):
        Index.build(["a"], model, folder=tmp_path / "index", overwrite=True)


def test_other_models_are_refused(model: UniME, tmp_path: Path):
    Index.build(TEXTS[:5], model, folder=tmp_path / "index")
    other = UniME("unime-tiny", device="cpu")
    with torch.no_grad():
        other[0].model.get_input_embeddings().weight[17] += 1
    with pytest.raises(ValueError, match=r"built with another model.*'unime-tiny'"):
        Index.load(tmp_path / "index", other)
    index = Index.load(tmp_path / "index")
    index.model = other
    with pytest.raises(ValueError, match="built with another model"):
        index.search(["a"])
    with pytest.raises(ValueError, match="built with another model"):
        index.add(["a"], ["b"])


def test_a_saved_copy_is_the_same_model(tmp_path: Path):
    model = UniME("unime-tiny", device="cpu")
    index = Index.build(["a", "b"], model, folder=tmp_path / "index")
    model.save_pretrained(str(tmp_path / "copy"))
    assert index.search(["a"], 1)[0][0].id == "0"
    copy = UniME(str(tmp_path / "copy"), device="cpu")
    assert Index.load(tmp_path / "index", copy).search(["a"], 1)[0][0].id == "0"


def test_weights_are_read_once_for_every_model(model: UniME, monkeypatch: pytest.MonkeyPatch):
    index, other, calls = Index.build(TEXTS[:5], model), UniME("unime-tiny", device="cpu"), list[object]()
    check = IndexSettings.check_model
    monkeypatch.setattr(IndexSettings, "check_model", lambda self, own: calls.append(own) or check(self, own))
    for _ in range(3):
        index.check_model(other)
        index.search(["a star"])
    assert calls == [other, model]


def test_other_prompts_and_truncations_are_refused(model: UniME, tmp_path: Path):
    Index.build(TEXTS[:5], model, folder=tmp_path / "index")
    other = UniME("unime-tiny", device="cpu", prompts={"query": "find: "})
    with pytest.raises(ValueError, match=r"declared the prompts \(None, None\).*now they are \(None, 'find: '\)"):
        Index.load(tmp_path / "index", other)
    short = UniME("unime-tiny", device="cpu", truncate_dim=16)
    with pytest.raises(ValueError, match="dimension 16, the index has 128"):
        Index.load(tmp_path / "index", short).search(["a"])
    assert Index.build(TEXTS[:5], short, folder=tmp_path / "short").settings.dim == 16
    assert Index.load(tmp_path / "short", model).search(["a"], 1)[0]


def test_a_model_with_dot_products(tmp_path: Path):
    model = UniME("unime-tiny", device="cpu", similarity_fn_name="dot")
    del model[-1]  # the normalization
    index = Index.build(TEXTS[:9], model, folder=tmp_path / "index")
    best = float(model.similarity(model.encode(["a star"]), model.encode(TEXTS[:9]))[0].max())
    assert index.search(["a star"], 1)[0][0].score == pytest.approx(best, rel=1e-5) and best > 1.5


@pytest.mark.slow
def test_vectors_of_mining_are_not_encoded_again(model: UniME, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pairs = [PairRecord(Item(f"find {text}"), Item(text)) for text in TEXTS[:20]]
    records = RecordSet.write(tmp_path / "records", pairs, {"source": "test"})
    mine(records, model, tmp_path / "pools", num_candidates=2, vectors=tmp_path / "vectors")
    whole = Index.build(records, model)
    with monkeypatch.context() as patched:
        patched.setattr(UniME, "forward", lambda *args, **kwargs: pytest.fail("encoded again"))
        index = Index.build(records, model, vectors=tmp_path / "vectors", folder=tmp_path / "index")
    assert index.ids == whole.ids == [Item(text).id for text in TEXTS[:20]]
    assert found(index, TEXTS[:20], 1) == found(whole, TEXTS[:20], 1) == [[name] for name in index.ids]
    with pytest.raises(StageConflictError, match="prompt: None there, 'x' now"):
        Index.build(records, model, vectors=tmp_path / "vectors", prompt="x")
    with pytest.raises(ValueError, match="pass its RecordSet"):
        Index.build(TEXTS, model, vectors=tmp_path / "vectors")


def test_two_stage_search_uses_the_vectors_of_the_index(model: UniME, monkeypatch: pytest.MonkeyPatch):
    index, reranker = Index.build(TEXTS, model, ids=TEXTS), UniMEReranker("unime-tiny", template="tiny", device="cpu")
    seen: list[Item] = []
    encode = Index._encode
    monkeypatch.setattr(Index, "_encode", lambda self, items, *rest: seen.extend(items) or encode(self, items, *rest))
    rankings = search(["a red star", "a ring"], index, model, reranker, top_k=3)
    assert [item.text for item in seen] == ["a red star", "a ring"]
    expected = search(["a red star", "a ring"], TEXTS, model, reranker, top_k=3)
    for own, other in zip(rankings, expected, strict=True):
        assert [entry["corpus_id"] for entry in own] == [TEXTS[entry["corpus_id"]] for entry in other]
        for name in ("score", "similarity"):
            assert [entry[name] for entry in own] == pytest.approx([entry[name] for entry in other], abs=1e-5)
    with pytest.raises(ValueError, match="built with another model"):
        search(["a"], index, UniME("unime-tiny", device="cpu", model_kwargs={"dtype": "bfloat16"}), reranker)
    with pytest.raises(ValueError, match=r"queries\[0\]: an empty text"):
        search([""], index, model, reranker)


def test_saving_over_itself(model: UniME, tmp_path: Path):
    index = Index.build(TEXTS, model, ids=TEXTS, folder=tmp_path / "index")
    index.add(["a green field"], ["field"])
    index.remove(TEXTS[:2])
    with pytest.raises(FileExistsError):
        index.save(tmp_path / "index")
    index.save(tmp_path / "index", overwrite=True)
    again = Index.load(tmp_path / "index", model)
    assert again.ids == [*TEXTS[2:], "field"] and found(again, ["a green field"], 1) == [["field"]]
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileExistsError, match="not an index, so it is not overwritten"):
        index.save(tmp_path / "photos", overwrite=True)


def test_more_results_than_items(model: UniME, caplog: pytest.LogCaptureFixture):
    index = Index.build(TEXTS[:3], model)
    assert len(index.search(["a"], 20)[0]) == 3
    assert "k is 20, but the index has 3 items: all are returned" in caplog.text
    with pytest.raises(TypeError, match="a list or an iterator of inputs, got a single"):
        index.search("a")
    index.remove(["0", "1", "2"])
    assert index.search(["a"]) == [[]]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_few_queries_are_searched_by_matrix_products(kind: Kind):
    """One by one, a few dozen, and enough for faiss's own threshold, which stays as it was."""
    vectors = np.random.default_rng(0).standard_normal((3000, 128), dtype=np.float32)
    engine, threshold = make_engine(kind, vectors), faiss.cvar.distance_compute_blas_threshold
    scores, positions = search_engine(engine, vectors[:1200], 5, ())
    for count in (1, 3, 4, 40):
        own_scores, own_positions = search_engine(engine, vectors[:count], 5, ())
        np.testing.assert_array_equal(own_positions, positions[:count])
        np.testing.assert_allclose(own_scores, scores[:count], rtol=1e-5, atol=1e-4)
    assert faiss.cvar.distance_compute_blas_threshold == threshold
    if kind == "flat":
        np.testing.assert_array_equal(positions[:40], top_k(vectors[:40], vectors, 5)[1])


def test_recall_of_the_kinds():
    rng = np.random.default_rng(0)
    centers = 3 * rng.standard_normal((50, 64))
    vectors = (centers[rng.integers(50, size=2000)] + rng.standard_normal((2000, 64))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    recall = {kind: sample_recall(make_engine(kind, vectors), vectors) for kind in KINDS}
    assert recall["flat"] == 1 and min(recall[kind] for kind in ("hnsw", "ivf", "sq8")) > 0.9
    assert 0.2 < recall["binary"] < recall["sq8"]


def newer(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))


def truncated(folder: Path) -> None:
    (folder / "index.faiss").write_bytes((folder / "index.faiss").read_bytes()[:100])


def garbage(folder: Path) -> None:
    (folder / "index.faiss").write_bytes(b"x" * (folder / "index.faiss").stat().st_size)


def missing(folder: Path) -> None:
    (folder / "index.faiss").unlink()


def swapped(folder: Path) -> None:
    (folder / "rows-00000.parquet").write_bytes((folder / "items-00000.parquet").read_bytes())


def incomplete(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["settings"]["dim"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage", [newer, truncated, garbage, missing, swapped, incomplete], ids=lambda damage: damage.__name__
)
def test_damaged_folders(model: UniME, tmp_path: Path, damage: Callable[[Path], None]):
    Index.build(TEXTS[:5], model, folder=tmp_path / "index")
    damage(tmp_path / "index")
    with pytest.raises(ValueError, match=r"has changed since|is missing|lacks 'dim'|schema_version is 99"):
        Index.load(tmp_path / "index", model)
    with pytest.raises(FileNotFoundError):
        Index.load(tmp_path / "absent", model)


def test_wrong_options(model: UniME, tmp_path: Path):
    with pytest.raises(ValueError, match="kind must be one of"):
        Index.build(["a"], model, kind="tree")  # type: ignore[arg-type]
    for ids in (["a"], ["a", "b", "c"], ["a", "a"]):
        with pytest.raises(ValueError, match=r"ids|occurs twice"):
            Index.build(["x", "y"], model, ids=ids)
    index = Index.build(["a"], model, folder=tmp_path / "index")
    with pytest.raises(ValueError, match="k must be at least 1"):
        index.search(["a"], 0)
    with pytest.raises(FileExistsError, match="overwrite"):
        Index.build(["a"], model, folder=tmp_path / "index")
    assert len(Index.build(["a", "b"], model, folder=tmp_path / "index", overwrite=True)) == 2
