"""Converted models lead the usual life of a Sentence Transformers model."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from PIL import Image
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from transformers.utils import output_capturing

from unime_st import UniME
from unime_st.checkpoints.checks import sample_image

Get = Callable[[str], Path]
EMBEDDERS = ["unime-v2-2b", "unime-v2", "unime-v1-llava1.6", "unime-v1-phi3.5"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("files")
    sample_image(90, 60).save(folder / "a.png")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder / "a.png", f"http://127.0.0.1:{server.server_port}/a.png"
        server.shutdown()


@pytest.fixture(scope="module", params=EMBEDDERS)
def model(request: pytest.FixtureRequest, converted: Get) -> SentenceTransformer:
    return SentenceTransformer(str(converted(request.param)), device="cpu")


def test_every_kind_of_input(model: SentenceTransformer, files: tuple[Path, str]) -> None:
    path, url = files
    image = Image.open(path)
    kinds = [image, str(path), url, np.asarray(image), {"image": image}, {"image": str(path)}, {"image": url}]
    vectors = model.encode(kinds, batch_size=3)
    assert np.abs(vectors - vectors[0]).max() < 1e-5
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what"}]}]
    pair = {"text": "what", "image": image}
    both = model.encode([pair, {"image": str(path), "text": "what"}, chat])
    assert np.abs(both - both[0]).max() < 1e-5
    assert np.abs(both[0] - vectors[0]).max() > 1e-3
    assert model.encode("one").ndim == 1
    two = model.encode({"image": [image, sample_image(60, 60)], "text": "two"})
    assert np.abs(two - both[0]).max() > 1e-3
    text = model.encode({"text": str(path)})
    assert np.abs(text - vectors[0]).max() > 1e-3, "a path can be meant as text"


def test_queries_documents_and_prompts(model: SentenceTransformer) -> None:
    rows = ["a cat", {"image": sample_image(), "text": "x"}]
    plain = model.encode(rows)
    assert np.abs(model.encode_query(rows) - plain).max() < 1e-6
    assert np.abs(model.encode_document(rows) - plain).max() < 1e-6
    prompted = model.encode(rows, prompt="Find: ")
    assert np.abs(prompted[0] - model.encode("Find: a cat")).max() < 1e-5
    assert np.abs(prompted - plain).max() > 1e-3
    if "represent_image" in model.prompts:
        named = model.encode(sample_image(), prompt_name="represent_image")
        written = model.encode({"image": sample_image(), "text": "\nRepresent the given image.\n"})
        assert np.abs(named - written).max() < 1e-5


def test_precision_and_dimensions(model: SentenceTransformer) -> None:
    rows = [f"text {index}" for index in range(12)]
    assert model.encode(rows, precision="int8").dtype == np.int8
    assert model.encode(rows, precision="binary").shape == (12, 4)
    cut = model.encode(rows, truncate_dim=8, normalize_embeddings=True)
    assert np.abs(np.linalg.norm(cut, axis=1) - 1).max() < 1e-5
    assert model.similarity(cut, cut).shape == (12, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(converted: Get, model: SentenceTransformer, dtype: torch.dtype) -> None:
    rows = ["a cat", {"image": sample_image(), "text": "x"}]
    folder = str(model.transformers_model.name_or_path)
    half = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": dtype})
    assert half.dtype == dtype
    vectors = half.encode(rows, convert_to_tensor=True).float().numpy()
    assert ((vectors * model.encode(rows)).sum(1) > 0.97).all()


def test_save_load_and_card(model: SentenceTransformer, tmp_path: Path) -> None:
    rows = ["a cat", {"image": sample_image(), "text": "x"}]
    model.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    np.testing.assert_allclose(again.encode(rows), model.encode(rows), atol=1e-6)
    assert again.prompts == model.prompts
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.startswith("---")
    assert "SentenceTransformer(" in card
    modules = (tmp_path / "again" / "modules.json").read_text()
    assert "unime_st" not in modules
    ours = UniME(str(tmp_path / "again"), device="cpu").encode(rows)
    np.testing.assert_allclose(ours, model.encode(rows), atol=1e-6)


@pytest.mark.distributed
def test_pool_of_processes(converted: Get) -> None:
    """Plain class and LLaVA: transformers forgets which outputs of a pickled model it may record."""
    rows = ["a cat", {"image": sample_image(), "text": "x"}, sample_image(60, 90), "words"]
    model = SentenceTransformer(str(converted("unime-v2")), device="cpu")
    assert np.abs(model.encode(rows, device=["cpu"], chunk_size=2) - model.encode(rows)).max() < 1e-5


def test_lora_training_and_adapter(converted: Get, tmp_path: Path) -> None:
    model = SentenceTransformer(str(converted("unime-v2-2b")), device="cpu")
    targets = r".*language_model.*\.(q_proj|v_proj)"
    model.add_adapter(LoraConfig(r=2, target_modules=targets, task_type=TaskType.FEATURE_EXTRACTION))
    words = [f"word {index}" for index in range(8)]
    data = Dataset.from_dict({"anchor": words, "positive": [sample_image(60 + 9 * index, 60) for index in range(8)]})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    before = model.encode(words)
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()
    trained = model.encode(words)
    assert np.abs(trained - before).max() > 1e-4
    model.save_pretrained(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    again = SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    assert np.abs(again.encode(words) - trained).max() < 1e-5


@pytest.mark.parametrize("name", EMBEDDERS)
def test_gradient_cache_with_mixed_columns(converted: Get, name: str) -> None:
    """Mini-batches are cut from the features of a batch, so every feature must count rows alike."""
    model = SentenceTransformer(str(converted(name)), device="cpu")
    column = [
        "text only",
        {"image": sample_image(), "text": "both"},
        {"text": "text"},
        {"image": sample_image(60, 90)},
    ]
    other = [sample_image(90, 60), "words", {"image": sample_image(70, 70), "text": "y"}, "end"]
    gradients = []
    for loss in (MultipleNegativesRankingLoss(model), CachedMultipleNegativesRankingLoss(model, mini_batch_size=1)):
        model.zero_grad()
        loss([model.preprocess(column), model.preprocess(other)], None).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()


def test_unime_class(converted: Get, checkpoint: Get) -> None:
    model = UniME(converted("unime-v2-2b"), device="cpu")
    assert np.abs(np.linalg.norm(model.encode(["a", "b"], truncate_dim=8), axis=1) - 1).max() < 1e-5
    squares = [UniME(converted("unime-v2-2b"), device="cpu", image_size=size) for size in (56, "native")]
    counts = [square.preprocess([sample_image(200, 90)])["input_ids"].shape[1] for square in squares]
    assert counts[0] == 4 < counts[1]
    with pytest.raises(ValueError, match="has no image rule, so image_size=56 would have no effect"):
        UniME("unime-tiny", device="cpu", image_size=56)
    with pytest.raises(ValueError, match=r"bare qwen2_vl checkpoint .*`unime convert"):
        UniME(checkpoint("qwen2-vl"), device="cpu")


def test_unime_class_fixes_native_llava(converted: Get) -> None:
    """Folders of bare backbones hold transformers' classes, whose table of outputs to record is empty in another process."""
    model = UniME(converted("llava-onevision"), device="cpu")
    rows = ["a cat", {"image": sample_image(), "text": "x"}, "words"]
    assert model.preprocess(rows)["batch_num_images"].tolist() == [0, 1, 0]
    expected = model.encode(rows)
    known = dict(output_capturing._CAN_RECORD_REGISTRY)
    try:
        output_capturing._CAN_RECORD_REGISTRY.clear()  # as in a process that receives the model
        model(model.preprocess(rows))
        assert np.abs(deepcopy(model).encode(rows) - expected).max() < 1e-5
    finally:
        dict.update(output_capturing._CAN_RECORD_REGISTRY, known)


