"""Prompts in training: queries and documents are the inputs of encode_query and encode_document, on every path."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tiny_checkpoints import embedding_gemma2

from unime_st import UniME, stages
from unime_st.checkpoints import convert
from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordSet
from unime_st.training.evaluation import RetrievalEvaluator
from unime_st.training.feed import ItemFeatures
from unime_st.training.item_prompts import ItemPrompts

INSTRUCTION = "Find the image of this color."
PATHS: dict[str, dict[str, object]] = {
    "plain": {},
    "cached": {"mini_batch_size": 3},
    "all activations": {"mini_batch_size": 3, "gradient_caching": False},
    "token budget": {"token_budget": 200},
    "frozen tower": {"lora_rank": 4, "mini_batch_size": 3},
    "item cache": {"item_cache": 64},
    "item cache, cached": {"item_cache": 64, "mini_batch_size": 3, "lora_rank": 4},
    "vision cache": {"vision_cache": "vision", "lora_rank": 4},
    "workers": {"dataloader_num_workers": 2, "mini_batch_size": 3},
}


@pytest.fixture
def model(checkpoint: Callable[[str], Path], shared_folder: Callable[..., Path]) -> Path:
    """A tiny random checkpoint with the template of Qwen3-VL-Embedding: the instruction stands in the system turn."""
    recipe = "qwen3-vl-embedding"
    return shared_folder(f"prompted-{recipe}", lambda folder: convert(checkpoint("qwen3-vl"), recipe, output=folder))


def _pairs(queries: Sequence[str]) -> list[PairRecord]:
    """Texts with images; the negative is the query of another row, so it is in use on both sides."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)) for _ in queries]
    negatives = [*queries[1:], queries[0]]
    return [
        PairRecord(Item(query), Item(image=image), negatives=[Item(negative)])
        for query, image, negative in zip(queries, images, negatives, strict=True)
    ]


@pytest.fixture
def records(tmp_path: Path) -> RecordSet:
    return RecordSet.write(tmp_path / "records", _pairs(["red", "green", "dark blue", "a gray one", "white"]), {})


