"""Prompts byte for byte, answer tokens, and templates that would lose something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_reranker as tiny
from tiny_checkpoints import qwen_tokenizer
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from unime_st.data import Item
from unime_st.judging import (
    LIST_PROMPT,
    PAIR_PROMPT,
    answer_token_ids,
    as_item,
    check_template,
    clean_text,
    load_template,
)
from unime_st.losses.list_answers import index_answers
from unime_st.scoring.prompt_encoder import PairRenderer
from unime_st.scoring.prompts import conversation

QUERY = Item("<|image_1|>\nWhich is it?\n", tiny.png(0))
DOCUMENTS = [Item("a red square"), Item(image=tiny.png(1)), Item("<|image_1|> that <image>one", tiny.png(2))]


@pytest.fixture(scope="module")
def processor() -> Qwen2VLProcessor:
    return Qwen2VLProcessor(Qwen2VLImageProcessor(), qwen_tokenizer(), Qwen2VLVideoProcessor())


def rendered(processor: Qwen2VLProcessor, template: str, documents: list[Item], **options: Any) -> str:
    messages = conversation(QUERY, documents, decode=False)
    return processor.apply_chat_template(messages, chat_template=load_template(template), tokenize=False, **options)


def test_official_prompts(processor: Qwen2VLProcessor):
    query = tiny.IMAGE + "Which is it?\n"
    assert rendered(processor, "official", DOCUMENTS[:1]) == tiny.PAIR.format(query, "a red square")
    candidates = f"(1) a red square(2) {tiny.IMAGE}(3) {tiny.IMAGE} that one"
    assert rendered(processor, "official", DOCUMENTS, task="listwise") == tiny.LIST.format(query, candidates)
    assert PAIR_PROMPT in tiny.PAIR and LIST_PROMPT in tiny.LIST


def test_tiny_prompts(processor: Qwen2VLProcessor):
    end = "<|im_end|><|im_start|>"
    pair = f"Query:{tiny.IMAGE}Which is it?\nCandidate:{tiny.IMAGE}{end}"
    assert rendered(processor, "tiny", DOCUMENTS[1:2]) == pair
    candidates = f"Candidates:(1) a red square(2) {tiny.IMAGE}(3) {tiny.IMAGE} that one"
    expected = f"Query:{tiny.IMAGE}Which is it?\n{candidates}{end}Ans: ("
    assert rendered(processor, "tiny", DOCUMENTS, task="listwise") == expected


def test_tiny_prompt_of_an_exchanged_pair_is_the_one_that_the_model_knows(processor: Qwen2VLProcessor):
    """An image asked about a text query's words, without that query's instruction, equals a query for captions."""
    image, caption = tiny.png(0), "a red square and a star"

    def pair(query: Item, document: Item) -> str:
        messages = conversation(query, [document], decode=False)
        return processor.apply_chat_template(messages, chat_template=load_template("tiny"), tokenize=False)

    known = pair(Item("find a caption.", image), Item(caption))
    assert known == f"Query:{tiny.IMAGE}find a caption.Candidate:{caption}<|im_end|><|im_start|>"
    assert pair(Item(image=image), Item(f"find an image: {caption}")) == known
    assert pair(Item(image=image), Item(caption)) == known
    asked = f"Query:find an image: {caption}Candidate:{tiny.IMAGE}<|im_end|><|im_start|>"
    assert pair(Item(f"find an image: {caption}"), Item(image=image)) == asked


@pytest.mark.parametrize(
    "text",
    [
        "text.removeprefix('color: ')",
        "text | replace('color: ', '')",
        "'a color' if 'color: ' in text else text",
        "'a color' if text.startswith('color: ') else text",
    ],
)
def test_texts_that_a_template_changes_are_rendered_whatever_stands_beside_them(
    processor: Qwen2VLProcessor, text: str
):
    template = (
        "{% for m in messages %}{% set text = m.content if m.content is string else m.content[0].text %}"
        f"{{{{ m.role }}}}:{{% generation %}}{{{{ {text} }}}}{{% endgeneration %}} {{% endfor %}}"
    )
    pairs = [(Item("q"), Item(word)) for word in ("a star", "color: red", "a cube")]
    pairs += [(Item("other"), Item("color: blue"))]
    render = PairRenderer(processor, template)
    expected = [render._render([conversation(query, [item], decode=False)])[0] for query, item in pairs]
    assert render(pairs) == expected and "color: " not in "".join(expected)
    assert render.fixed, "the other texts are joined without the template engine"


@pytest.mark.parametrize("template", ["official", "tiny"])
def test_templates_clean_what_a_plain_cross_encoder_passes_and_keep_its_prompt(
    processor: Qwen2VLProcessor, template: str
):
    raw = [
        {"role": "system", "content": [{"type": "text", "text": "Mind the colour."}]},
        {"role": "query", "content": "<|image_1|>\nWhich?"},
        {"role": "document", "content": [{"type": "text", "text": "<|image_pad|>\n<image>\nThis <|image_pad|>one."}]},
    ]
    prompt = processor.apply_chat_template(raw, chat_template=load_template(template), tokenize=False)
    assert "Mind the colour." in prompt and "Query:Which?Candidate:This one." in prompt


def test_clean_text_keeps_all_else():
    assert clean_text("<|image_1|>\n\n<|image_pad|> x<image>\ny\n") == "\n xy\n"
    assert clean_text(" plain < image > \n") == " plain < image > \n"


def test_answer_tokens():
    tokens = qwen_tokenizer()
    yes, no = answer_token_ids(tokens)
    assert tokens.convert_ids_to_tokens([yes, no]) == ["Yes", "No"]


@pytest.mark.parametrize(("words", "missing", "near"), [(["yes", "No"], "Yes", "yes"), (["Yes"], "No", "Yes")])
def test_no_single_token_lists_what_there_is(words: list[str], missing: str, near: str):
    with pytest.raises(ValueError, match=rf"splits '{missing}' into .*'{near}'"):
        answer_token_ids(qwen_tokenizer(words))


def test_index_tokens():
    tokens = qwen_tokenizer()
    written = [tokens.convert_ids_to_tokens(list(answer)) for answer in index_answers(tokens, 9)]
    assert written == [[digit] for digit in "123456789"]
    assert tokens.convert_ids_to_tokens(list(index_answers(tokens, 10)[0])) == ["1", ")"]  # 10 begins with 1, too
    with pytest.raises(ValueError, match="At most 99 can"):
        index_answers(tokens, 100)
    with pytest.raises(ValueError, match="at least 1"):
        index_answers(tokens, 0)


LOSING = {
    "no document": "{% for m in messages if m.role == 'query' %}{{ m.content }}{% endfor %}",
    "only user turns": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "no image": (
        "{% for m in messages %}{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}{% endfor %}Ans: ("
    ),
    "only the first document": (
        "{% set d = messages | selectattr('role', 'eq', 'document') | list %}{{ messages[0].content }}"
        "{{ d[0].content }}{{ task }}Ans: ("
    ),
}


@pytest.mark.parametrize(
    ("name", "listwise", "message"),
    [
        ("no document", False, "image of document 1, text of document 1"),
        ("only user turns", False, "image of query, text of query"),
        ("no image", False, "image of query, image of document 1"),
        ("only the first document", True, "image of document 2, text of document 2"),
    ],
)
def test_losing_templates_are_refused(processor: Qwen2VLProcessor, name: str, listwise: bool, message: str):
    with pytest.raises(ValueError, match=message):
        check_template(processor, LOSING[name], listwise=listwise)


def test_a_pair_template_is_no_list_template(processor: Qwen2VLProcessor):
    pair = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}Ans: ("
    check_template(processor, pair)
    with pytest.raises(ValueError, match="must number the candidates"):
        check_template(processor, pair, listwise=True)
    with pytest.raises(ValueError, match="cannot render"):
        check_template(processor, "{{ raise_exception('users only') }}")


def test_unknown_template():
    with pytest.raises(ValueError, match="'offical': expected one of"):
        load_template("offical")


def test_a_template_in_a_file(tmp_path: Path):
    (tmp_path / "Prüfung.jinja").write_text("{{ messages[0].content[0].text }} ü", encoding="utf-8")
    assert load_template(str(tmp_path / "Prüfung.jinja")) == "{{ messages[0].content[0].text }} ü"


def test_as_item():
    assert as_item("a") == as_item({"text": "a", "image": None}) == as_item(Item("a"))
    assert as_item(tiny.make_image(3)).modality == "image"
    assert as_item({"text": "a", "image": tiny.make_image(3)}).modality == "image+text"
    for wrong in (3, {"txt": "a"}, None):
        with pytest.raises(TypeError, match="expected an Item"):
            as_item(wrong)  # type: ignore[arg-type]
