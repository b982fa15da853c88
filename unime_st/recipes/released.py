"""Recipes of the released UniME and UniME-V2 checkpoints.

Sources: UniME (arXiv 2504.17432) and UniME-V2 (arXiv 2510.13515), their released code and model cards. Templates are
byte-exact; prompts are the strings the authors put in front of or behind an input.
"""

from __future__ import annotations

from unime_st.recipes.recipe import Demo, ImageRule, Recipe

# Instructions of the official evaluation that contain no text of the sample. With an image they begin with the
# separator that follows the image token in the MMEB strings.
_V2_PROMPTS = {
    "find_caption": " Find an image caption describing the given image.",
    "represent_image": "\nRepresent the given image.\n",
    "classification": "\nRepresent the given image for classification\n",
    "find_image": "Find me an everyday image that matches the given caption: ",
    "question": "\nRepresent the given image with the following question: ",
}

_V2_DEMO = Demo(
    score=0.62109375,
    tolerance=0.01,
    image="demo.png",
    image_text=" Find an image caption describing the given image.",
    text="A man is crossing the street with a red car parked nearby.",
)
_V1_DEMO = Demo(
    score=0.59,
    tolerance=0.01,
    image="demo.png",
    text="A man is crossing the street with a red car parked nearby.",
)

# Qwen2-VL: the official path hands PIL images to the image processor, which ignores EXIF.
_V2_QWEN_IMAGES = ImageRule(official=1344, training=672, exif=False)
# LLaVA-OneVision: the official path goes through the chat template, which turns images after the squash.
_V2_LLAVA_IMAGES = ImageRule(official=1344, training=336, exif=True)
# UniME's scripts for LLaVA-1.6 call the processor on the opened image, those for LLaVA-OneVision go through the chat
# template, which turns it.
_V1_LLAVA_IMAGES = ImageRule(official=None, training=336, exif=False)
_V1_LLAVA_OV_IMAGES = ImageRule(official=None, training=336, exif=True)
# LamRA's loader: transparency on white, 4 to 300 tokens of 28 x 28 pixels.
_RERANKER_IMAGES = ImageRule(
    official=None, exif=False, alpha="white", min_pixels=4 * 28 * 28, max_pixels=300 * 28 * 28
)

_ROWS = (
    Recipe(
        name="unime-v2",
        family="llava_onevision",
        title="UniME-V2 (LLaVA-OneVision-8B)",
        hub_id="TianchengGu/UniME-V2-LLaVA-OneVision-8B",
        revision="36ef54da9f3dc3a2bfba115c4fb403b1a1f7cb0c",
        base_model="llava-hf/llava-onevision-qwen2-7b-ov-hf",
        template="v2_llava_onevision.jinja",
        image=_V2_LLAVA_IMAGES,
        dtype="bfloat16",
        prompts=_V2_PROMPTS,
        license="apache-2.0",
    ),
    Recipe(
        name="unime-v2-2b",
        family="qwen2_vl",
        title="UniME-V2 (Qwen2-VL-2B)",
        hub_id="TianchengGu/UniME-V2-Qwen2VL-2B",
        base_model="Qwen/Qwen2-VL-2B-Instruct",
        template="v2_qwen2_vl.jinja",
        image=_V2_QWEN_IMAGES,
        positions="1d",
        dtype="bfloat16",
        max_length=4096,
        prompts=_V2_PROMPTS,
        demo=_V2_DEMO,
        license="apache-2.0",
    ),
    Recipe(
        name="unime-v2-7b",
        family="qwen2_vl",
        title="UniME-V2 (Qwen2-VL-7B)",
        hub_id="TianchengGu/UniME-V2-Qwen2VL-7B",
        base_model="Qwen/Qwen2-VL-7B-Instruct",
        template="v2_qwen2_vl.jinja",
        image=_V2_QWEN_IMAGES,
        positions="1d",
        dtype="bfloat16",
        max_length=4096,
        prompts=_V2_PROMPTS,
        license="apache-2.0",
    ),
    Recipe(
        name="unime-v2-reranker",
        family="qwen2_5_vl",
        title="UniME-V2-Reranker (Qwen2.5-VL-7B)",
        hub_id="TianchengGu/UniME-V2-reranker-Qwen25VL-7B",
        base_model="Qwen/Qwen2.5-VL-7B-Instruct",
        task="reranker",
        template="reranker.jinja",
        image=_RERANKER_IMAGES,
        dtype="bfloat16",
    ),
    Recipe(
        name="unime-v1-phi3.5",
        family="phi3_v",
        title="UniME (Phi-3.5-Vision)",
        hub_id="DeepGlint-AI/UniME-Phi3.5-V-4.2B",
        processor_hub_id="microsoft/Phi-3.5-vision-instruct",
        base_model="microsoft/Phi-3.5-vision-instruct",
        template="v1_phi3_v.jinja",
        image=ImageRule(official=None, training=336, exif=False),
        dtype="float16",
        demo=_V1_DEMO,
    ),
    Recipe(
        name="unime-v1-llava1.6",
        family="llava_next",
        title="UniME (LLaVA-1.6-Mistral-7B)",
        hub_id="DeepGlint-AI/UniME-LLaVA-1.6-7B",
        processor_hub_id="llava-hf/llava-v1.6-mistral-7b-hf",
        base_model="llava-hf/llava-v1.6-mistral-7b-hf",
        template="v1_llava_next.jinja",
        image=_V1_LLAVA_IMAGES,
        dtype="float16",
        demo=_V1_DEMO,
    ),
    Recipe(
        name="unime-v1-llava-ov",
        family="llava_onevision",
        title="UniME (LLaVA-OneVision-7B)",
        hub_id="DeepGlint-AI/UniME-LLaVA-OneVision-7B",
        base_model="llava-hf/llava-onevision-qwen2-7b-ov-hf",
        template="v1_llava_onevision.jinja",
        image=_V1_LLAVA_OV_IMAGES,
        dtype="float16",
    ),
)

RELEASED: dict[str, Recipe] = {recipe.name: recipe for recipe in _ROWS}

TINY = Recipe(
    name="unime-tiny",
    family="qwen2_vl",
    title="unime-tiny",
    template="tiny_embedding.jinja",
    license="apache-2.0",
)
