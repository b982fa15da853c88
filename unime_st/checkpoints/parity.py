"""Parity file of an exported folder: inputs, expected vectors, and the vectors that the usual mistakes give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from unime_st.encoding.model_inputs import Features
from unime_st.files import Json

PARITY = "parity.json"
"""File in an exported folder: inputs, what the original model gives for them, and how close the export comes."""
LEAST = 0.99999
"""Cosine from which vectors are equal in float32."""
ROUNDING = 0.99
"""Cosine below which the data type alone does not explain other vectors."""

_SOME_PROMPT = "Represent the user's input."  # a usual default of servers


@dataclass(frozen=True)
class Probe:
    """An input of the parity file.

    Args:
        kind: ``"text"``, ``"image"``, ``"image and text"`` or ``"pair"``.
        text: Text of the input, or of the document of a pair.
        image: Whether the image of the parity file belongs to the input, or to the document of a pair.
        prompt_name: Prompt that goes with it.
        query: Query of a pair.
    """

    kind: str
    text: str | None = None
    image: bool = False
    prompt_name: str | None = None
    query: str | None = None

    def value(self, image: Image.Image) -> dict[str, object]:
        """The input, or the document of a pair."""
        parts = {"image": image if self.image else None, "text": self.text}
        return {name: part for name, part in parts.items() if part is not None}

    def run(self, model: SentenceTransformer | CrossEncoder, image: Image.Image) -> np.ndarray:
        """Vector of the input, or score of the pair, as an array of one dimension; from an embedder or a reranker."""
        if isinstance(model, SentenceTransformer):
            vectors = model.encode([self.value(image)], prompt_name=self.prompt_name, show_progress_bar=False)
            return np.asarray(vectors[0])
        return np.atleast_1d(model.predict([(self.query, self.value(image))], show_progress_bar=False))

    def closeness(self, found: np.ndarray, expected: np.ndarray) -> float:
        """Cosine similarity of two vectors; for the scores of a pair, 1 minus their difference."""
        if self.kind == "pair":
            return 1 - float(abs(found[0] - expected[0]))
        a, b = found.astype(np.float64), expected.astype(np.float64)
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def mistaken_vectors(
    model: SentenceTransformer, probes: Sequence[Probe], image: Image.Image, unprepared: Image.Image
) -> list[dict[str, list[float]]]:
    """Vectors of the probes under the usual mistakes of a server, by their names; the model is in bfloat16 afterwards.

    Args:
        model: Embedding model in float32, of stock classes.
        probes: Inputs.
        image: The image as the client has to prepare it.
        unprepared: The image as it is, or in another size where there is nothing to prepare.

    Returns:
        list[dict]: For each probe, vectors by mistake: "prompt", "chat template", "special tokens", "pooling", "image
        size" and "data type".
    """
    pooling = next(module for module in model if isinstance(module, Pooling))
    prompts = [model.prompts.get(probe.prompt_name or model.default_prompt_name or "") for probe in probes]
    found: list[dict[str, list[float]]] = [{} for _ in probes]

    def add(name: str, run: Callable[[Probe, str | None], np.ndarray | None]) -> None:
        for probe, prompt, vectors in zip(probes, prompts, found, strict=True):
            if (vector := run(probe, prompt)) is not None:
                vectors[name] = [float(value) for value in vector]

    def of(probe: Probe, prompt: str | None, used: Image.Image = image) -> Features:
        features: Features = model.preprocess([probe.value(used)], prompt=prompt or None)
        return features

    add("prompt", lambda probe, prompt: _forward(model, of(probe, None if prompt else _SOME_PROMPT)))
    add("chat template", lambda probe, prompt: _forward(model, _bare(model, probe)) if not probe.image else None)
    add("special tokens", lambda probe, prompt: _forward(model, _with_end(model, of(probe, prompt))))
    add("image size", lambda probe, prompt: _forward(model, of(probe, prompt, unprepared)) if probe.image else None)
    mode, pooling.pooling_mode = pooling.pooling_mode, "mean"
    add("pooling", lambda probe, prompt: _forward(model, of(probe, prompt)))
    pooling.pooling_mode = mode
    model.to(torch.bfloat16)
    add("data type", lambda probe, prompt: _forward(model, of(probe, prompt)))
    return found


@torch.inference_mode()
def _forward(model: SentenceTransformer, features: Features) -> np.ndarray:
    moved = {name: part.to(model.device) if torch.is_tensor(part) else part for name, part in features.items()}
    vector: torch.Tensor = model(moved)["sentence_embedding"][0]
    return vector.float().cpu().numpy()


def _bare(model: SentenceTransformer, probe: Probe) -> Features:
    """Tokens of a text without the chat template."""
    tokens = dict(model.tokenizer([probe.text], return_tensors="pt"))
    return {name: tokens[name] for name in ("input_ids", "attention_mask")} | {"modality": "text"}


def _with_end(model: SentenceTransformer, features: Features) -> Features:
    """Features with the end-of-text token behind them."""
    ids = features["input_ids"]
    ending = {"input_ids": model.tokenizer.eos_token_id, "attention_mask": 1, "mm_token_type_ids": 0}
    return {
        name: torch.cat([part, part.new_full((len(ids), 1), ending[name])], dim=1) if name in ending else part
        for name, part in features.items()
    }


@dataclass
class Comparison:
    """What a folder or server gives for the inputs of one kind.

    Args:
        kind: Kind of input.
        closeness: Lowest cosine; for pairs, 1 minus the largest difference of scores.
        causes: Mistakes that explain the differences, the likeliest first.
    """

    kind: str
    closeness: float = 1.0
    causes: list[str] = field(default_factory=list)


def compare(content: Json, found: Sequence[np.ndarray]) -> list[Comparison]:
    """Compare vectors with a parity file.

    A mistake explains a vector that is ten times closer to what the mistake gives than to what is expected. Where none
    does, rounding explains small differences, the image size those of images alone, and other tokens the rest.

    Args:
        content: Content of the parity file.
        found: Vector or score for each of its items.

    Returns:
        list[Comparison]: One for each kind of input.
    """
    kinds: dict[str, Comparison] = {}
    for item, (probe, expected), vector in zip(content["items"], probes_of(content), found, strict=True):
        comparison = kinds.setdefault(probe.kind, Comparison(probe.kind))
        close = probe.closeness(vector, expected) if vector.shape == expected.shape else float("nan")
        comparison.closeness = min(comparison.closeness, close) if close == close else close
        if close >= LEAST:
            continue
        distances = {
            name: 1 - probe.closeness(vector, np.array(values))
            for name, values in item.get("causes", {}).items()
            if len(values) == len(vector)
        }
        nearest = min(distances, key=lambda name: distances[name], default=None)
        if vector.shape != expected.shape:
            cause = f"dimension: {len(vector)}, expected {len(expected)}"
        elif close != close:
            cause = "vector of zeros or NaN"
        elif nearest is not None and distances[nearest] < 0.1 * (1 - close):
            cause = nearest
        else:
            cause = "data type" if close >= ROUNDING else ""
        if cause and cause not in comparison.causes:
            comparison.causes.append(cause)
    _fill_gaps(kinds)
    return list(kinds.values())


def _fill_gaps(kinds: dict[str, Comparison]) -> None:
    """Name a cause where no vector of the file does: the image size if only images differ, else the tokens."""
    text = kinds.get("text")
    only_images = text is not None and text.closeness >= LEAST
    for comparison in kinds.values():
        if comparison.closeness >= LEAST or comparison.causes or comparison.kind == "pair":
            continue
        comparison.causes.append("image size" if only_images else "chat template or other special tokens")


def probes_of(content: Json) -> Iterator[tuple[Probe, np.ndarray]]:
    """Inputs of a parity file with the expected vectors or scores."""
    names = ("kind", "text", "image", "prompt_name", "query")
    for item in content["items"]:
        yield Probe(**{name: item[name] for name in names}), np.array(item["expected"])
