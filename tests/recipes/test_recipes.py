"""Recipes are complete and consistent data."""

from __future__ import annotations

import pytest

from unime_st.backbones import FAMILIES
from unime_st.recipes import RECIPES, RELEASED, ImageRule, get_recipe

ALIASES = {
    "unime-v2", "unime-v2-2b", "unime-v2-7b", "unime-v2-reranker", "unime-v1-phi3.5", "unime-v1-llava1.6",
    "unime-v1-llava-ov",
}  # fmt: skip


def test_aliases() -> None:
    assert set(RELEASED) == ALIASES
    assert "unime-tiny" in RECIPES


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_refers_to_what_exists(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.name == name
    assert recipe.family in FAMILIES
    recipe.read_template()
    family = FAMILIES[recipe.family]
    if recipe.image is not None and not recipe.image.stock:
        assert family.load("processor").__module__.startswith("unime_st.")
    if recipe.task == "reranker" and family.generator:
        assert family.load("generator").__name__.endswith("ForConditionalGeneration")


def test_official_values() -> None:
    assert get_recipe("unime-v2").revision == "36ef54da9f3dc3a2bfba115c4fb403b1a1f7cb0c"
    assert get_recipe("unime-v2-2b").positions == get_recipe("unime-v2-7b").positions == "1d"
    assert get_recipe("unime-v2-2b").max_length == 4096
    assert get_recipe("unime-v2-2b").demo.score == 0.62109375


def test_unknown_recipe_names_all() -> None:
    with pytest.raises(ValueError, match=r"No recipe 'unime-v3'. Use one of: .*unime-v2.*qwen2.5-vl"):
        get_recipe("unime-v3")


@pytest.mark.parametrize("size", ["huge", "0", 0, -3, "3.5", ""])
def test_bad_image_size(size: object) -> None:
    with pytest.raises(ValueError, match="use 'official', 'training', 'native'"):
        ImageRule(official=1344).side(size)


def test_image_sizes() -> None:
    rule = ImageRule(official=1344, training=672)
    assert [rule.side(size) for size in (None, "official", "training", "native", 100, "100")] == [
        1344, 1344, 672, None, 100, 100,
    ]  # fmt: skip
