"""Model merging: weighted average of the weights of fine-tuned models ("model soup"), also chosen greedily."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.model import BaseModel

from unime_st.checkpoints.native_folder import CONVERSION_RECORD
from unime_st.compat import forget_adapter_names
from unime_st.data.records import RecordSet
from unime_st.encoding.model_identity import model_settings, weights_fingerprint
from unime_st.files import atomic_folder, content_digest, folder_lock, read_json, write_json
from unime_st.options import check_weights
from unime_st.paths import adapter_base
from unime_st.registry import resolve
from unime_st.reranking import UniMEReranker
from unime_st.training.adapters import merge_lora
from unime_st.training.evaluation import HeldOutEvaluator, RankingEvaluator, RetrievalEvaluator

logger = logging.getLogger(__name__)

_IGNORED = frozenset(["dtype"])
"""Entries of configurations that models to merge may differ in."""
_LEAST_COSINE = 0.1
"""Cosine of the weights of two models below which they cannot come from one base; independent ones have 0."""


def merge_models(
    models: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Average the weights of models that were fine-tuned from the same base.

    The average is computed in float32 and saved in the data type of the first model, which also gives the prompts and
    the processor. Adapters are merged into their base first, so that they are averaged in weight space. Memory holds two
    models in float32.

    Args:
        models: Aliases or folders of at least two models, all embedding models or all rerankers. A folder may hold an
            adapter; then all adapters must have the same base.
        output: Output folder.
        weights: Weight of each model; they sum to 1. Defaults to None, equal weights.
        overwrite: Replace the output folder. Defaults to False.

    Returns:
        Path: The output folder. ``unime.json`` records the models and their weights.

    Raises:
        ValueError: If there are fewer than two models, the weights do not sum to 1, the models differ in their base,
            architecture, tokenizer, template or image rule, or their weights are unrelated.
        FileExistsError: If the output folder exists and ``overwrite`` is False.

    References:
        Model soups (https://arxiv.org/abs/2203.05482).

    Example:
        >>> from unime_st.training.model_merge import merge_models
        >>> merge_models(["unime-tiny", "unime-tiny"], "merged", weights=[0.25, 0.75]).name
        'merged'
    """
    shares = _check_weights(models, weights)
    output, folders = Path(output), [resolve(str(model)) for model in models]
    with folder_lock(output, wait=False), atomic_folder(output, overwrite=overwrite) as part:
        _check_bases(folders)
        merged, dtype = _load(folders[0])
        total = dict(_weights(merged))
        fingerprints = [weights_fingerprint(merged)]
        with torch.no_grad():
            for tensor in total.values():
                tensor.mul_(shares[0])
            for folder, share in zip(folders[1:], shares[1:], strict=True):
                other, _ = _load(folder)
                fingerprints.append(weights_fingerprint(other))
                _check_alike(merged, other, folders[0], folder)
                _check_related(total, other, folders[0], folder)
                for name, tensor in _weights(other):
                    total[name].add_(tensor, alpha=share)
        parts = [
            {"model": str(model), "weight": share, "fingerprint": found}
            for model, share, found in zip(models, shares, fingerprints, strict=True)
        ]
        _save(merged.to(dtype), part, folders[0], {"merged": parts})
    return output


