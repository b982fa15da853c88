"""Recipes: one row of data per model family, and the chat templates they use."""

from __future__ import annotations

from unime_st.recipes.bare import BARE
from unime_st.recipes.public import PUBLIC
from unime_st.recipes.recipe import Demo, ImageRule, Recipe
from unime_st.recipes.released import RELEASED, TINY

__all__ = ["BARE", "PUBLIC", "RECIPES", "RELEASED", "Demo", "ImageRule", "Recipe", "get_recipe"]

RECIPES: dict[str, Recipe] = {**RELEASED, TINY.name: TINY, **PUBLIC, **BARE}


def get_recipe(name: str) -> Recipe:
    """Return a recipe by its name.

    Args:
        name: Alias of a released model (``"unime-v2"``), ``"unime-tiny"``, another publisher's model
            (``"qwen3-vl-embedding"``), or a bare backbone (``"qwen2.5-vl"``).

    Returns:
        The recipe.

    Raises:
        ValueError: There is none of that name; the message lists all.

    Example:
        >>> get_recipe("unime-v2").family
        'llava_onevision'
    """
    if name not in RECIPES:
        raise ValueError(f"No recipe {name!r}. Use one of: {', '.join(RECIPES)}.")
    return RECIPES[name]
