"""Other publishers' models: converted folders give what the publishers' code gives, done by hand on stock classes."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer
from tiny_checkpoints import VIDEO, embedding_gemma2, qwen
from tokenizers import Regex, Tokenizer, normalizers, processors
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from unime_st import Item, UniME, UniMEReranker, stages
from unime_st.checkpoints import convert
from unime_st.checkpoints.checks import sample_image
from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records
from unime_st.judging import Group, LocalJudge
from unime_st.recipes import get_recipe

Row = tuple[str | None, Image.Image | None]
Make = Callable[[str, Callable[[Path], object]], Path]
INSTRUCTION = "Find the matching image"
ROWS: list[Row] = [
    ("a red circle", None),
    (None, sample_image(120, 80)),
    (" What is\n\nit? ", sample_image(60, 90)),
    ("", None),
    ("word " * 40, None),
]


def _edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _with_end_token(folder: Path) -> None:
    """The tokenizer ends every text with <|endoftext|>, as Qwen's embedding models have it."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = "<|endoftext|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, backend.token_to_id(end))]
    )
    backend.save(str(folder / "tokenizer.json"))


def _qwen3_vl_embedding(folder: Path) -> None:
    qwen(folder, "Qwen3VL")
    _with_end_token(folder)


def _gme(folder: Path) -> None:
    qwen(folder, "Qwen2VL")
    auto_map = {"AutoConfig": "modeling_gme_qwen2vl.GmeConfig", "AutoModel": "modeling_gme_qwen2vl.GmeQwen2VL"}
    _edit(folder / "config.json", architectures=["GmeQwen2VL"], auto_map=auto_map)


def _wemm(folder: Path) -> None:
    """A pooled token of its own, and a normalizer that removes line breaks at the end of lines."""
    qwen(folder, "Qwen3_5")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<embedding>"])
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\n$"), "")])
    backend.save(str(folder / "tokenizer.json"))
    _edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    _edit(folder / "config.json", architectures=["WeMMEmbedding"], auto_map={"AutoModel": "modeling_wemm_embedding.W"})
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.resize_token_embeddings(backend.get_vocab_size())
    model.save_pretrained(folder)


OFFICIAL: dict[str, Callable[[Path], object]] = {
    "qwen3-vl-embedding": _qwen3_vl_embedding,
    "gme": _gme,
    "ops-mm-embedding": lambda folder: qwen(folder, "Qwen2VL"),
    "wemm-embedding": _wemm,
}


def _conversation(text: str | None, image: Image.Image | None, instruction: str | None) -> list[dict[str, Any]]:
    """Messages as the script of Qwen3-VL-Embedding builds them."""
    instruction = (instruction or "").strip()
    if instruction and not unicodedata.category(instruction[-1]).startswith("P"):
        instruction += "."
    content: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    content += [] if text is None else [{"type": "text", "text": text}]
    system = {"type": "text", "text": instruction or "Represent the user's input."}
    return [{"role": "system", "content": [system]}, {"role": "user", "content": content}]