def test_reranker(converted: Get, files: tuple[Path, str], tmp_path: Path) -> None:
    model = CrossEncoder(str(converted("unime-v2-reranker")), device="cpu")
    documents = ["a cat", {"image": sample_image()}, str(files[0]), {"image": files[1], "text": "seen on the web"}]
    ranking = model.rank({"image": sample_image(80, 120), "text": "find it"}, documents)
    assert sorted(entry["corpus_id"] for entry in ranking) == [0, 1, 2, 3]
    scores = [entry["score"] for entry in ranking]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    model.save_pretrained(str(tmp_path / "again"))
    again = CrossEncoder(str(tmp_path / "again"), device="cpu")
    assert again.rank("q", documents) == model.rank("q", documents)


def test_long_rows_keep_the_end_of_their_prompt(model: SentenceTransformer) -> None:
    row = {"image": sample_image(), "text": "word " * 500}
    full = model.preprocess([row])["input_ids"][0].tolist()
    before = model.max_seq_length
    try:
        model.max_seq_length = 240
        for rows in ([row], [row, {"text": "short"}], [{"text": "long " * 300}, row]):
            features = model.preprocess(rows)
            assert features["input_ids"].shape[1] == 240
            index = next(i for i, item in enumerate(rows) if item is row)
            tail = (
                full[-4:]
                if "[INST]" in model.processor.chat_template or "|>" in model.tokenizer.decode(full[-4:])
                else []
            )
            ids = features["input_ids"][index].tolist()
            assert ids[len(ids) - len(tail) :] == tail
            assert int(model.processor.image_mask(features["input_ids"][index]).sum()) > 0
        model.max_seq_length = 6
        with pytest.raises(ValueError, match="image"):
            model.preprocess([row])
    finally:
        model.max_seq_length = before
