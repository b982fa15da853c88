"""Ranking by pairs, lists, windows and both: equal to the plain ways, each image seen once, bad documents last."""

from __future__ import annotations

import json
import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_reranker as tiny
import torch
from PIL import Image
from sentence_transformers import CrossEncoder

from benchmarks.official_reranker import choose
from unime_st import Item, UniMEReranker
from unime_st.data import BadImageError
from unime_st.data.images import padded_to_aspect
from unime_st.losses.list_answers import index_answers, longest_list
from unime_st.reranking.chat_features import IMAGE_INDEX, group_by_length
from unime_st.scoring.forward_counter import ForwardCounter
from unime_st.scoring.list_scorer import rotations, sliding_window

QUERY = {"image": tiny.make_image(0), "text": "Which is it?"}
TEXTS = [
    f"the {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("square", "circle", "triangle", "a")
]
MIXED = [
    *TEXTS[:4],
    tiny.make_image(1),
    {"text": "a small image", "image": tiny.make_image(2, (40, 100))},
    tiny.make_image(1),
]
RAW = torch.nn.Identity()


def by_index(ranking: list[dict[str, Any]]) -> np.ndarray:
    return np.array([entry["score"] for entry in sorted(ranking, key=lambda entry: entry["corpus_id"])])


@pytest.mark.parametrize("query", [QUERY, "a red square", tiny.make_image(3)])
def test_pairs_that_share_their_beginning_score_as_alone(reranker: UniMEReranker, query: Any):
    expected = by_index(CrossEncoder.rank(reranker, query, MIXED, activation_fn=RAW))
    for size in (2, 32):
        ranking = reranker.rank(query, MIXED, activation_fn=RAW, batch_size=size)
        assert np.abs(by_index(ranking) - expected).max() < 1e-4
        assert [entry["score"] for entry in ranking] == sorted((entry["score"] for entry in ranking), reverse=True)


def test_other_options_go_to_sentence_transformers(reranker: UniMEReranker):
    expected = reranker.predict([(QUERY, text) for text in TEXTS], prompt="Mind the colour.")
    assert np.abs(by_index(reranker.rank(QUERY, TEXTS, prompt="Mind the colour.")) - expected).max() < 1e-6


def list_by_hand(model: UniMEReranker, documents: list[str], given: str = "") -> torch.Tensor:
    listed = "".join(f"({index}) {text}" for index, text in enumerate(documents, start=1))
    prompt = tiny.LIST.format(tiny.written(QUERY["text"], QUERY["image"]), listed) + given
    return tiny.answer_logits(model, prompt, [QUERY["image"]])


def test_numbers_of_two_digits(reranker: UniMEReranker):
    """1, 10, 11 and 12 share the logit of their first token by what follows."""
    scores = reranker.listwise_scores(QUERY, TEXTS)
    token = {text: reranker.tokenizer.encode(text)[0] for text in "0123456789)"}
    first, second = list_by_hand(reranker, TEXTS), list_by_hand(reranker, TEXTS, "1")
    expected = first[[token[digit] for digit in "123456789111"]]
    among = torch.tensor([0, 9, 10, 11])
    expected[among] += second[[token[piece] for piece in ")012"]].log_softmax(0)
    assert np.abs(scores - expected.numpy()).max() < 1e-4
    total = first[[token[digit] for digit in "123456789"]].logsumexp(0)
    assert float(torch.from_numpy(scores).logsumexp(0)) == pytest.approx(float(total), abs=1e-5)


def test_golden_lists_of_ten(golden: Path):
    """What begins with 1 has together what the authors' logits give to 1."""
    data = json.loads((golden / "judge/listwise.json").read_text())
    files = {row["id"]: row["file"] for row in json.loads((golden / "inputs/images.json").read_text())}
    model = UniMEReranker(golden / "checkpoints" / data["checkpoint"], device="cpu")
    lists = [(row, answer) for row, answer in zip(data["lists"], data["single"]) if len(row["candidates"]) == 10]
    assert lists
    for row, answer in lists[:2]:

        def item(text: str, image: str | None, squash: str | None = row["image_resolution"]) -> dict[str, Any]:
            opened = None if image is None else Image.open(golden / "inputs" / files[image])
            if opened is not None and squash:
                opened = opened.resize(({"low": 128, "high": 1344}[squash],) * 2)
            return {"text": text, "image": opened}

        scores = model.listwise_scores(
            item(row["qry_text"], row["qry_image"]), [item(*candidate) for candidate in row["candidates"]]
        )
        expected = answer["forced_prefix_logits_digits_0_to_9"]
        assert np.abs(scores[1:9] - expected[2:10]).max() < 1e-4
        assert np.logaddexp(scores[0], scores[9]) == pytest.approx(expected[1], abs=1e-4)