def greedy_soup(
    models: Sequence[str | Path],
    output: str | Path,
    eval_data: RecordSet | str | Path,
    *,
    batch_size: int = 64,
    overwrite: bool = False,
) -> Path:
    """Merge those models whose average is best on held-out records.

    Models are sorted by MRR@10, ties in the given order. The soup starts as the best one; each further model joins it, with
    equal weights, if the metric of the average does not fall. Memory holds three models in float32.

    Args:
        models: As for :func:`merge_models`.
        output: Output folder.
        eval_data: Record folder that no model was trained on. Embedding models retrieve each positive among those of its
            dataset; rerankers rank it among the negatives of its row.
        batch_size: Batch size of the evaluation. Defaults to 64.
        overwrite: Replace the output folder. Defaults to False.

    Returns:
        Path: The output folder. ``unime.json`` records each model, its metric and its weight, 0 for those left out, and
        the metric of the soup.

    Raises:
        ValueError: See :func:`merge_models`; also if the records are empty.
        FileExistsError: If the output folder exists and ``overwrite`` is False.

    References:
        Model soups (https://arxiv.org/abs/2203.05482), recipe 1 (greedy soup).

    Example:
        ::

            from unime_st.training.model_merge import greedy_soup

            greedy_soup(["runs/soft_labels", "runs/in_batch"], "runs/soup", "runs/held_out")
    """
    _check_weights(models, None)
    records = eval_data if isinstance(eval_data, RecordSet) else RecordSet.load(eval_data)
    if not len(records):
        raise ValueError(f"{records.folder}: no records to evaluate on")
    output, folders = Path(output), [resolve(str(model)) for model in models]
    with folder_lock(output, wait=False), atomic_folder(output, overwrite=overwrite) as part:
        _check_bases(folders)
        evaluate = _Evaluation(records, batch_size)
        metrics, fingerprints = [], []
        for model, folder in zip(models, folders, strict=True):
            loaded, _ = _load(folder)
            fingerprints.append(weights_fingerprint(loaded))
            metrics.append(evaluate(loaded))
            logger.info("%s: %s %.4f", model, evaluate.metric, metrics[-1])
        order = sorted(range(len(models)), key=lambda index: -metrics[index])
        soup, best = order[:1], metrics[order[0]]
        merged, dtype = _load(folders[order[0]])
        weights = dict(_weights(merged))
        total = {name: tensor.detach().clone() for name, tensor in weights.items()}
        for index in order[1:]:
            other, _ = _load(folders[index])
            _check_alike(merged, other, folders[order[0]], folders[index])
            _check_related(total, other, folders[order[0]], folders[index])
            _set_average(weights, total, dict(_weights(other)), len(soup) + 1)
            found = evaluate(merged)
            logger.info("with %s: %s %.4f, before %.4f", models[index], evaluate.metric, found, best)
            if found >= best:
                soup, best = [*soup, index], found
                for name, tensor in _weights(other):
                    total[name].add_(tensor.detach())
        _set_average(weights, total, {}, len(soup))
        parts = [
            {
                "model": str(model),
                "weight": (index in soup) / len(soup),
                "fingerprint": fingerprints[index],
                evaluate.metric: metrics[index],
            }
            for index, model in enumerate(models)
        ]
        _save(merged.to(dtype), part, folders[order[0]], {"merged": parts, "greedy": {evaluate.metric: best}})
    return output


class _Evaluation:
    """MRR@10 of embedding models or rerankers on held-out records."""

    metric = "mrr@10"

    def __init__(self, records: RecordSet, batch_size: int) -> None:
        self._records, self._batch_size = records, batch_size
        self._evaluator: HeldOutEvaluator | None = None

    def __call__(self, model: BaseModel) -> float:
        if self._evaluator is None:
            kind = RankingEvaluator if isinstance(model, CrossEncoder) else RetrievalEvaluator
            self._evaluator = kind(self._records, batch_size=self._batch_size)
        if isinstance(model, CrossEncoder) and not isinstance(model, UniMEReranker):
            model = UniMEReranker(modules=list(model), num_labels=1, device="cpu")  # the plain class takes no items
        return self._evaluator(model)[self.metric]


def _set_average(
    weights: Mapping[str, torch.Tensor],
    total: Mapping[str, torch.Tensor],
    more: Mapping[str, torch.Tensor],
    count: int,
) -> None:
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(total[name] + more[name] if more else total[name]).div_(count)


def _save(merged: BaseModel, part: Path, first: Path, facts: Mapping[str, object]) -> None:
    """Save a merged model with the record of what it was made of."""
    merged.save_pretrained(str(part))
    record = first / CONVERSION_RECORD
    write_json(part / CONVERSION_RECORD, {**(read_json(record) if record.is_file() else {}), **facts})


