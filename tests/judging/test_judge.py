"""Scores: equal to the authors' numbers or to a recipe written by hand, whatever the batch; and bad pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_reranker as tiny
import torch
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny_pairs import ITEMS

from unime_st.data import BadImageError, Item
from unime_st.judging import Group, Judge, LocalJudge, PairError, clean_text, load_template
from unime_st.scoring.loading import generative_modules
from unime_st.scoring.prompts import conversation

GROUPS = [Group(query, [item for item in ITEMS if item is not query]) for query in (ITEMS[0], ITEMS[3], ITEMS[6])]


def by_hand(judge: LocalJudge, query: Item, candidate: Item) -> float:
    """Log-odds from a prompt that was not rendered from a template, one pair at a time."""
    images = [item.image.open() if item.image else None for item in (query, candidate)]
    texts = [clean_text(item.text) if item.text else None for item in (query, candidate)]
    prompt = tiny.PAIR.format(*(tiny.written(text, image) for text, image in zip(texts, images)))
    logits = tiny.answer_logits(judge.model, prompt, [image for image in images if image is not None])
    tokens = judge.model.tokenizer
    yes, no = (tokens.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    return float(logits[yes] - logits[no])


def golden_image(golden: Path, name: str | None, squash: str | None) -> Path | Image.Image | None:
    if name is None:
        return None
    files = {row["id"]: row["file"] for row in json.loads((golden / "inputs/images.json").read_text())}
    path = golden / "inputs" / files[name]
    return Image.open(path).resize(({"low": 128, "high": 1344}[squash],) * 2) if squash else path


def test_golden_log_odds(golden: Path):
    """All pairs of the reference outputs."""
    data = json.loads((golden / "judge/pairwise.json").read_text())
    judge = LocalJudge(golden / "checkpoints" / data["checkpoint"], batch_size=8, device="cpu")
    groups, expected = [], []
    for pair, answer in zip(data["pairs"], data["single"], strict=True):
        squash = pair["image_resolution"]
        texts, images = ([pair[f"{side}_{kind}"] for side in ("qry", "cand")] for kind in ("text", "image"))
        if not texts[1] and not images[1]:
            continue  # an item is never empty; the reranker's test has this pair
        pil_images = [golden_image(golden, image, squash) for image in images]
        query, candidate = (Item(text, pil_image) for text, pil_image in zip(texts, pil_images))
        groups.append(Group(query, [candidate]))
        expected.append(answer["yes_logit"] - answer["no_logit"])
    assert len(groups) == 33
    scores = judge.score(groups)
    assert all(part.dtype == np.float32 for part in scores)
    assert np.abs(np.concatenate(scores) - expected).max() < 1e-4


def test_log_odds_equal_the_recipe_by_hand(judge: LocalJudge):
    scores = judge.score(GROUPS)
    assert all(part.dtype == np.float32 for part in scores)
    expected = [by_hand(judge, group.query, candidate) for group in GROUPS for candidate in group.candidates]
    assert np.abs(np.concatenate(scores) - expected).max() < 1e-4


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_every_kind_of_pair_equals_the_recipe_by_hand(family: str, tmp_path: Path):
    judge = LocalJudge(tiny.checkpoint(tmp_path, family), batch_size=5, device="cpu")
    scores = judge.score(GROUPS)
    for group, found in zip(GROUPS, scores):
        expected = [by_hand(judge, group.query, candidate) for candidate in group.candidates]
        assert np.abs(found - expected).max() < 1e-4
        assert np.ptp(found) > 0.1  # else the comparison would say little


def test_batch_size_order_and_neighbours_do_not_matter(folder: str, judge: LocalJudge):
    together = judge.score(GROUPS)
    single = LocalJudge(folder, batch_size=1, device="cpu")
    for group, found in zip(GROUPS, together):
        reverse = single.score([Group(group.query, group.candidates[::-1])])[0][::-1]
        assert np.abs(found - reverse).max() < 1e-5


def test_exchanged_pairs_do_not_depend_on_their_neighbors():
    """The template of `unime-tiny` takes an instruction off a candidate; texts beside it have none."""
    image = Item(image=tiny.png(0))
    queries = [Item("a star"), Item("find an image: a red square"), Item("a blue circle")]
    exchanged = LocalJudge("unime-tiny", template="tiny", device="cpu", pair_order="candidate_first")
    together = np.concatenate(exchanged.score([Group(query, [image]) for query in queries]))
    asked = LocalJudge("unime-tiny", template="tiny", device="cpu")
    captions = [Item("a star"), Item("a red square"), Item("a blue circle")]
    expected = [asked.score([Group(Item("find a caption.", image.image), [caption])])[0][0] for caption in captions]
    np.testing.assert_allclose(together, expected, atol=1e-4)


def test_equals_cross_encoder_predict(judge: LocalJudge):
    pairs = [(group.query.to_input(), item.to_input()) for group in GROUPS for item in group.candidates]
    expected = judge.model.predict(pairs, activation_fn=torch.nn.Identity())
    assert np.abs(np.concatenate(judge.score(GROUPS)) - expected).max() < 1e-5


def test_prompts_equal_those_of_the_processor(judge: LocalJudge):
    groups, failed = judge.scorer.prompts.encode([(group.query, group.candidates) for group in GROUPS])
    assert not failed and len(groups) == len(GROUPS)
    for group, pairs in groups:
        expected = judge.model[0].preprocess([conversation(query, [item]) for query, item in pairs])
        for suffix, ids, mask in zip(group.suffixes, expected["input_ids"], expected["attention_mask"], strict=True):
            assert (group.prefix + suffix).token_ids == ids[mask.bool()].tolist()
        seen = [image for suffix in group.suffixes for image in (group.prefix + suffix).images]
        with torch.no_grad():
            alone = judge.model[0].model.get_image_features(expected["pixel_values"], expected["image_grid_thw"])
        assert (torch.cat([image.embeddings for image in seen]) - torch.cat(alone.pooler_output)).abs().max() < 1e-5


def test_models_that_cannot_share_take_whole_prompts(judge: LocalJudge, folder: str):
    expected = judge.score(GROUPS)
    slow = LocalJudge(folder, batch_size=4, device="cpu")
    slow.scorer.obstacle = "for the test"
    found = slow.score(GROUPS)
    errors: list[PairError] = []
    broken = Group("a", [Item(image=b"no image"), Item("b"), Item("red " * 2000)])
    assert np.isnan(slow.score([broken], errors=errors)[0]).tolist() == [True, False, True]
    assert sorted(error.candidate for error in errors) == [0, 2]
    assert max(np.abs(left - right).max() for left, right in zip(found, expected)) < 1e-5


def test_distinct_pairs_and_images_cost_once(folder: str, monkeypatch: pytest.MonkeyPatch):
    judge = LocalJudge(folder, batch_size=4, device="cpu")
    model = judge.model[0].model.model
    rows, grids, opened = [], [], []
    model.language_model.register_forward_pre_hook(
        lambda _, args, inputs: rows.append(len(inputs["inputs_embeds"])), with_kwargs=True
    )
    model.visual.register_forward_pre_hook(
        lambda _, args, inputs: grids.append(len(inputs["grid_thw"])), with_kwargs=True
    )
    original = type(ITEMS[3].image).open
    monkeypatch.setattr(type(ITEMS[3].image), "open", lambda self: opened.append(self) or original(self))
    same = [Group(Item(group.query.text, group.query.image), [*group.candidates] * 2) for group in GROUPS]
    scores = judge.score([*same, *GROUPS])
    beginnings = len(GROUPS)
    assert sum(rows) == sum(len(group.candidates) for group in GROUPS) + beginnings
    assert len(opened) == len(set(opened)) == sum(grids) == 5
    for twice, once in zip(scores[: len(same)], scores[len(same) :]):
        assert np.array_equal(twice, np.tile(once, 2))
    judge.score(GROUPS)
    assert len(opened) == 5  # kept from call to call
    with torch.no_grad():
        next(model.visual.parameters()).add_(0.1)
    judge.score(GROUPS)
    assert len(opened) == 10  # but not from weights to weights


def test_memory_for_images_is_bounded(folder: str, judge: LocalJudge):
    small = LocalJudge(folder, batch_size=2, cache_bytes=1, device="cpu")
    held = []
    small.model[0].model.model.language_model.register_forward_pre_hook(
        lambda *_: held.append(len(small.scorer.prompts.images._cache))
    )
    found = small.score(GROUPS)
    assert max(held) == 1
    assert max(np.abs(left - right).max() for left, right in zip(found, judge.score(GROUPS))) < 1e-5


def test_bad_images_raise_with_their_place_or_are_set_aside(judge: LocalJudge, tmp_path: Path):
    broken = Item(image=tiny.png(1)[:100])
    missing = Item("a", image=tmp_path / "none.png")
    groups = [Group("a", ["b", broken, "c"]), Group(missing, ["b", "c"])]
    with pytest.raises(BadImageError, match="group 0, candidate 1: image <100 bytes"):
        judge.score(groups[:1])
    with pytest.raises(BadImageError, match=r"group 1, candidate 0: .*none.png"):
        judge.score([Group("a", ["b"]), groups[1]])
    errors: list[PairError] = []
    scores = judge.score(groups, errors=errors)
    assert [np.isnan(part).tolist() for part in scores] == [[False, True, False], [True, True]]
    assert sorted((error.group, error.candidate) for error in errors) == [(0, 1), (1, 0), (1, 1)]
    assert all("image" in error.reason for error in errors)
    assert np.allclose(scores[0][[0, 2]], judge.score([Group("a", ["b", "c"])])[0], atol=1e-5)


def test_a_prompt_that_would_have_to_be_cut_is_refused(judge: LocalJudge):
    long = Item("red " * 2000)
    with pytest.raises(
        ValueError, match=r"group 0, candidate 1: the prompt has \d+ tokens, the model takes at most 1024"
    ):
        judge.score([Group("a", ["b", long])])
    errors: list[PairError] = []
    assert np.isnan(judge.score([Group("a", ["b", long])], errors=errors)[0]).tolist() == [False, True]
    assert [error.candidate for error in errors] == [1]


def test_nothing_to_judge(judge: LocalJudge):
    assert judge.score([]) == []
    empty, full = judge.score([Group("a", []), Group("a", ["b"])])
    assert empty.shape == (0,) and empty.dtype == np.float32 and full.shape == (1,)


def test_broken_weights_are_reported(folder: str):
    judge = LocalJudge(folder, device="cpu")
    with torch.no_grad():
        judge.model[0].model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="group 0, candidate 0"):
        judge.score([Group("a", ["b"])])


def test_identification(folder: str, judge: LocalJudge, tmp_path: Path):
    assert isinstance(judge, Judge) and judge.name == Path(folder).name
    again = LocalJudge(folder, device="cpu")
    assert (again.name, again.revision, again.prompt_hash) == (judge.name, judge.revision, judge.prompt_hash)
    other = LocalJudge(tiny.checkpoint(tmp_path, seed=1), device="cpu", name="other")
    assert other.name == "other" and other.revision != judge.revision and other.prompt_hash == judge.prompt_hash
    options = [{"template": "tiny"}, {"image_tokens": (4, 100)}]
    hashes = {LocalJudge(folder, device="cpu", **option).prompt_hash for option in options}
    assert len(hashes | {judge.prompt_hash}) == 3


def test_image_tokens_change_what_is_seen(folder: str, judge: LocalJudge):
    groups = [Group("a", [Item(image=tiny.png(1, (120, 120)))])]
    small = LocalJudge(folder, image_tokens=(1, 4), device="cpu")
    assert abs(small.score(groups)[0] - judge.score(groups)[0]) > 1e-3
    with pytest.raises(ValueError, match=r"image_tokens=\(5, 4\)"):
        LocalJudge(folder, image_tokens=(5, 4), device="cpu")


def test_dropout_is_off_and_training_mode_comes_back(judge: LocalJudge):
    expected = judge.score(GROUPS)
    for layer in judge.model[0].model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    judge.model.train()
    try:
        assert all(np.allclose(left, right, atol=1e-6) for left, right in zip(judge.score(GROUPS), expected))
        assert judge.model.training
    finally:
        judge.model.eval()


def test_a_loaded_model_is_used_as_it_is(judge: LocalJudge):
    template = judge.model[0].processor.chat_template
    other = LocalJudge(judge.model, template="tiny")
    assert other.model is judge.model and judge.model[0].processor.chat_template == template
    assert np.abs(other.score(GROUPS)[0] - judge.score(GROUPS)[0]).max() > 1e-3


def test_models_that_cannot_answer(folder: str, tmp_path: Path):
    transformer = Transformer(folder, unpad_inputs=False)
    pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save_pretrained(str(tmp_path / "embedder"))
    with pytest.raises(ValueError, match="without a language-model head"):
        LocalJudge(tmp_path / "embedder", device="cpu")
    with pytest.raises(ValueError, match="expected a generative CrossEncoder"):
        LocalJudge(CrossEncoder(modules=generative_modules(folder)[:1], device="cpu"))
    with pytest.raises(ValueError, match="splits 'No'"):
        LocalJudge(tiny.checkpoint(tmp_path / "no-no", words=["Yes"]), device="cpu")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        LocalJudge(folder, batch_size=0)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nothing"):
        LocalJudge(tmp_path / "nothing")


def test_a_template_that_changes_texts_is_rendered_in_full(folder: str):
    shout = load_template("tiny").replace("{{- 'Query:' -}}", "{{- 'Query:' ~ (message.content[-1].text | length) -}}")
    judge = LocalJudge(folder, template=shout, device="cpu")
    pairs = [(group.query, item) for group in GROUPS[::2] for item in group.candidates]
    render = judge.scorer.prompts.render
    prompts = render(pairs)
    messages = [conversation(query, [item], decode=False) for query, item in pairs]
    assert prompts == judge.model[0].processor.apply_chat_template(messages, chat_template=shout, tokenize=False)
    assert not render.fixed


def test_a_model_that_does_not_answer_yes_or_no_is_reported(judge: LocalJudge, caplog: pytest.LogCaptureFixture):
    """The tiny random model spreads its probability over the vocabulary; `unime-tiny` has learned to answer."""
    slow = LocalJudge(judge.model, name="slow")
    slow.scorer.obstacle = "for the test"
    fast = LocalJudge(judge.model, name="fast")
    for model in (fast, slow):
        expected = []
        for group in GROUPS:
            pairs = [(group.query, candidate) for candidate in group.candidates]
            logits = judge.scorer._forward(pairs, range(len(judge.model.tokenizer)))
            expected += logits.softmax(1)[:, judge.scorer.token_ids].sum(1).tolist()
        model.score(GROUPS)
        assert model.answer_share == pytest.approx(np.mean(expected), rel=1e-4) and model.answer_share < 0.01
        assert f"{model.name}: Yes and No together have less than 1%" in caplog.text
    caplog.clear()
    fast.score(GROUPS[:1])  # said once
    good = LocalJudge("unime-tiny", template="tiny", device="cpu")
    good.score([Group("a red square", ["a red square", "a blue circle"])])
    assert good.answer_share > 0.9 and not caplog.records
