"""`unime serve` as a process on loopback: results equal to those of the library."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from server_process import EMBED, QUEUE, TOKEN, ServerProcess, chat, close, data_uri, image_part, png, vectors

from unime_st import UniME, UniMEReranker
from unime_st.checkpoints.plain_export import export_plain
from unime_st.cli import main
from unime_st.files import read_json, write_json
from unime_st.retrieval import Index

openai = pytest.importorskip("openai")  # in the extra [dev]
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture
def client(server: ServerProcess) -> Any:
    return openai.OpenAI(base_url=server.url, api_key=TOKEN, max_retries=0, timeout=600)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_openai_client_gets_the_vectors_of_encode(client: Any, model: UniME, encoding: Any) -> None:
    texts = [f"a {color} {shape}" for color in ("red", "blue") for shape in ("circle", "star", "ring")]
    options = {} if encoding is None else {"encoding_format": encoding}
    found = client.embeddings.create(model="unime-tiny", input=texts, **options)
    rows = [entry.embedding for entry in found.data]
    if encoding == "base64":  # the client decodes only what it asks for by itself
        rows = [np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows]
    close(rows, model.encode(texts))
    assert found.model == "unime-tiny" and [entry.index for entry in found.data] == list(range(6))
    assert found.usage.prompt_tokens == found.usage.total_tokens > 6


def test_one_text_and_dimensions(client: Any, model: UniME) -> None:
    (whole,) = client.embeddings.create(model="unime-tiny", input="a red circle").data
    (short,) = client.embeddings.create(model="unime-tiny", input="a red circle", dimensions=32).data
    close(whole.embedding, model.encode("a red circle"))
    close(short.embedding, model.encode("a red circle", truncate_dim=32))
    assert len(short.embedding) == 32


def test_models_of_the_openai_client(client: Any) -> None:
    assert [entry.id for entry in client.models.list()] == ["unime-tiny"]


def test_openai_client_raises_its_own_errors(client: Any, server: ServerProcess) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.embeddings.create(model="text-embedding-3-small", input="a")
    with pytest.raises(openai.BadRequestError, match="expected an integer of at least 1 and at most 128"):
        client.embeddings.create(model="unime-tiny", input="a", dimensions=129)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0).models.list()


def test_chats_and_objects_are_the_items_of_encode(server: ServerProcess, model: UniME, images: list[Path]) -> None:
    uri, path = data_uri(images[0].read_bytes()), str(images[0])
    text = {"type": "text", "text": "a red circle"}
    cases: list[tuple[dict[str, Any], Any, str | None]] = [
        (chat(image_part(uri)), {"image": path}, None),
        (chat(text, image_part(uri)), {"image": path, "text": "a red circle"}, None),
        (chat(image_part(uri), system="Find it."), {"image": path}, "Find it."),
        ({"messages": [{"role": "user", "content": "a ring"}, {"role": "assistant", "content": ""}]}, "a ring", None),
        ({"input": {"image": uri, "text": "x"}}, {"image": path, "text": "x"}, None),
        ({"input": "a ring", "prompt": "Find it."}, "a ring", "Find it."),
        ({"input": "a ring", "prompt_name": "query"}, "a ring", None),
    ]
    for body, value, prompt in cases:
        found = vectors(server.post(EMBED, body))
        close(found, model.encode([value], prompt=prompt))


def test_more_items_than_the_queue_keep_their_order(server: ServerProcess, model: UniME, images: list[Path]) -> None:
    values: list[Any] = [f"a text number {number}" for number in range(150)]
    sent: list[Any] = list(values)
    for number, path in enumerate(images[:20]):
        values.insert(number * 7, {"image": str(path)})
        sent.insert(number * 7, {"image": data_uri(path.read_bytes())})
    assert len(sent) > QUEUE  # taken, because nothing else waits
    close(vectors(server.post(EMBED, {"input": sent})), model.encode(values))


def test_rerank_and_score(server: ServerProcess, images: list[Path]) -> None:
    reranker = UniMEReranker("unime-tiny", device="cpu")
    query, paths = "a red circle", [images[0], images[7], images[20]]
    documents: list[Any] = [
        "a blue star",
        {"text": "a red circle"},
        *({"image": data_uri(p.read_bytes())} for p in paths),
    ]
    own: list[Any] = ["a blue star", "a red circle", *({"image": str(path)} for path in paths)]
    expected = {entry["corpus_id"]: entry["score"] for entry in reranker.rank(query, own)}
    body = {"model": "unime-tiny", "query": query, "documents": documents}
    found = server.post("/v1/rerank", body).json
    assert {entry["index"] for entry in found["results"]} == set(range(5))
    close([entry["relevance_score"] for entry in found["results"]], sorted(expected.values(), reverse=True))
    close([expected[entry["index"]] for entry in found["results"]], sorted(expected.values(), reverse=True))
    assert {"text": "a blue star"} in [entry["document"] for entry in found["results"]]
    assert len(server.post("/v2/rerank", body).json["results"]) == 5
    (best,) = server.post("/rerank", {**body, "top_n": 1, "return_documents": False}).json["results"]
    assert best == {key: found["results"][0][key] for key in ("index", "relevance_score")}
    scored = server.post("/score", {"text_1": query, "text_2": documents[:2]}).json["data"]
    close([entry["score"] for entry in scored], [expected[0], expected[1]])
    pairs = server.post("/v1/score", {"queries": [query, query], "documents": documents[:2]}).json["data"]
    close([entry["score"] for entry in pairs], [expected[0], expected[1]])


def test_search(server: ServerProcess, index: Path, model: UniME, images: list[Path]) -> None:
    loaded = Index.load(index, model)
    (by_text,) = loaded.search(["blue triangle"], k=4)
    found = server.post("/search", {"query": "blue triangle", "top_k": 4}).json["data"]
    assert [entry["id"] for entry in found] == [hit.id for hit in by_text]
    close([entry["score"] for entry in found], [hit.score for hit in by_text])
    image = {"image": data_uri(images[3].read_bytes())}
    assert server.post("/v1/search", {"query": image, "top_k": 1}).json["data"][0]["id"] == images[3].stem
    (reranked,) = loaded.search(["purple star"], 5, UniMEReranker("unime-tiny", device="cpu"))
    found = server.post("/search", {"query": "purple star", "top_k": 5, "rerank": True}).json["data"]
    close([entry["score"] for entry in found], [hit.score for hit in reranked])
    assert len(server.post("/search", {"query": "purple star", "top_k": 1000}).json["data"]) == len(images)


def test_parity_of_the_server(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_plain("unime-tiny", tmp_path / "plain", device="cpu")
    words = ["parity", server.url, "--file", str(folder / "parity.json")]
    monkeypatch.setenv("UNIME_API_KEY", "wrong")
    assert main(words) == 1
    assert "answers 401" in capsys.readouterr().err
    monkeypatch.setenv("UNIME_API_KEY", TOKEN)
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["text", "image", "image and text"]
    assert all(line.startswith("cosine 1.000000") for line in lines)
    content = read_json(folder / "parity.json")
    for item in content["items"]:
        item["prompt"] = "Represent the user's input."  # is what "prompt" of the causes holds
    write_json(tmp_path / "prompts.json", content)
    assert main([*words[:3], str(tmp_path / "prompts.json")]) == 1
    assert all(line.endswith("likely cause: prompt") for line in capsys.readouterr().out.splitlines())


def test_parity_of_scores(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.new("RGB", (56, 56), "red")
    documents: list[Any] = [{"text": "a red circle"}, {"image": image}, {"image": image, "text": "a square"}]
    scores = UniMEReranker("unime-tiny", device="cpu").predict([("a red square", document) for document in documents])
    items = [
        {"kind": "pair", "query": "a red square", "text": document.get("text"), "image": "image" in document}
        | {"prompt_name": None, "expected": [float(score)]}
        for document, score in zip(documents, scores, strict=True)
    ]
    write_json(tmp_path / "parity.json", {"prepared": data_uri(png(image)), "items": items})
    monkeypatch.setenv("UNIME_API_KEY", TOKEN)
    assert main(["parity", server.url, "--file", str(tmp_path / "parity.json")]) == 0
    assert capsys.readouterr().out.startswith("1 - difference 1.00000")
    items[1]["expected"] = [float(scores[1]) + 0.01]
    write_json(tmp_path / "parity.json", {"prepared": data_uri(png(image)), "items": items})
    assert main(["parity", server.url, "--file", str(tmp_path / "parity.json")]) == 1