def _check_weights(models: Sequence[str | Path], weights: Sequence[float] | None) -> list[float]:
    if len(models) < 2:
        raise ValueError(f"expected at least 2 models to merge, got {len(models)}")
    if weights is None:
        return [1 / len(models)] * len(models)
    if len(weights) != len(models):
        raise ValueError(f"expected one weight for each of the {len(models)} models, got {len(weights)}")
    check_weights(weights)
    return list(weights)


def _load(folder: Path) -> tuple[BaseModel, torch.dtype]:
    """A model in float32 on the CPU with its adapter merged, and the data type of its weights."""
    kind = read_json(folder / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    model = (CrossEncoder if kind == "CrossEncoder" else SentenceTransformer)(str(folder), device="cpu")
    if any(getattr(module, "is_quantized", False) for module in model.modules()):
        raise ValueError(f"{folder}: its weights are quantized; merge unquantized models")
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    model.float()
    if adapter_base(folder) is not None:
        merge_lora(model)
        forget_adapter_names(model.transformers_model)
    return model, dtype


def _weights(model: BaseModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Saved tensors of floating point, shared ones once."""
    saved = model.state_dict().keys()
    named = chain(model.named_parameters(), model.named_buffers())
    return ((name, tensor) for name, tensor in named if name in saved and tensor.is_floating_point())


def _check_bases(folders: Sequence[Path]) -> None:
    """Compare the bases of adapters by the digests of their weights."""
    bases: dict[str, Path] = {}
    for folder in folders:
        if (name := adapter_base(folder)) is None:
            continue
        base = resolve(name)
        files = sorted(base.glob("*.safetensors"))
        found = " ".join(content_digest(file) for file in files)
        if bases and found not in bases:
            (first,) = bases.values()
            raise ValueError(f"the adapters {first} and {folder} have different bases (the latter {name}): no average")
        bases.setdefault(found, folder)


def _check_alike(first: BaseModel, other: BaseModel, first_folder: Path, folder: Path) -> None:
    """Raise ValueError if two models differ in more than the values of their weights."""
    mine, theirs = (
        {**dict(_flat(model_settings(model)["modules"])), **{name: [*t.shape] for name, t in _weights(model)}}
        for model in (first, other)
    )
    for name in dict.fromkeys((*mine, *theirs)):
        if mine.get(name) != theirs.get(name):
            raise ValueError(
                f"{first_folder} and {folder} cannot be merged: {name} is {mine.get(name)!r:.80} in the first and "
                f"{theirs.get(name)!r:.80} in the second"
            )


def _check_related(total: Mapping[str, torch.Tensor], other: BaseModel, first_folder: Path, folder: Path) -> None:
    """Raise ValueError if the matrices of a model have nothing to do with those of the first ones."""
    products = torch.zeros(3, dtype=torch.float64)
    for name, tensor in _weights(other):
        if tensor.dim() > 1:
            ours, theirs = total[name].detach().flatten(), tensor.detach().flatten()
            products += torch.stack([ours @ theirs, ours @ ours, theirs @ theirs]).double()
    cosine = float(products[0] / (products[1] * products[2]).sqrt())
    if cosine < _LEAST_COSINE:  # not with NaN, where the first model has the weight 0
        raise ValueError(
            f"{first_folder} and {folder} have different bases: their weights are unrelated (cosine {cosine:.2f}), so their "
            "average is not a model. Merge models that were fine-tuned from one base."
        )


def _flat(content: object, name: str = "modules") -> Iterator[tuple[str, object]]:
    """Entries of nested settings by their dotted names."""
    if not isinstance(content, (Mapping, list, tuple)):
        yield name, content
        return
    for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        if key not in _IGNORED:
            yield from _flat(value, f"{name}.{key}")
