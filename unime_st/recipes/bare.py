"""Recipes of bare backbones, which keep their own chat template, processor and position scheme."""

from __future__ import annotations

from unime_st.recipes.recipe import Recipe


def _bare(name: str, family: str, title: str) -> Recipe:
    return Recipe(
        name=name,
        family=family,
        title=title,
        template_kwargs={"add_generation_prompt": True},
    )


BARE: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _bare("qwen2-vl", "qwen2_vl", "Qwen2-VL"),
        _bare("qwen2.5-vl", "qwen2_5_vl", "Qwen2.5-VL"),
        _bare("qwen3-vl", "qwen3_vl", "Qwen3-VL"),
        _bare("qwen3.5-vl", "qwen3_5", "Qwen3.5"),
        _bare("llava-1.6", "llava_next", "LLaVA-1.6"),
        _bare("llava-onevision", "llava_onevision", "LLaVA-OneVision"),
        _bare("internvl3", "internvl", "InternVL3"),
        _bare("smolvlm", "smolvlm", "SmolVLM"),
        _bare("phi3.5-v", "phi3_v", "Phi-3.5-Vision"),
        # Whatever else transformers loads as image-text-to-text.
        _bare("bare", "any", "Vision-language backbone"),
    )
}