def _framed(text: str | None, image: Image.Image | None, instruction: str | None) -> str:
    """Prompt as the loaders of GME and Ops-MM-embedding build it."""
    body = ("" if image is None else "<|vision_start|><|image_pad|><|vision_end|>") + (text or "")
    return (
        f"<|im_start|>system\n{instruction or 'You are a helpful assistant.'}<|im_end|>\n<|im_start|>user\n{body}"
        "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )


def _resized(image: Image.Image, least: int, most: int) -> Image.Image:
    height, width = smart_resize(image.height, image.width, 28, least * 28 * 28, most * 28 * 28)
    return image.convert("RGB").resize((width, height))


_processor = cache(AutoProcessor.from_pretrained)


@cache
def _model(auto: Any, folder: Path) -> Any:
    return auto.from_pretrained(folder).eval()


@torch.no_grad()
def _expected(name: str, folder: Path, row: Row, instruction: str | None) -> np.ndarray:
    """Unit vector by the publisher's code, one row at a time."""
    text, image = row
    processor: Any = _processor(folder)
    options: dict[str, Any] = {}
    if name == "qwen3-vl-embedding":
        prompt = processor.apply_chat_template(
            [_conversation(text, image, instruction)], add_generation_prompt=True, tokenize=False
        )[0]
        options = {"size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 1800 * 32 * 32}}
    elif name == "wemm-embedding":
        processor.tokenizer.backend_tokenizer.normalizer = Tokenizer.from_file(
            str(folder / "tokenizer.json")
        ).normalizer
        chat = _conversation(" ".join(part for part in (instruction, text) if part), image, None)[1:]
        prompt = processor.apply_chat_template(chat, tokenize=False) + "<embedding>"
    else:
        least = 4 if name == "gme" else 256
        prompt, image = _framed(text, image, instruction), image and _resized(image, least, 1280)
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        options = {"size": {"shortest_edge": least * 28 * 28, "longest_edge": 1280 * 28 * 28}}
    inputs = processor(text=[prompt], images=image and [image], return_tensors="pt", **(options if image else {}))
    model = _model(AutoModel, folder)
    if name == "gme":  # its forward pass gives the language model no positions, which counts every token by one
        inputs.pop("mm_token_type_ids")
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    hidden = model(**inputs).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(hidden, dim=0).numpy()


@pytest.mark.parametrize("name", OFFICIAL)
def test_embeddings_are_those_of_the_publisher(shared_folder: Make, tmp_path: Path, name: str) -> None:
    source = shared_folder(f"official-{name}", OFFICIAL[name])
    folder = convert(source, name, output=tmp_path / "model")
    assert "auto_map" not in (folder / "config.json").read_text()
    for instruction in (None, INSTRUCTION, " Why? "):
        expected = np.stack([_expected(name, source, row, instruction) for row in ROWS])
        items = [{"image": image, "text": text} for text, image in ROWS]
        for model in (SentenceTransformer(str(folder), device="cpu"), UniME(folder, device="cpu")):
            given = [{key: part for key, part in item.items() if part is not None} for item in items]
            together = model.encode(given, batch_size=len(given), prompt=instruction)
            alone = np.stack([model.encode(item, prompt=instruction) for item in given])
            assert (together * expected).sum(axis=1).min() >= 0.99999, (type(model), instruction)
            assert (together * alone).sum(axis=1).min() >= 0.99999, (type(model), instruction)
    same = expected @ expected.T
    assert same[np.triu_indices(len(same), 1)].max() < 0.999, "the rows differ, so equality means something"


@torch.no_grad()
def test_embedding_gemma_2_needs_no_conversion(shared_folder: Make) -> None:
    folder = shared_folder("official-embeddinggemma-2", embedding_gemma2)
    bare = folder.with_name(f"{folder.name}-bare")
    processor, model = AutoProcessor.from_pretrained(bare), AutoModel.from_pretrained(bare).eval()
    unime = UniME(folder, device="cpu")
    expected = []
    for text, image in ROWS:
        body = unime.prompts["query"] + ("" if image is None else "<|image|>") + (text or "")
        inputs = processor(text=[body], images=image and [[image]], return_tensors="pt")
        expected.append(torch.nn.functional.normalize(model(**inputs).last_hidden_state[0].mean(0), dim=0).numpy())
    items = [{key: part for key, part in (("image", i), ("text", t)) if part is not None} for t, i in ROWS]
    for found in (unime.encode_query(items), SentenceTransformer(str(folder), device="cpu").encode_query(items)):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(unime.encode_document(items) - expected).max() > 1e-2


def test_prompts_of_qwen3_vl_embedding(shared_folder: Make, tmp_path: Path) -> None:
    source = shared_folder("official-qwen3-vl-embedding", OFFICIAL["qwen3-vl-embedding"])
    model = SentenceTransformer(str(convert(source, "qwen3-vl-embedding", output=tmp_path / "model")), device="cpu")

    def rendered(row: object, **options: Any) -> str:
        return str(model.tokenizer.decode(model.preprocess([row], **options)["input_ids"][0]))

    head, tail = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    default = f"{head}Represent the user's input.<|im_end|>\n<|im_start|>user\na cat{tail}"
    assert rendered("a cat") == rendered("a cat", prompt=model.prompts["document"]) == default
    retrieval = rendered("a cat", prompt=model.prompts["retrieval"])
    assert retrieval == default.replace(
        "Represent the user's input.", "Retrieve images or text relevant to the user's query."
    )
    assert rendered({"text": None, "image": None}).split("user\n")[1] == "NULL" + tail
    for end in (
        "a1$+=~`^|<>" + "".join(filter(str.isprintable, map(chr, range(33, 0x2070)))) + "\u3002\uff01\uff1f\u300d"
    ):
        template = model.processor.chat_template
        shown = model.processor.apply_chat_template(
            [{"role": "system", "content": f"x{end}"}], chat_template=template, tokenize=False
        )
        known = unicodedata.category(end).startswith("P")
        if known and ord(end) > 0xFF and end not in template:
            continue  # of a script that is rarely used
        assert shown.startswith(f"{head}x{end}{'' if known else '.'}<|im_end|>"), end
    assert VIDEO in model.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "video": "x"}]}], tokenize=False
    )