def _options(model: Path, records: RecordSet, output: Path, **options: object) -> stages.InBatchArguments:
    small = {"lora_rank": 0, "lora_dropout": 0.0, "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1}
    batch = {"per_device_train_batch_size": len(records), "max_steps": 2, "temperature": 0.05, "num_negatives": 1}
    values = {**small, **batch, "model": str(model), "data": str(records.folder), "output": str(output), **options}
    return stages.InBatchArguments(**values)


def _losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def _loss_of_vectors(model: SentenceTransformer, records: RecordSet, **prompts: str) -> float:
    queries = model.encode_query([pair.query.to_input() for pair in records], **prompts)
    items = [*(pair.positive for pair in records), *(pair.negatives[0] for pair in records)]
    documents = model.encode_document([item.to_input() for item in items])
    logits = torch.from_numpy(queries @ documents.T) / 0.05
    return float(torch.nn.functional.cross_entropy(logits, torch.arange(len(logits))))


@pytest.mark.slow
def test_every_path_trains_on_the_inputs_of_encode_query_and_encode_document(
    model: Path, records: RecordSet, tmp_path: Path
) -> None:
    released = SentenceTransformer(str(model), device="cpu")
    without = _loss_of_vectors(released, records)
    expected = _loss_of_vectors(released, records, prompt=INSTRUCTION)
    assert abs(expected - without) > 1e-2, "the instruction matters, so equality means something"
    second: dict[bool, list[float]] = {True: [], False: []}
    for name, options in PATHS.items():
        if "vision_cache" in options:
            options = {**options, "vision_cache": str(tmp_path / "vision")}
        args = _options(model, records, tmp_path / name, query_prompt=INSTRUCTION, **options)
        losses = _losses(stages.train_in_batch(args))
        assert losses[0] == pytest.approx(expected, abs=1e-4), name
        second["lora_rank" in options].append(losses[1])
    for losses in second.values():  # so the gradients of the first step were equal as well
        np.testing.assert_allclose(losses, losses[0], atol=2e-4)
    trained = SentenceTransformer(str(tmp_path / "cached"), device="cpu")
    assert trained.prompts["query"] == INSTRUCTION and trained.prompts["document"] == ""
    assert _loss_of_vectors(trained, records) < expected, "encode_query of the trained model has the instruction"
    plain = _losses(stages.train_in_batch(_options(model, records, tmp_path / "none")))
    assert plain[0] == pytest.approx(without, abs=1e-4)


@pytest.mark.slow
def test_embedding_gemma_2_is_trained_with_its_stored_prompts(
    shared_folder: Callable[..., Path], records: RecordSet, tmp_path: Path
) -> None:
    folder = shared_folder("official-embeddinggemma-2", embedding_gemma2)
    released = SentenceTransformer(str(folder), device="cpu")
    expected = _loss_of_vectors(released, records)
    assert abs(expected - _loss_of_vectors(released, records, prompt="")) > 1e-2
    curves: list[list[float]] = []
    for number, options in enumerate(({}, {"mini_batch_size": 3}, {"item_cache": 64})):
        args = _options(folder, records, tmp_path / str(number), lora_rank=4, **options)
        curves.append(_losses(stages.train_in_batch(args)))
    np.testing.assert_allclose(curves, curves[:1] * 3, rtol=1e-4)
    assert curves[0][0] == pytest.approx(expected, rel=1e-4) and curves[0][1] < expected
    trained = SentenceTransformer(str(tmp_path / "0"), device="cpu")
    assert trained.prompts["query"] == released.prompts["query"] and _loss_of_vectors(trained, records) < expected


def test_stored_prompts_of_both_sides_are_the_default(model: Path, records: RecordSet) -> None:
    unime = UniME(model, device="cpu")
    unime.prompts.update(query=INSTRUCTION, document="Represent the image")
    prompts = ItemPrompts(records, unime)
    features = ItemFeatures(records, unime.preprocess, options=prompts.options)
    table = records.row_shards.table(["query", "positive"])
    stored = np.stack([records.items.positions(table[n].to_pylist()) for n in ("query", "positive")], axis=1)
    queries, documents = prompts.positions(["query", "positive"], stored).T
    for positions, name in ((queries, "query"), (documents, "document")):
        items = [getattr(pair, "positive" if name == "document" else name).to_input() for pair in records]
        expected = unime.preprocess(items, prompt=unime.prompts[name], task=name)
        found = features(positions.tolist())
        assert torch.equal(found["input_ids"], expected["input_ids"])
        tokens, _ = prompts.costs(np.zeros(len(records.items), dtype=np.int64), np.zeros(len(records.items)))
        added = expected["attention_mask"].sum(1) - unime.preprocess(items)["attention_mask"].sum(1)
        assert tokens[positions].tolist() == added.tolist()
    with pytest.raises(ValueError, match="expected queries or documents, found both"):
        features([int(queries[0]), int(documents[0])])


def test_queries_that_carry_the_instruction_do_not_get_it_twice(model: Path, tmp_path: Path) -> None:
    carried = f"{INSTRUCTION} red"
    records = RecordSet.write(tmp_path / "carried", _pairs([carried, "green", f" {INSTRUCTION}\nblue"]), {})
    unime = UniME(model, device="cpu")
    unime.prompts["query"] = INSTRUCTION
    prompts = ItemPrompts(records, unime)
    features = ItemFeatures(records, unime.preprocess, options=prompts.options)
    for pair in records:
        stored = np.array([[records.items.position(pair.query.id)]])
        row = features(prompts.positions(["query"], stored)[0].tolist())["input_ids"][0]
        assert str(unime.tokenizer.decode(row)).count(INSTRUCTION) == 1, pair


def test_evaluation_while_training_has_the_prompts_of_both_sides(model: Path, records: RecordSet) -> None:
    unime = UniME(model, device="cpu")
    unime.prompts["query"] = INSTRUCTION
    queries = unime.encode_query([pair.query.to_input() for pair in records])
    documents = unime.encode_document([pair.positive.to_input() for pair in records])
    scores = queries @ documents.T
    own = scores.diagonal()[:, None]
    same = np.array([[pair.query == other.positive for other in records] for pair in records])
    expected = 1 + ((scores > own) & ~same).sum(axis=1)
    assert RetrievalEvaluator(records).ranks(unime).tolist() == expected.tolist()


def test_the_option_of_sentence_transformers_points_to_ours() -> None:
    with pytest.raises(ValueError, match="prompts cannot be set here: see query_prompt and document_prompt"):
        stages.InBatchArguments(prompts="x")
