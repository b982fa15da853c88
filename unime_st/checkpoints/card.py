"""Model cards: that of a converted folder, and the data of the cards of models trained from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.repocard import metadata_load
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder.model_card import CrossEncoderModelCardData
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from transformers import ProcessorMixin

from unime_st.checkpoints.native_folder import CONVERSION_RECORD
from unime_st.recipes import Recipe

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

CARD = "README.md"
TAG = "unime-st"
"""Tag of every card: says where the model comes from, also after further training."""
_PAPERS = {
    "v1": "Breaking the Modality Barrier: Universal Embedding Learning with Multimodal LLMs (arXiv 2504.17432)",
    "v2": "UniME-V2: MLLM-as-a-Judge for Universal Multimodal Embedding Learning (arXiv 2510.13515)",
}


def write_card(
    folder: Path, recipe: Recipe, *, alias: str | None, record: Mapping[str, object], processor: ProcessorMixin
) -> None:
    """Write ``README.md`` of a converted folder.

    ``record`` is the content of ``unime.json``; the processor has the image rule in force.
    """
    reranker = recipe.task == "reranker"
    lines = [
        "---",
        "library_name: sentence-transformers",
        f"pipeline_tag: {'text-ranking' if reranker else 'feature-extraction'}",
        *([f"license: {recipe.license}"] if recipe.license else []),
        *([f"base_model: {recipe.base_model}"] if recipe.base_model else []),
        "tags:",
        "- sentence-transformers",
        f"- {TAG}",
        "- multimodal",
        f"- {'cross-encoder' if reranker else 'sentence-similarity'}",
        "---",
        "",
        f"# {recipe.title}",
        "",
        *_usage("CrossEncoder" if reranker else "SentenceTransformer", alias or "path/to/this/folder", reranker),
        "## How inputs are treated",
        "",
        *[f"- {line}" for line in _facts(recipe, processor)],
        "",
        "## Origin",
        "",
    ]
    if recipe.hub_id:
        commit = f", commit `{record['revision']}`" if record.get("revision") else ""
        lines.append(f"Weights of `{recipe.hub_id}`{commit}.")
    paper = next((text for key, text in _PAPERS.items() if recipe.name.startswith(f"unime-{key}")), None)
    if paper:
        lines.append(f"Paper: {paper}.")
    lines += [f"Converted by unime-st {record.get('unime_st')}, recipe `{recipe.name}`.", ""]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _usage(kind: str, name: str, reranker: bool) -> list[str]:
    call = (
        'ranking = model.rank("a red car", [{"image": "street.jpg"}, "a photo of a street"])'
        if reranker
        else 'vectors = model.encode(["a red car", {"image": "street.jpg", "text": "What color is the car?"}])'
    )
    return [
        "```bash",
        "pip install unime-st",
        "```",
        "",
        "```python",
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
        facts.append(f"Embedding: {recipe.pooling} pooling, normalized to length 1.")
    if recipe.positions == "1d":
        facts.append("Positions: image tokens are counted like text tokens (`image_positions: 1d`).")
    rule = getattr(processor, "image_rule", None)
    if rule is not None:
        side = processor.image_side
        facts.append("Images: " + (f"squashed to {side} x {side} pixels." if side else "native size."))
        facts.append(f"EXIF orientation {'applied' if rule['exif'] else 'ignored'}; transparency: {rule['alpha']}.")
        facts.append(f"Image backend: {processor.image_backend}.")
    return facts


class _NeedsUniME:
    """Mixin for the card data of Sentence Transformers: the usage section says that unime-st is needed, where it is."""

    model: Any

    def generate_usage_snippet(self) -> str:
        """Return the usage example, after a line on unime-st where the saved folder needs it to load."""
        snippet: str = super().generate_usage_snippet()  # type: ignore[misc]
        config = getattr(self.model.transformers_model, "config", None)
        if not str(getattr(config, "model_type", "")).startswith("unime_"):
            return snippet
        needs = "This model also needs unime-st, which registers its model class: `pip install unime-st`."
        return needs + "\n\n" + snippet.replace("```python\n", "```python\nimport unime_st\n", 1)


class UniMECardData(_NeedsUniME, SentenceTransformerModelCardData):
    """Card data of an embedding model trained from a folder of ours."""


class UniMERerankerCardData(_NeedsUniME, CrossEncoderModelCardData):
    """Card data of a reranker trained from a folder of ours."""


def card_data(
    kind: type[BaseModel], folder: Path, *, base: str | None = None, local_files_only: bool = False
) -> UniMECardData | UniMERerankerCardData | None:
    """Card data for a model that is loaded from a folder of ours, so that cards of its offspring name their origin.

    Args:
        kind: Class that loads the model.
        folder: Where it is loaded from.
        base: Base model to name if the folder does not say where its weights come from.
        local_files_only: Never go to the hub.

    Returns:
        Data with base model, license and tag; None if unime-st did not make the folder, or the class is neither an
        embedding model nor a reranker.
    """
    record, card = folder / CONVERSION_RECORD, folder / CARD
    try:
        metadata: Mapping[str, Any] = (metadata_load(card) if card.is_file() else None) or {}
    except ValueError:  # not a card of ours, or an edited one
        metadata = {}
    tags = metadata.get("tags") or []
    if base is None and not record.is_file() and TAG not in tags:
        return None
    if issubclass(kind, SentenceTransformer):
        data: UniMECardData | UniMERerankerCardData = UniMECardData(local_files_only=local_files_only)
    elif issubclass(kind, CrossEncoder):
        data = UniMERerankerCardData(local_files_only=local_files_only)
    else:
        return None
    made = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    data.base_model = made.get("hub_id") or metadata.get("base_model") or base
    data.license = metadata.get("license")
    data.add_tags([TAG, *(tag for tag in tags if tag in ("multimodal",))])
    return data
