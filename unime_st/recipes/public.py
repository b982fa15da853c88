"""Recipes of other publishers' embedding models and rerankers, to fine-tune, to distill from, or to judge with.

Sources: QwenLM/Qwen3-VL-Embedding (its scripts for embedding and reranking), and mteb's loaders of GME, Ops-MM-embedding
and WeMM-Embedding; the template of the latter could not be read and follows descriptions. A recipe fits all sizes.
"""

from __future__ import annotations

from unime_st.recipes.recipe import ImageRule, Recipe

_RETRIEVAL = {"retrieval": "Retrieve images or text relevant to the user's query."}
# Qwen3-VL: 4 to 1800 visual tokens of 32 x 32 pixels.
_QWEN3_IMAGES = ImageRule(min_pixels=4 * 32 * 32, max_pixels=1800 * 32 * 32, backend="torchvision")

_ROWS = (
    Recipe(
        name="qwen3-vl-embedding",
        family="qwen3_vl",
        title="Qwen3-VL-Embedding",
        template="qwen3_vl_embedding.jinja",
        image=_QWEN3_IMAGES,
        dtype="bfloat16",
        prompts=_RETRIEVAL,
        license="apache-2.0",
    ),
    Recipe(
        name="qwen3-vl-reranker",
        family="qwen3_vl",
        title="Qwen3-VL-Reranker",
        task="reranker",
        template="qwen3_vl_reranker.jinja",
        image=_QWEN3_IMAGES,
        dtype="bfloat16",
        prompts=_RETRIEVAL,
        yes_no=("yes", "no"),
        license="apache-2.0",
    ),
    Recipe(
        name="gme",
        family="qwen2_vl",
        title="GME",
        template="gme.jinja",
        # Its loader opens images without their EXIF orientation and drops transparency; 4 to 1280 visual tokens.
        image=ImageRule(exif=False, min_pixels=4 * 28 * 28, max_pixels=1280 * 28 * 28),
        positions="1d",  # its forward pass gives the language model no positions
        dtype="float16",
        license="apache-2.0",
    ),
    Recipe(
        name="ops-mm-embedding",
        family="qwen2_vl",
        title="Ops-MM-embedding",
        template="gme.jinja",
        image=ImageRule(exif=False, min_pixels=256 * 28 * 28, max_pixels=1280 * 28 * 28),
        dtype="bfloat16",
        license="apache-2.0",
    ),
    Recipe(
        name="wemm-embedding",
        family="qwen3_5",
        title="WeMM-Embedding",
        template="wemm_embedding.jinja",
        dtype="bfloat16",
        license="apache-2.0",
    ),
)

PUBLIC: dict[str, Recipe] = {recipe.name: recipe for recipe in _ROWS}
