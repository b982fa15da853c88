"""Model identity: stored vectors and pools are reused only by a model that would compute the same ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from sentence_transformers import SentenceTransformer
from tiny_embedder import write_tiny_embedder

from unime_st import Item, UniME
from unime_st.data import PairRecord, RecordSet, StageConflictError
from unime_st.encoding import encode_items, encode_to_shards, model_fingerprint, weights_fingerprint
from unime_st.retrieval import mine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_embedder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool])
def test_every_row_and_column_counts(dtype: torch.dtype):
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(700, 90, dtype=dtype))

    table, rng = Table(), np.random.default_rng(0)
    seen = {weights_fingerprint(table)}
    for row, column in rng.integers(0, (700, 90), (40, 2)).tolist():
        changed = copy.deepcopy(table)
        changed.table[row, column] = 0
        seen.add(weights_fingerprint(changed))
    assert len(seen) == 1 + len({tuple(cell) for cell in np.random.default_rng(0).integers(0, (700, 90), (40, 2))})
    mixed = copy.deepcopy(table)
    mixed.table = (torch.arange(700 * 90).reshape(700, 90) % 7).to(dtype)
    swapped = copy.deepcopy(mixed)
    swapped.table[[3, 4]] = mixed.table[[4, 3]]
    assert weights_fingerprint(mixed) == weights_fingerprint(copy.deepcopy(mixed))
    if dtype != torch.bool:
        assert weights_fingerprint(swapped) != weights_fingerprint(mixed)


def test_blocks_do_not_change_the_fingerprint(folder: str, monkeypatch: pytest.MonkeyPatch):
    model = SentenceTransformer(folder, device="cpu")
    whole = weights_fingerprint(model)
    monkeypatch.setattr("unime_st.encoding.model_identity._CHUNK", 100)
    assert weights_fingerprint(model) == whole


def last_norm(model: UniME) -> None:
    with torch.no_grad():
        model[0].model.language_model.norm.weight[3] *= 2


def one_token(model: UniME) -> None:
    with torch.no_grad():
        model[0].model.get_input_embeddings().weight[77, 5] += 1e-3


def template(model: UniME) -> None:
    model.processor.chat_template = "{{ 'x' }}" + model.processor.chat_template


def image_pixels(model: UniME) -> None:
    model.processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}


def sequence_length(model: UniME) -> None:
    model.max_seq_length = 9


def processing_options(model: UniME) -> None:
    model[0].processing_kwargs = {"text": {"truncation": False}}


def pooling(model: UniME) -> None:
    model[1].pooling_mode = "mean"


def half_precision(model: UniME) -> None:
    model.to(torch.bfloat16)


def padding(model: UniME) -> None:
    model.tokenizer.padding_side = "right"


def frequencies(model: UniME) -> None:
    model[0].model.config.text_config.rope_parameters["rope_theta"] = 5e4


CHANGES: list[Callable[[UniME], None]] = [
    last_norm,
    one_token,
    template,
    image_pixels,
    sequence_length,
    processing_options,
    pooling,
    half_precision,
    padding,
    frequencies,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_vectors_changes_the_fingerprint(folder: str, change: Callable[[UniME], None]):
    model = UniME(folder, device="cpu")
    before = model_fingerprint(model)
    assert before == model_fingerprint(SentenceTransformer(folder, device="cpu")) == model_fingerprint(model)
    change(model)
    assert model_fingerprint(model) != before


def test_use_and_copies_do_not_change_the_fingerprint(folder: str, tmp_path: Path):
    model = UniME(folder, device="cpu")
    before = model_fingerprint(model)
    model.encode(["a", "b " * 30, Image.new("RGB", (30, 30))], truncate_dim=8)
    assert model_fingerprint(model) == before == model_fingerprint(copy.deepcopy(model))
    model.save_pretrained(str(tmp_path / "copy"))
    assert model_fingerprint(UniME(tmp_path / "copy", device="cpu")) == before


def test_adapters_count_by_their_state(folder: str):
    model = SentenceTransformer(folder, device="cpu")
    seen = [model_fingerprint(model)]
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    seen.append(model_fingerprint(model))
    model.disable_adapters()
    seen.append(model_fingerprint(model))
    model.enable_adapters()
    assert len(set(seen)) == 3 and model_fingerprint(model) == seen[1]


def test_stored_vectors_of_another_image_size(converted: Callable[[str], Path], tmp_path: Path):
    items = [Item(image=Image.linear_gradient("L").resize((224, 160)))]
    for size in (56, 84):
        model = UniME(converted("unime-v2-2b"), image_size=size, device="cpu")
        options: dict[str, Any] = {"show_progress_bar": False}
        if size == 84:
            with pytest.raises(StageConflictError, match="model"):
                encode_to_shards(model, items, tmp_path / "vectors", **options)
        stored = encode_to_shards(model, items, tmp_path / "vectors", overwrite=size == 84, **options)
        np.testing.assert_allclose(stored[:], encode_items(model, items), atol=1e-6)


def test_mined_vectors_of_another_prompt(folder: str, tmp_path: Path):
    records = RecordSet.write(tmp_path / "records", [PairRecord(Item(f"q {i}"), Item(f"p {i}")) for i in range(4)], {})
    model = SentenceTransformer(folder, device="cpu", prompts={"find": "find this: "})
    mine(records, model, tmp_path / "plain", num_candidates=2, vectors=tmp_path / "vectors")
    model.default_prompt_name = "find"
    with pytest.raises(StageConflictError, match="prompt"):
        mine(records, model, tmp_path / "other", num_candidates=2, vectors=tmp_path / "vectors")
