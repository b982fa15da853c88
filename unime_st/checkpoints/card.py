"""Model cards: those of converted and exported folders, and the data of the cards of models trained from it."""

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
from unime_st.files import read_json
from unime_st.recipes import ImageRule, Recipe

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

CARD = "README.md"
TAG = "unime-st"
"""Tag of every card: says where the model comes from, also after further training."""
_PAPERS = {
    "v1": "Breaking the Modality Barrier: Universal Embedding Learning with Multimodal LLMs (arXiv 2504.17432)",
    "v2": "UniME-V2: MLLM-as-a-Judge for Universal Multimodal Embedding Learning (arXiv 2510.13515)",
}
_PLAIN_CARD = """\
# {title}, for stock Sentence Transformers

This folder loads in transformers and Sentence Transformers without other packages. It was exported by `unime export`.

```python
from PIL import Image
from sentence_transformers import {kind}

model = {kind}("path/to/this/folder")
{call}
```

## What the client has to do

{images}
- Prompts are in `config_sentence_transformers.json`. The chat template gets a prompt as the system message.
- Texts are not truncated. Shorten long ones.
- Variables of the chat template: {variables}.
- {output}

## Parity

`parity.json` holds an image, inputs, and what the original gives for them in float32. The lowest cosine of this folder
(of a score: 1 minus the difference):

{measured}

If your stack gives less, check the image preparation, the prompt, the special tokens, the pooling and the data type, in
this order.
"""
_PLAIN_IMAGES = """\
- Images are {size}, and converted by this function before the processor sees them:

```python
{code}
```

- The original prepares images with the {backend} backend of transformers. With another one some pixels differ by 1/255."""


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


def write_plain_card(part: Path, folder: Path, processor: Any, measured: Mapping[str, float]) -> None:
    """Write ``README.md`` of a folder exported for stock classes: use, what the client has to do, measured parity.

    ``folder`` is the original, whose license and base are named, ``measured`` its lowest cosine by kind of input.
    """
    card, settings = folder / CARD, read_json(part / "config_sentence_transformers.json")
    kwargs = read_json(part / "sentence_bert_config.json").get("processing_kwargs", {})
    metadata = (metadata_load(card) if card.is_file() else None) or {}
    image, images = (
        'Image.open("street.jpg")',
        "- Images need no preparation: the processor of this folder does it all.",
    )
    if (fields := getattr(processor, "image_rule", None)) is not None:
        image, side = f"prepare({image})", processor.image_side
        size = f"squashed to {side} x {side} pixels, whatever their shape" if side else "kept in their size"
        code = client_code(ImageRule(**fields), side)
        images = _PLAIN_IMAGES.format(size=size, code=code, backend=processor.image_backend)
    call = f'vectors = model.encode(["a red car", {{"image": {image}, "text": "What color is the car?"}}])'
    output = "The embedding is the last hidden state, pooled as `1_Pooling/config.json` says, normalized to length 1."
    if settings["model_type"] == "CrossEncoder":
        call = f'scores = model.predict([("a red car", {{"image": {image}}})])'
        output = "The score is the sigmoid of the difference of the two logits in `1_LogitScore/config.json`."
    front = ["---", "library_name: sentence-transformers"]
    front += [f"{name}: {metadata[name]}" for name in ("license", "base_model") if isinstance(metadata.get(name), str)]
    text = _PLAIN_CARD.format(
        title=folder.resolve().name,
        kind=settings["model_type"],
        call=call,
        images=images,
        variables=", ".join(f"`{key}={value!r}`" for key, value in kwargs.get("chat_template", {}).items()) or "none",
        output=output,
        measured="\n".join(f"- {kind}: {value:.6f}" for kind, value in measured.items()),
    )
    (part / CARD).write_text("\n".join([*front, "---", "", text]), encoding="utf-8")


def client_code(rule: ImageRule, side: int | None) -> str:
    """Python function ``prepare`` that does to a PIL image what the image rule says.

    Example:
        >>> print(client_code(ImageRule(exif=False), 336))
        from PIL import Image, ImageOps
        <BLANKLINE>
        <BLANKLINE>
        def prepare(image):
            image = image.resize((336, 336))
            image = image.convert("RGB")
            image.info = {}  # so that nothing turns it by its EXIF orientation
            return image
    """
    lines = ["from PIL import Image, ImageOps", "", "", "def prepare(image):"]
    if side is not None:
        lines.append(f"    image = image.resize(({side}, {side}))")
    if rule.exif:
        lines.append("    image = ImageOps.exif_transpose(image)")
    if rule.alpha == "white":
        lines += [
            '    if image.mode == "RGBA":',
            '        white = Image.new("RGB", image.size, (255, 255, 255))',
            '        white.paste(image, mask=image.getchannel("A"))',
            "        image = white",
        ]
    lines += ['    image = image.convert("RGB")']
    return "\n".join(
        [*lines, "    image.info = {}  # so that nothing turns it by its EXIF orientation", "    return image"]
    )


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