@torch.no_grad()
def _expected_score(folder: Path, query: Row, document: Row, instruction: str | None) -> float:
    """Log-odds by the script of Qwen3-VL-Reranker."""

    def content(row: Row, prefix: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": prefix}]
        parts += [] if row[1] is None else [{"type": "image", "image": row[1]}]
        return parts + ([] if row[0] is None else [{"type": "text", "text": row[0]}])

    system = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the "
        'answer can only be "yes" or "no".'
    )
    instruction = instruction or "Given a search query, retrieve relevant candidates that answer the query."
    user = [{"type": "text", "text": "<Instruct>: " + instruction}]
    user += content(query, "<Query>:") + content(document, "\n<Document>:")
    chat = [{"role": "system", "content": [{"type": "text", "text": system}]}, {"role": "user", "content": user}]
    processor: Any = _processor(folder)
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    images = [image for _, image in (query, document) if image is not None]
    size = {"size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 1800 * 32 * 32}} if images else {}
    inputs = processor(text=[prompt], images=images or None, return_tensors="pt", **size)
    logits = _model(AutoModelForImageTextToText, folder)(**inputs).logits[0, -1]
    yes, no = (processor.tokenizer.get_vocab()[word] for word in ("yes", "no"))
    return float(logits[yes] - logits[no])


def test_the_reranker_scores_as_its_publisher_does(shared_folder: Make, tmp_path: Path) -> None:
    source = shared_folder("official-reranker", lambda folder: qwen(folder, "Qwen3VL", words=("yes", "no")))
    folder = convert(source, "qwen3-vl-reranker", output=tmp_path / "model")
    query: Row = ("a red circle", None)
    documents: list[Row] = [("a blue dot", None), (None, sample_image(120, 80)), ("on the left", sample_image(60, 90))]
    expected = [_expected_score(source, query, document, None) for document in documents]
    items = [{key: part for key, part in (("image", d[1]), ("text", d[0])) if part is not None} for d in documents]
    pairs = [(query[0], item) for item in items]
    activation = torch.nn.Identity()
    for model in (CrossEncoder(str(folder), device="cpu"), UniMEReranker(folder, device="cpu")):
        np.testing.assert_allclose(model.predict(pairs, activation_fn=activation), expected, atol=1e-4)
        asked = _expected_score(source, query, documents[1], INSTRUCTION)
        found = model.predict(pairs[1:2], activation_fn=activation, prompt=INSTRUCTION)
        np.testing.assert_allclose(found, [asked], atol=1e-4)
    judge = LocalJudge(folder)
    candidates = [Item(text=text, image=image) for text, image in documents]
    np.testing.assert_allclose(judge.score([Group(Item(query[0]), candidates)])[0], expected, atol=1e-4)
    reversed_scores = LocalJudge(folder, pair_order="candidate_first").score([Group(Item(query[0]), candidates)])[0]
    np.testing.assert_allclose(reversed_scores[0], _expected_score(source, documents[0], query, None), atol=1e-4)
    with pytest.raises(ValueError, match="has no prompt for lists: rank pairwise"):
        UniMEReranker(folder, device="cpu").listwise_scores("a red circle", ["a", "b"])


def test_image_limits_are_those_of_the_recipe(shared_folder: Make, tmp_path: Path) -> None:
    source = shared_folder("official-qwen3-vl-embedding", OFFICIAL["qwen3-vl-embedding"])
    folder = convert(source, "qwen3-vl-embedding", output=tmp_path / "model")
    assert get_recipe("qwen3-vl-embedding").image.stock
    assert not json.loads((folder / "config_sentence_transformers.json").read_text()).get("requirements")
    size = dict(AutoProcessor.from_pretrained(folder).image_processor.size)
    assert (size["shortest_edge"], size["longest_edge"]) == (4096, 1843200)
    with pytest.raises(ValueError, match="qwen3_vl has no image rule here"):
        convert(source, "qwen3-vl-embedding", output=tmp_path / "other", image_size=84)


@pytest.mark.slow
def test_an_adapter_trains_and_the_folder_keeps_its_template(shared_folder: Make, tmp_path: Path) -> None:
    source = shared_folder("official-qwen3-vl-embedding", OFFICIAL["qwen3-vl-embedding"])
    folder = convert(source, "qwen3-vl-embedding", output=tmp_path / "model")
    RecordSet.write(tmp_path / "records", training_records(16), {})
    trained = stages.train_in_batch(
        stages.InBatchArguments(
            data=str(tmp_path / "records"), model=str(folder), output=str(tmp_path / "trained"), max_steps=2,
            per_device_train_batch_size=4, learning_rate=1e-2, lora_rank=32, lora_alpha=32, matryoshka_dims=[32, 8],
        )
    )  # fmt: skip
    before, after = (SentenceTransformer(str(path), device="cpu") for path in (folder, trained))
    assert after.processor.chat_template == before.processor.chat_template and after.prompts == before.prompts
    assert np.abs(before.encode("a red ring") - after.encode("a red ring")).max() > 1e-4