def test_permutations_remove_the_place(reranker: UniMEReranker):
    """With as many orders as candidates, shifting the candidates shifts the scores and nothing else."""
    documents = MIXED[:6]
    scores = reranker.listwise_scores(QUERY, documents, permutations=6)
    shifted = reranker.listwise_scores(QUERY, documents[2:] + documents[:2], permutations=6)
    assert np.abs(np.roll(scores, -2) - shifted).max() < 1e-4
    once = reranker.listwise_scores(QUERY, documents[2:] + documents[:2])
    assert np.abs(np.roll(reranker.listwise_scores(QUERY, documents), -2) - once).max() > 1e-2
    by_hand = np.zeros(6)
    for order in rotations(6, 6):
        found = reranker.listwise_scores(QUERY, [documents[index] for index in order])
        by_hand[order] += torch.from_numpy(found).log_softmax(0).numpy() / 6
    assert np.abs(scores - by_hand).max() < 1e-4


def test_orders():
    assert rotations(4, 1) == [[0, 1, 2, 3]]
    assert sorted(order[0] for order in rotations(7, 20)) == list(range(7))
    indices = np.array(rotations(5, 5))
    assert all(sorted(column) == list(range(5)) for column in indices.T)


@pytest.mark.parametrize(("count", "window"), [(1, 2), (2, 2), (7, 3), (12, 5), (10, 10), (31, 4)])
def test_a_sliding_window_brings_the_best_to_the_front(count: int, window: int):
    """On a consistent judge with an offset of its own for every list."""
    draw = np.random.default_rng(count)
    worth = draw.permutation(count).astype(float)
    lists: list[list[int]] = []

    def score(members: list[int]) -> np.ndarray:
        assert len(members) <= window and len(set(members)) == len(members)
        lists.append(members)
        return worth[members] + draw.normal() * 100

    order, logits = sliding_window(count, window, score)
    assert sorted(order) == list(range(count)) and {member for members in lists for member in members} == set(order)
    assert (np.diff(logits[order]) < 0).all()
    best = np.argsort(-worth)[: max(1, window - window // 2)].tolist()
    assert order[: len(best)] == best


def test_windows(reranker: UniMEReranker):
    ranking = reranker.rank(QUERY, TEXTS, method="listwise", window=5)
    assert sorted(entry["corpus_id"] for entry in ranking) == list(range(12))
    assert sum(entry["score"] for entry in ranking) == pytest.approx(1)
    one = reranker.rank(QUERY, TEXTS, method="listwise", window=12)
    expected = torch.from_numpy(reranker.listwise_scores(QUERY, TEXTS)).softmax(0).numpy()
    assert np.abs(by_index(one) - expected).max() < 1e-5


def test_hybrid_lists_the_best_of_the_pairs(reranker: UniMEReranker):
    pairs = reranker.rank(QUERY, TEXTS)
    best = [entry["corpus_id"] for entry in pairs[:4]]
    ranking = reranker.rank(QUERY, TEXTS, method="hybrid", window=4)
    assert {entry["corpus_id"] for entry in ranking[:4]} == set(best)
    listed = reranker.rank(QUERY, [TEXTS[index] for index in best], method="listwise")
    assert [entry["corpus_id"] for entry in ranking[:4]] == [best[entry["corpus_id"]] for entry in listed]
    for entry, pair in zip(ranking[4:], pairs[4:], strict=True):
        assert entry == {**pair, "score": pytest.approx(pair["score"], abs=1e-6)}
    assert len(reranker.rank(QUERY, TEXTS, method="hybrid", top_k=3)) == 3


@pytest.mark.parametrize("method", ["pairwise", "listwise", "hybrid"])
def test_equal_documents_score_alike(reranker: UniMEReranker, method: Any):
    scores = by_index(reranker.rank(QUERY, [*TEXTS[:3], TEXTS[1], Item(TEXTS[1])], method=method))
    assert scores[1] == scores[3] == scores[4]
    if method == "listwise":
        assert np.abs(scores[:3] - by_index(reranker.rank(QUERY, TEXTS[:3], method=method))).max() < 1e-6


@pytest.mark.parametrize("method", ["pairwise", "listwise", "hybrid"])
def test_an_unreadable_document_comes_last_and_is_reported(
    reranker: UniMEReranker, method: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(tiny.png(1)[:200])
    documents = [Item(image=tmp_path / "none.png"), *TEXTS[:3], Item(image=corrupt)]
    with caplog.at_level(logging.WARNING):
        ranking = reranker.rank(QUERY, documents, method=method)
    assert {entry["corpus_id"] for entry in ranking[3:]} == {0, 4}
    assert all(entry["score"] == 0.0 and "image" in entry["error"] for entry in ranking[3:])
    assert not any("error" in entry for entry in ranking[:3]) and "none.png" in caplog.text
    expected = by_index(reranker.rank(QUERY, TEXTS[:3], method=method))
    assert np.abs(by_index(ranking)[1:4] - expected).max() < 1e-6
    raw = reranker.rank(QUERY, documents, activation_fn=RAW)
    assert np.isfinite([entry["score"] for entry in raw]).all()


def test_the_batch_size_holds_for_one_call(reranker: UniMEReranker):
    """Of lists, too: three orders of twelve texts are three prompts, or one after the other."""
    passes = []
    for size in (32, 1, 32):
        with ForwardCounter(reranker) as cost:
            reranker.rank(QUERY, TEXTS[:4], method="listwise", permutations=3, batch_size=size)
        passes.append(cost.forwards)
    assert passes[0] == passes[2] < passes[1]
    assert reranker.ranker().pairs.batch_size == 32


@pytest.mark.parametrize("method", ["pairwise", "listwise", "hybrid"])
def test_empty_texts_are_ranked(reranker: UniMEReranker, method: Any):
    documents = ["a red square", "", {"text": "  ", "image": None}, {"text": ""}]
    scores = by_index(reranker.rank(QUERY, documents, method=method))
    assert scores[1] == scores[3] != scores[2]
    if method == "pairwise":
        assert (
            np.abs(scores - reranker.predict([(QUERY, text) for text in ("a red square", "", "  ", "")])).max() < 1e-6
        )
    if method == "listwise":
        prompt = reranker.preprocess_lists([QUERY], [["a red square", "", "  "]], share=False)
        with torch.inference_mode():
            logits = reranker[0](prompt)["causal_logits"][0, -1]
        expected = logits[[answer[0] for answer in index_answers(reranker.tokenizer, 3)]].softmax(0)
        assert np.abs(scores[:3] - expected.numpy()).max() < 1e-5
    assert len(reranker.rank("", documents, method=method)) == 4


@pytest.mark.parametrize("method", ["pairwise", "listwise", "hybrid"])
def test_a_document_that_is_too_long_is_named(reranker: UniMEReranker, method: Any):
    documents = [TEXTS[0], "red " * 2000, TEXTS[1]]
    hint = r", or ask about fewer documents at once \(a smaller window\)" if method == "listwise" else ""
    with pytest.raises(ValueError, match=r"document 1.*: the prompt has \d+ tokens.*shorten the text" + hint):
        reranker.rank(QUERY, documents, method=method)


@pytest.mark.parametrize("method", ["pairwise", "listwise", "hybrid"])
def test_every_way_to_be_unreadable(reranker: UniMEReranker, method: Any, tmp_path: Path):
    cut = tmp_path / "cut.png"
    cut.write_bytes(tiny.png(1)[:-60])
    bad = [{"image": str(tmp_path / "none.png")}, Image.open(cut), {"image": str(tmp_path)}]
    words = ["none.png", "cut.png", "not a regular file"]
    ranking = reranker.rank(QUERY, [TEXTS[0], *bad, TEXTS[1]], method=method)
    errors = {entry["corpus_id"]: entry["error"] for entry in ranking[2:]}
    assert all(word in errors[index] for index, word in enumerate(words, start=1))
    expected = by_index(reranker.rank(QUERY, TEXTS[:2], method=method))
    assert np.abs(by_index(ranking)[[0, 4]] - expected).max() < 1e-6
    for query in (*bad[:2], Item(image=cut)):
        with pytest.raises(BadImageError):
            reranker.rank(query, TEXTS[:2], method=method)


@pytest.mark.parametrize("method", ["pairwise", "listwise", "hybrid"])
def test_a_very_long_image_gets_margins(reranker: UniMEReranker, method: Any, tmp_path: Path):
    """Its image processor refuses more than 200:1; the embedder shows such images with margins, so this does, too."""
    path = tmp_path / "thin.png"
    thin = Image.new("RGB", (2, 500), "red")
    thin.save(path)
    wide = padded_to_aspect(thin)
    assert wide.size == (3, 500)
    expected = by_index(reranker.rank(QUERY, [TEXTS[0], wide], method=method))
    for form in (thin, {"image": str(path)}, str(path), Item(image=path)):
        assert np.abs(by_index(reranker.rank(QUERY, [TEXTS[0], form], method=method)) - expected).max() < 1e-5
        assert reranker.predict([(QUERY, form)])[0] == pytest.approx(reranker.predict([(QUERY, wide)])[0], abs=1e-5)
    assert len(reranker.rank(thin, TEXTS[:2], method=method)) == 2


def test_unreadable_documents_come_last_where_nothing_is_shared(reranker: UniMEReranker, tmp_path: Path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    documents = [{"image": str(tmp_path / "bad.png")}, TEXTS[0], {"image": str(tmp_path / "none.png")}, TEXTS[1]]
    for activation in (torch.nn.Sigmoid(), RAW):
        options: dict[str, Any] = {"prompt": "Mind the colour.", "activation_fn": activation}
        ranking = reranker.rank(QUERY, documents, return_documents=True, **options)
        assert [entry["corpus_id"] for entry in ranking[2:]] == [0, 2] and "bad.png" in ranking[2]["error"]
        expected = reranker.predict([(QUERY, text) for text in TEXTS[:2]], **options)
        assert np.abs(by_index(ranking)[[1, 3]] - expected).max() < 1e-6
        assert all(entry["text"] is documents[entry["corpus_id"]] for entry in ranking)


@pytest.mark.parametrize("method", ["pairwise", "listwise", "hybrid"])
def test_other_forms_of_an_image(reranker: UniMEReranker, method: Any, tmp_path: Path):
    """As an array, a path, in a list, in memory: the same image, so one score."""
    path = tmp_path / "image.png"
    path.write_bytes(tiny.png(5))
    image = Image.open(path).convert("RGB")
    forms = [image, np.asarray(image), path, [str(path)], path.read_bytes()]
    scores = by_index(reranker.rank(QUERY, [TEXTS[0], *({"image": form} for form in forms)], method=method))
    if method == "pairwise":
        assert np.ptp(scores[1:]) < 1e-5
        assert scores[1] == pytest.approx(reranker.predict((QUERY, {"image": image})), abs=1e-5)
    else:
        assert scores[1] == scores[2] and scores[3] == scores[4] == scores[5]


@pytest.mark.parametrize(
    "options", [{"method": name} for name in ("pairwise", "listwise", "hybrid")] + [{"prompt": ""}]
)
def test_urls_are_fetched_and_one_that_fails_comes_last(
    reranker: UniMEReranker, options: dict[str, Any], tmp_path: Path
):
    (tmp_path / "good.png").write_bytes(tiny.png(5))
    serve = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site = f"http://127.0.0.1:{server.server_port}"
        documents = [TEXTS[0], {"image": f"{site}/none.png"}, f"{site}/good.png", {"image": f"{site}/good.png"}]
        ranking = reranker.rank(QUERY, documents, **options)
        server.shutdown()
    assert ranking[-1]["corpus_id"] == 1 and "none.png: cannot be fetched" in ranking[-1]["error"]
    expected = by_index(reranker.rank(QUERY, [TEXTS[0], *[Item(image=tmp_path / "good.png")] * 2], **options))
    assert np.abs(by_index(ranking)[[0, 2, 3]] - expected).max() < 1e-5


@pytest.mark.parametrize("method", ["listwise", "hybrid"])
def test_what_is_no_item_is_named(reranker: UniMEReranker, method: Any):
    for value, reason in ((3, "got int"), ({"image": "data:image/png;base64,AA"}, "as text"), ({}, "needs a text")):
        with pytest.raises((TypeError, ValueError), match=f"document 1: .*{reason}"):
            reranker.rank("a", ["b", value], method=method)


def test_each_image_is_seen_once_and_the_query_passes_once(reranker: UniMEReranker):
    """One query image and 12 texts: of the beginning no token and no patch is computed again."""
    query = {"image": tiny.make_image(77), "text": "Which is it?"}
    with ForwardCounter(reranker) as plain:
        reranker.predict([(query, text) for text in TEXTS])
    with ForwardCounter(reranker) as shared:
        reranker.rank(query, TEXTS)
    features = reranker.preprocess([(query, TEXTS[0])])
    assert shared.patches == plain.patches == len(features["pixel_values"])
    assert shared.tokens < plain.tokens / 3
    images = [tiny.make_image(seed) for seed in (80, 81, 82)]
    with ForwardCounter(reranker) as cost:
        reranker.rank("which", images * 2, method="hybrid", window=3, permutations=3)
    assert cost.patches == sum(len(reranker.preprocess([("a", image)])["pixel_values"]) for image in images)


def test_the_cost_is_logged(reranker: UniMEReranker, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "unime_st"):
        reranker.rank("a", TEXTS[:3], method="listwise")
    assert "ranked 3 documents, listwise: 1 forwards" in caplog.text


def test_batches_equal_the_processors_own(reranker: UniMEReranker):
    """Token ids, positions and logits of a batch with repeated images and very different lengths."""
    pairs = [(QUERY, value) for value in MIXED] + [(tiny.make_image(1), "red " * 60), ("a", "b")]
    shared = reranker.preprocess(pairs)
    stock = reranker.preprocess(pairs, processing_kwargs={})
    assert IMAGE_INDEX in shared and IMAGE_INDEX not in stock
    assert len(shared["image_grid_thw"]) == 3 < len(stock["image_grid_thw"])
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(shared[name], stock[name])
    with torch.inference_mode():
        logits = [reranker(features)["causal_logits"] for features in (shared, stock)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_parts_of_like_length():
    assert group_by_length([100, 1000, 110], overhead=64) == [[0, 2], [1]]
    assert group_by_length([10, 12, 11], overhead=64) == [[0, 2, 1]]
    assert group_by_length([], overhead=64) == []


def test_tokenizers_that_cannot_number(reranker: UniMEReranker):
    assert index_answers(reranker.tokenizer, 9) == [(reranker.tokenizer.encode(digit)[0],) for digit in "123456789"]
    assert longest_list(reranker.tokenizer, 150) == 99

    class Words:
        """Knows words only, as many WordPiece vocabularies of one language do."""

        unk_token_id = 0

        def encode(self, text: str, **_: Any) -> list[int]:
            return [5, 6, 7] + [0] * (len(text) - 6)

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [str(value) for value in ids]

    with pytest.raises(ValueError, match="no usable index tokens"):
        index_answers(Words(), 2)
    assert longest_list(Words(), 10) == 0


def test_the_official_protocol(reranker: UniMEReranker, monkeypatch: pytest.MonkeyPatch):
    """The prompt ends with the header of the answer; the number is taken from what is generated, greedily."""
    seen: list[dict[str, Any]] = []
    model = reranker[0].model
    original = model.generate

    def generate(**options: Any) -> torch.Tensor:
        seen.append(options)
        return original(**options)

    monkeypatch.setattr(model, "generate", generate)
    found = choose(reranker, QUERY, [*TEXTS[:3], TEXTS[0], QUERY], max_new_tokens=4)
    assert found.index is None and len(found.answer) > 0
    prompt = reranker.tokenizer.decode(seen[0]["input_ids"][0])
    assert prompt.endswith("assistant\n") and seen[0]["do_sample"] is False and seen[0]["max_new_tokens"] == 4
    assert len(seen[0]["image_grid_thw"]) == 2
    for answer, index in (("Ans: (2)", 1), ("Ans: (4)", None), ("(0)", None), ("2", None)):
        ids = torch.tensor([reranker.tokenizer.encode(answer)])
        monkeypatch.setattr(model, "generate", lambda ids=ids, **o: torch.cat([o["input_ids"], ids], 1))
        assert choose(reranker, QUERY, TEXTS[:3]).index == index
