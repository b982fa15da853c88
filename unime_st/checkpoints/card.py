"""The model card of a converted folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unime_st.recipes import Recipe

_PAPERS = {
    "v1": "Breaking the Modality Barrier: Universal Embedding Learning with Multimodal LLMs (arXiv 2504.17432)",
    "v2": "UniME-V2: MLLM-as-a-Judge for Universal Multimodal Embedding Learning (arXiv 2510.13515)",
}


def write_card(folder: Path, recipe: Recipe, *, alias: str | None, manifest: dict[str, Any], processor: Any) -> None:
    """Write ``README.md``.

    Args:
        folder: The converted folder.
        recipe: What it was made by.
        alias: Its short name on this machine.
        manifest: Content of ``unime.json``.
        processor: The processor, for the image rule that is in force.

    Example:
        >>> write_card(folder, recipe, alias=None, manifest={}, processor=processor)  # doctest: +SKIP
    """
    reranker = recipe.task == "reranker"
    name = alias or "path/to/this/folder"
    kind = "CrossEncoder" if reranker else "SentenceTransformer"
    head = [
        "---",
        "library_name: sentence-transformers",
        f"pipeline_tag: {'text-ranking' if reranker else 'feature-extraction'}",
        *([f"license: {recipe.license}"] if recipe.license else []),
        *([f"base_model: {recipe.base_model}"] if recipe.base_model else []),
        "tags:",
        "- sentence-transformers",
        "- multimodal",
        f"- {'cross-encoder' if reranker else 'sentence-similarity'}",
        "---",
        "",
        f"# {recipe.title}",
        "",
        *_usage(kind, name, reranker),
        "## How inputs are treated",
        "",
        *[f"- {line}" for line in _facts(recipe, processor)],
        "",
        "## Origin",
        "",
    ]
    if recipe.hub_id:
        head.append(
            f"Weights of `{recipe.hub_id}`"
            + (f", commit `{manifest.get('revision')}`." if manifest.get("revision") else ".")
        )
    paper = next((text for key, text in _PAPERS.items() if recipe.name.startswith(f"unime-{key}")), None)
    if paper:
        head.append(f"Paper: {paper}.")
    head += [f"Converted by unime-st {manifest.get('unime_st')}, recipe `{recipe.name}`.", ""]
    (folder / "README.md").write_text("\n".join(head), encoding="utf-8")


def _usage(kind: str, name: str, reranker: bool) -> list[str]:
    call = (
        'ranking = model.rank("a red car", [{"image": "street.jpg"}, "a photo of a street"])'
        if reranker
        else 'vectors = model.encode(["a red car", {"image": "street.jpg", "text": "Which colour is the car?"}])'
    )
    return [
        "```python",
        "import unime_st  # not needed where unime-st is installed from its wheel",
        f"from sentence_transformers import {kind}",
        "",
        f'model = {kind}("{name}")',
        call,
        "```",
        "",
    ]


def _facts(recipe: Recipe, processor: Any) -> list[str]:
    facts = [
        f"Prompt: `{recipe.template or 'chat template of the checkpoint'}`, padding on the {recipe.padding_side}."
    ]
    if recipe.task == "reranker":
        facts.append(f"Score: sigmoid of the logit of {recipe.yes_no[0]!r} minus that of {recipe.yes_no[1]!r}.")
    else:
        facts.append(f"Embedding: {recipe.pooling} pooling, normalised to length 1.")
    if recipe.positions == "1d":
        facts.append("Positions: image tokens are counted like text tokens (`image_positions: 1d`).")
    rule = getattr(processor, "image_rule", None)
    if rule is not None:
        side = processor._side
        facts.append("Images: " + (f"squashed to {side} x {side} pixels." if side else "native size."))
        facts.append(f"EXIF orientation {'applied' if rule['exif'] else 'ignored'}; transparency: {rule['alpha']}.")
        facts.append(f"Image backend: {processor.image_backend}.")
    return facts
