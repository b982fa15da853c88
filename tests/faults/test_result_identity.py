"""Result identity: scores and vectors are reused only for the model, the second stage and the items they are of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from mteb_tasks import TwoStage, wrap
from mteb_tasks.scenes import ScenesVQA
from unime_st import Item, UniME, UniMEReranker
from unime_st.data import StageConflictError
from unime_st.encoding import encode_items, encode_to_shards


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mteb.ResultCache:
    """An empty cache of results; embeddings are kept beside it."""
    monkeypatch.setenv("UNIME_HOME", str(tmp_path / "home"))
    return mteb.ResultCache(tmp_path / "results")


def tiny() -> UniME:
    return UniME("unime-tiny", device="cpu")


def ruin(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def score(model: object, cache: mteb.ResultCache | None = None, size: int = 60) -> float:
    found = mteb.evaluate(model, ScenesVQA(size=size), cache=cache, co2_tracker=False, show_progress_bar=False)  # type: ignore[arg-type]
    return float(found.task_results[0].get_score())


def switch_off(model: UniME) -> None:
    model.disable_adapters()


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "plain"])
@pytest.mark.parametrize("change", [ruin, switch_off], ids=lambda change: change.__name__)
@pytest.mark.slow
def test_scores_of_a_model_before_it_changed(cache: mteb.ResultCache, change: Callable[[UniME], None], wrapped: bool):
    inner = tiny()
    torch.manual_seed(0)
    options = {"r": 8, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    inner.add_adapter(LoraConfig(**options))  # type: ignore[arg-type]
    model = wrap(inner) if wrapped else inner
    before = score(model, cache)
    assert score(model, cache) == before
    change(inner)
    assert score(model, cache) == score(wrap(inner)) != before


def test_embeddings_of_a_wrapped_model_before_it_changed():
    inner = tiny()
    model = wrap(inner)
    first = score(model)
    ruin(inner)
    assert score(model) == score(wrap(inner)) != first


def test_scores_of_other_scenes(cache: mteb.ResultCache):
    model = wrap(tiny())

    def found(**options: int) -> float:
        result = mteb.evaluate(model, ScenesVQA(**options), cache=cache, co2_tracker=False, show_progress_bar=False)
        entry = result.task_results[0].scores["test"][0]
        return float(entry["chance"]) + float(entry["ndcg_at_10"])

    drawn: list[dict[str, int]] = [{"size": 20}, {"size": 40}, {"size": 40, "data_seed": 1}]
    expected = [found(**options) for options in drawn]
    assert min(abs(a - b) for a, b in combinations(expected, 2)) > 1e-3
    again = [found(**options) for options in drawn[::-1]]
    assert np.allclose(again[::-1], expected, atol=1e-4), "stored scores are rounded"
    assert ScenesVQA().metadata is ScenesVQA.metadata and ScenesVQA(size=20).metadata.revision.endswith("20-seed-0")


def test_scores_of_the_same_scenes_are_reused(cache: mteb.ResultCache):
    model = wrap(tiny())
    score(model, cache, 20)
    file = cache.get_task_result_path("ScenesVQA", model.mteb_model_meta)
    before = file.stat().st_mtime_ns
    score(model, cache, 20)
    assert file.stat().st_mtime_ns == before


def test_scores_of_another_second_stage(cache: mteb.ResultCache):
    embedder, good, bad = (
        wrap(tiny()),
        UniMEReranker("unime-tiny", device="cpu"),
        UniMEReranker("unime-tiny", device="cpu"),
    )
    ruin(bad)
    first, second = (TwoStage(embedder, reranker, top_k=3) for reranker in (good, bad))
    assert first.mteb_model_meta.revision != second.mteb_model_meta.revision
    score(first, cache, 20)
    assert cache.load_task_result("ScenesVQA", first.mteb_model_meta) is not None
    assert cache.load_task_result("ScenesVQA", second.mteb_model_meta) is None
    assert TwoStage(embedder, good, top_k=3).mteb_model_meta == first.mteb_model_meta


def test_a_revision_that_was_given_stays():
    inner = tiny()
    model = wrap(inner, "unime/tiny", "1")
    ruin(inner)
    assert model.mteb_model_meta.revision == "1"


def other_items(folder: Path) -> dict[str, tuple[Iterable[object], str]]:
    """Items that are not those of the folder, and what the error says."""
    return {
        "text": (["a", "c"], "item 1 is not 'c'"),
        "iterator": (iter(["x", "b"]), "item 0 is not 'x'"),
        "fewer": (["a"], "holds 2 vectors, not 1"),
        "more": (["a", "b", "c"], "holds 2 vectors, not 3"),
        "shorter iterator": (iter(["a"]), "there are 2 of them, and the items end after 1"),
        "iterator that was read before": (iter([]), "the items end after 0, as those of an iterator"),
        "longer iterator": (iter(["a", "b", "c"]), "there are 2 of them, and item 2 is 'c'"),
        "image": ([Item("a"), Item(image=Image.new("RGB", (56, 56)))], "item 0 is not"),
    }


@pytest.mark.parametrize("name", other_items(Path()))
@pytest.mark.slow
def test_stored_vectors_of_other_items(tmp_path: Path, name: str):
    stored = encode_to_shards(tiny(), ["a", "b"], tmp_path / "vectors", show_progress_bar=False)[:]
    items, message = other_items(tmp_path)[name]
    with pytest.raises(StageConflictError, match=message):
        encode_to_shards(tiny(), items, tmp_path / "vectors", show_progress_bar=False)  # type: ignore[arg-type]
    again = encode_to_shards(tiny(), iter(["a", "b"]), tmp_path / "vectors", show_progress_bar=False)
    assert np.array_equal(again[:], stored)


def test_stored_vectors_of_an_image_file_that_was_replaced(tmp_path: Path):
    path = tmp_path / "image.png"
    for value in ({"image": str(path)}, Item(image=path)):
        Image.new("RGB", (56, 56), "red").save(path)
        folder = tmp_path / type(value).__name__
        encode_to_shards(tiny(), [value], folder, show_progress_bar=False)
        Image.new("RGB", (56, 56), "blue").save(path)
        fresh = Item(image=path) if isinstance(value, Item) else value
        with pytest.raises(StageConflictError, match="item 0 is not"):
            encode_to_shards(tiny(), [fresh], folder, show_progress_bar=False)


def test_stored_vectors_of_image_files_that_were_copied(tmp_path: Path):
    path, copied = tmp_path / "image.png", tmp_path / "copy.png"
    Image.new("RGB", (56, 56), "red").save(path)
    forms: list[Any] = [{"image": str(path)}, str(path)]
    for number, value in enumerate(forms):
        stored = encode_to_shards(tiny(), [value], tmp_path / str(number), show_progress_bar=False)[:]
        copied.write_bytes(path.read_bytes())
        copied.replace(path)  # another file of the same content
        again = encode_to_shards(tiny(), [value], tmp_path / str(number), show_progress_bar=False)
        assert np.array_equal(again[:], stored)


def test_an_image_file_that_was_not_there_keeps_its_empty_row(tmp_path: Path):
    items: list[Any] = ["a", {"image": str(tmp_path / "late.png")}]
    options: Any = {"on_error": "skip", "show_progress_bar": False}
    encode_to_shards(tiny(), items, tmp_path / "vectors", **options)
    Image.new("RGB", (56, 56), "red").save(tmp_path / "late.png")
    found = encode_to_shards(tiny(), items, tmp_path / "vectors", **options)
    assert np.isnan(found[1]).all() and not np.isnan(found[0]).any()


@pytest.mark.slow
def test_interrupted_vectors_of_other_items(tmp_path: Path):
    def broken() -> Iterator[str]:
        yield from (f"text {row}" for row in range(5000))
        raise KeyboardInterrupt

    folder = tmp_path / "vectors"
    with pytest.raises(KeyboardInterrupt):
        encode_to_shards(tiny(), broken(), folder, show_progress_bar=False)
    assert list(folder.glob("vectors-*.npy"))
    with pytest.raises(StageConflictError, match="item 0 is not 'other 0'"):
        encode_to_shards(tiny(), (f"other {row}" for row in range(5000)), folder, show_progress_bar=False)
    for short in (0, 10):
        with pytest.raises(StageConflictError, match=f"the items end after {short}"):
            encode_to_shards(tiny(), (f"text {row}" for row in range(short)), folder, show_progress_bar=False)
    finished = encode_to_shards(tiny(), (f"text {row}" for row in range(5000)), folder, show_progress_bar=False)
    assert np.allclose(finished[[0, 4999]], tiny().encode(["text 0", "text 4999"]), atol=1e-5)


@pytest.mark.parametrize("form", [lambda array: array, lambda array: [array]], ids=["array", "list"])
def test_one_array_that_an_iterator_fills_again_and_again(form: Callable[[np.ndarray], object]):
    buffer = np.zeros((56, 56, 3), np.uint8)

    def frames() -> Iterator[dict[str, object]]:
        for value in (0, 120, 255):
            buffer[:] = value
            yield {"image": form(buffer)}

    expected = tiny().encode([{"image": np.full_like(buffer, value)} for value in (0, 120, 255)])
    assert np.allclose(encode_items(tiny(), frames()), expected, atol=1e-5)
