"""Chat templates, byte for byte as the authors' strings."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from unime_st.recipes import RECIPES, get_recipe

IMAGE = {"type": "image", "image": "x.png"}


def render(name: str, *content: Any, prompt: str | None = None, **variables: Any) -> str:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    messages = [{"role": "user", "content": parts}]
    if prompt is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt}]})
    text = get_recipe(name).read_template()
    return render_jinja_template(conversations=[messages], chat_template=text, **variables)[0][0]


@pytest.mark.parametrize(
    ("content", "prompt", "expected"),
    [
        (["a cat\n"], None, "a cat\n"),
        (["  spaces  "], None, "  spaces  "),
        ([IMAGE, "\nRepresent the given image.\n"], None, "<|image_pad|>\nRepresent the given image.\n"),
        ([" Find it.", IMAGE], None, "<|image_pad|> Find it."),
        ([IMAGE], "\nRepresent the given image.\n", "<|image_pad|>\nRepresent the given image.\n"),
        (["caption"], "Find me: ", "Find me: caption"),
        ([IMAGE, "<|image_1|>\nFind.\n"], None, "<|image_pad|>\nFind.\n"),
        ([IMAGE, IMAGE, "two"], None, "<|image_pad|><|image_pad|>two"),
    ],
)
def test_v2_qwen_is_raw_text(content: list, prompt: str | None, expected: str) -> None:
    assert render("unime-v2-2b", *content, prompt=prompt) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([" a cat \n"], "<|im_start|>user \na cat<|im_end|><|im_start|>assistant\n"),
        ([IMAGE, "<|image_1|>\nFind.\n"], "<|im_start|>user <image>\nFind.<|im_end|><|im_start|>assistant\n"),
        ([IMAGE, "<image>\nFind."], "<|im_start|>user <image>\nFind.<|im_end|><|im_start|>assistant\n"),
    ],
)
def test_v2_llava_strips_text_and_asks_for_an_answer(content: list, expected: str) -> None:
    assert render("unime-v2", *content) == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("unime-v1-llava1.6", ["hi"], "[INST] hi\nSummary above sentence in one word: [/INST]"),
        ("unime-v1-llava1.6", [IMAGE], "[INST] <image>\nSummary above image in one word: [/INST]"),
        (
            "unime-v1-llava1.6",
            [IMAGE, "hi"],
            "[INST] <image>\nhi\nSummary above image and sentence in one word: [/INST]",
        ),
        (
            "unime-v1-llava-ov",
            ["hi"],
            "<|im_start|>user \nhi\nSummary above sentence in one word:\n<|im_end|><|im_start|>assistant\n",
        ),
        (
            "unime-v1-llava-ov",
            [IMAGE],
            "<|im_start|>user <image>\nSummary above image in one word:\n<|im_end|><|im_start|>assistant\n",
        ),
        ("unime-v1-phi3.5", ["hi"], "<|user|>\nhi\nSummary above sentence in one word: <|end|>\n<|assistant|>\n"),
        (
            "unime-v1-phi3.5",
            [IMAGE],
            "<|user|>\n<|image_1|>\nSummary above image in one word: <|end|>\n<|assistant|>\n",
        ),
    ],
)
def test_v1_asks_for_one_word(name: str, content: list, expected: str) -> None:
    assert render(name, *content) == expected


def test_v1_styles() -> None:
    mmeb = "<|image_1|>\nRepresent the given image.\n"
    assert render("unime-v1-llava1.6", IMAGE, mmeb, style="mmeb") == mmeb.replace("<|image_1|>", "<image>")
    assert render("unime-v1-llava1.6", "plain\n", style="mmeb") == "plain\n"
    assert render("unime-v1-phi3.5", IMAGE, mmeb, style="mmeb") == mmeb
    evaluation = "<|user|>\nhi\nSummary above sentence in one word:<|end|>\n<|assistant|>\n"
    assert render("unime-v1-phi3.5", "hi", style="one_word_eval") == evaluation
    body = "<|im_start|>user <image>\nRepresent the given image.<|im_end|><|im_start|>assistant\n"
    assert render("unime-v1-llava-ov", IMAGE, mmeb, style="mmeb") == body


def test_a_prompt_comes_between_image_and_text() -> None:
    got = render("unime-v1-llava1.6", IMAGE, "what?", prompt="Answer. ")
    assert got == "[INST] <image>\nAnswer. what?\nSummary above image and sentence in one word: [/INST]"


def test_tiny_template() -> None:
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    assert render("unime-tiny", IMAGE, "red") == f"{vision}red<|im_end|><|im_start|>"


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.template])
def test_a_part_that_is_none_is_absent(name: str) -> None:
    none_text, none_image = {"type": "text", "text": None}, {"type": "image", "image": None}
    if RECIPES[name].task == "embedding":
        assert render(name, IMAGE, none_text) == render(name, IMAGE)
        assert render(name, none_image, "words") == render(name, "words")


@pytest.mark.parametrize("template", ["reranker.jinja", "tiny_reranker.jinja"])
def test_a_part_of_a_pair_that_is_none_is_absent(template: str) -> None:
    text = (files("unime_st.recipes") / "templates" / template).read_text()

    def pair(*content: Any) -> str:
        messages = [{"role": role, "content": list(content)} for role in ("query", "document")]
        return render_jinja_template(conversations=[messages], chat_template=text)[0][0]

    words = {"type": "text", "text": "words"}
    assert pair(IMAGE, {"type": "text", "text": None}) == pair(IMAGE)
    assert pair({"type": "image", "image": None}, words) == pair(words)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_template_accepts_plain_strings(name: str) -> None:
    text = RECIPES[name].read_template()
    if text is not None and RECIPES[name].task == "embedding":
        rendered = render_jinja_template(conversations=[[{"role": "user", "content": "words"}]], chat_template=text)
        assert "words" in rendered[0][0]
