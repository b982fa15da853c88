"""Soft-label distillation, UniME-V2: align the similarities to judged candidates with the judge's scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor

from unime_st.losses.base import CachedEmbeddingLoss, RowwiseLoss, Shards, check_positive
from unime_st.losses.citations import UNIME_V2_CITATION
from unime_st.losses.false_negatives import check_margin, check_strength, false_negatives, same_documents

Divergence = Literal["symmetric_kl", "js", "kl"]
Labels = Literal["scores", "log_odds"]


class SoftLabelDistillationLoss(CachedEmbeddingLoss):
    citation = UNIME_V2_CITATION

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = 0.02,
        divergence: Divergence = "symmetric_kl",
        *,
        labels: Labels = "scores",
        label_temperature: float | None = None,
        in_batch_weight: float = 0.0,
        false_negative_margin: float | None = None,
        hardness_strength: float = 0.0,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ) -> None:
        """
        MLLM-judgment based distribution alignment of UniME-V2. Over the candidates C of a query q (its positive and its
        mined negatives) with judge scores s in [0, 1]::

            P = softmax_C(cos(q, c) / temperature)        Q = softmax_C(s_c / label_temperature)
            loss = mean_q 1/2 (KL(P || Q) + KL(Q || P))

        The loss of a query depends on its own candidates only. Gradient accumulation over small batches is therefore
        exactly equivalent to a large batch: gradient caching and gathering have no use unless ``in_batch_weight`` is
        set.

        Args:
            model: The model to train.
            temperature: Divides the cosine similarities. Defaults to 0.02, the paper's value.
            divergence: One of

                - ``"symmetric_kl"`` (default): half the Jeffreys divergence, the formula above. It is what the paper's
                  equation and the released code compute, although the paper's text calls it JS divergence.
                - ``"js"``: the Jensen-Shannon divergence proper, at most ln 2; it needs learning rates of its own.
                - ``"kl"``: KL(Q || P) alone, from the judge to the model.
            labels: ``"scores"`` (default), P(Yes) in [0, 1], as in the paper; or ``"log_odds"``, the logits of a reranker
                or judge, whose softmax over the candidates is distilled (Qwen3-VL-Embedding, with ``divergence="kl"``).
            label_temperature: Divides the labels. None (default): ``temperature`` for scores, as in the paper, and 1 for
                log-odds.
            in_batch_weight: Weight of an additional InfoNCE term of each query against the positives and mined negatives
                of all queries in the (gathered) batch, at ``temperature``. Its own mined negatives are left out: they
                may be false negatives, which is what the soft labels are for. Candidates with the embedding of its
                positive are left out as well, such as its positive mined for another query. Defaults to 0, the paper's
                loss.
            false_negative_margin: Leave candidates of the in-batch term out that are more similar than positive + margin
                (Qwen3 Embedding: 0.1). Defaults to None: none but those of equal embedding.
            hardness_strength: Add ``hardness_strength * stop_gradient(cos)`` to the logits of the in-batch term's
                negatives (LLaVE: 9). Defaults to 0.
            mini_batch_size: Number of inputs embedded at a time with gradient caching, which bounds memory by the
                mini-batch instead of the batch. None (default) embeds the batch in one forward pass.
            mini_batch_num_tokens: If set, mini-batches are packed up to this many non-padding tokens instead of
                ``mini_batch_size`` inputs; turns gradient caching on as well.
            gather_across_devices: Let the in-batch term use the candidates of all processes. Defaults to False.
            show_progress_bar: Show a progress bar over the mini-batches. Defaults to False.

        References:
            - UniME-V2: https://arxiv.org/abs/2510.13515, section "MLLM Judgment Based Training Framework"
            - Qwen3-VL-Embedding (distillation of a reranker's log-odds): https://arxiv.org/abs/2601.04720
            - Qwen3 Embedding (mask of the in-batch term): https://arxiv.org/abs/2506.05176
            - LLaVE (hardness weight of the in-batch term): https://arxiv.org/abs/2503.04812
            - Gradient caching: https://huggingface.co/papers/2101.06983

        Requirements:
            1. Rows of a query, its positive and one or more negatives, the same number in every row.
            2. A judge score P(Yes) in [0, 1], or log-odds, for each candidate, the positive's first.

        Inputs:
            +------------------------------------------------+------------------------------------------------------+
            | Inputs                                         | Labels                                               |
            +================================================+======================================================+
            | (query, positive, negative_1, ..., negative_k) | [score(positive), score(negative_1), ...], 1 + k each|
            +------------------------------------------------+------------------------------------------------------+

        Recommendations:
            - Alone, this loss does not compare with the rest of the corpus. Start from a model that already retrieves, or
              set ``in_batch_weight``, and evaluate a retrieval metric while training to detect collapse.

        Relations:
            - :class:`DistillKLDivLoss` is the ``"kl"`` variant without caching, multiplied by the squared temperature
              (0.0004 here).

        Example:
            ::

                from datasets import Dataset
                from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
                from unime_st.losses import SoftLabelDistillationLoss

                model = SentenceTransformer("unime-tiny")
                train_dataset = Dataset.from_dict({
                    "query": ["a red square", "a blue circle"],
                    "positive": ["the square is red", "the circle is blue"],
                    "negative_1": ["a red shape", "a green circle"],
                    "negative_2": ["a blue square", "a blue square"],
                    "label": [[0.98, 0.71, 0.02], [0.97, 0.05, 0.12]],
                })
                loss = SoftLabelDistillationLoss(model)
                trainer = SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss)
                trainer.train()
        """
        super().__init__(model, mini_batch_size, mini_batch_num_tokens, gather_across_devices, show_progress_bar)
        if divergence not in get_args(Divergence):
            raise ValueError(f"divergence must be one of {get_args(Divergence)}, but is {divergence!r}.")
        if not 0.0 <= in_batch_weight < math.inf:
            raise ValueError(f"in_batch_weight must be a finite number >= 0, but is {in_batch_weight}.")
        if in_batch_weight == 0 and (false_negative_margin is not None or hardness_strength):
            raise ValueError(
                "false_negative_margin and hardness_strength are those of the in-batch term: set in_batch_weight."
            )
        self.false_negative_margin = check_margin(false_negative_margin)
        self.hardness_strength = check_strength(hardness_strength)
        self.temperature = check_positive("temperature", temperature)
        if labels not in get_args(Labels):
            raise ValueError(f"labels must be one of {get_args(Labels)}, but is {labels!r}.")
        self.labels = labels
        if label_temperature is None:
            label_temperature = self.temperature if labels == "scores" else 1.0
        self.label_temperature = check_positive("label_temperature", label_temperature)
        self.divergence = divergence
        self.in_batch_weight = in_batch_weight

    def check_inputs(self, num_columns: int, num_rows: int, labels: Tensor | None) -> None:
        """Check that every candidate column has a judge score in [0, 1]; see the base class."""
        if num_columns < 3:
            raise ValueError(
                "SoftLabelDistillationLoss takes the columns query, positive, negative_1, ..., negative_k with at "
                f"least one negative, but got {num_columns} column(s). Over one candidate the loss is constant."
            )
        expected = (num_rows, num_columns - 1)
        if labels is None or tuple(labels.shape) != expected:
            found = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)}"
            raise ValueError(
                "SoftLabelDistillationLoss takes one judge score per candidate column, the positive's first, as "
                f"labels of shape (batch, 1 + k) = {expected}, but got {found}."
            )
        valid = labels.isfinite() if self.labels == "log_odds" else (labels >= 0) & (labels <= 1)
        bad = (~valid).nonzero().tolist()  # the negation also catches NaN
        if bad and self.labels == "log_odds":
            raise ValueError(f"The log-odds of row {bad[0][0]}, candidate {bad[0][1]} of this batch are not finite.")
        if bad:
            row, candidate = bad[0]
            raise ValueError(
                f"The judge score of row {row}, candidate {candidate} (0 = positive) of this batch is "
                f"{labels[row, candidate].item()}, but scores are probabilities in [0, 1] ({len(bad)} are not). "
                "Turn log-odds into probabilities with a sigmoid first."
            )

    def prepare(self, columns: list[Tensor], labels: Tensor | None, shards: Shards) -> RowwiseLoss:
        """Arrange the queries, their own candidates and, for the in-batch term, all candidates; see the base class."""
        assert labels is not None  # check_inputs has run
        queries, *documents = columns
        log_judge = (labels.detach().to(queries) / self.label_temperature).log_softmax(dim=1)
        in_batch = [torch.cat([shards.gather(column) for column in documents])] if self.in_batch_weight > 0 else []
        known = self.identities(documents, in_batch[0], shards) if in_batch else None

        def losses(chunk: slice, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
            query, candidates = rows
            similarities = (candidates @ query[:, :, None])[:, :, 0]
            self.record("positive_similarity", similarities[:, 0])
            self.record("negative_similarity", similarities[:, 1:])
            log_model = (similarities / self.temperature).log_softmax(dim=1)
            loss = _divergence(self.divergence, log_model, log_judge[chunk])
            if known is not None:
                indices = torch.arange(chunk.start, chunk.stop, device=query.device) + shards.offset
                same = same_documents(known[0][chunk], known[1])
                logits = self._in_batch_logits(query, shared[0], indices, len(documents), same)
                loss = loss + self.in_batch_weight * F.cross_entropy(logits, indices, reduction="none")
            return loss

        return RowwiseLoss(rows=[queries, torch.stack(documents, dim=1)], shared=in_batch, losses=losses)

    def _in_batch_logits(self, query: Tensor, pool: Tensor, own: Tensor, columns: int, same: Tensor) -> Tensor:
        """Logits ``(rows, pool)`` of queries against the positives, then the negatives, of all rows.

        ``same`` tells which of the pool are the positive of each row. Candidates of the own row, duplicates of its
        positive and false negatives are -inf, the own positive excepted.
        """
        similarities = query @ pool.T
        total, row = len(pool) // columns, torch.arange(len(own), device=own.device)
        candidates = torch.ones_like(similarities, dtype=torch.bool)
        for column in range(columns):
            candidates[row, own + column * total] = False
        masked = same
        if self.false_negative_margin is not None:
            masked = false_negatives(similarities, similarities[row, own], self.false_negative_margin, masked)
            self.count_masked(masked & candidates, candidates)
        logits = similarities / self.temperature
        if self.hardness_strength:
            logits = logits + self.hardness_strength * similarities.detach() * candidates
        kept = candidates & ~masked
        kept[row, own] = True
        return logits.masked_fill(~kept, -math.inf)

    def get_config_dict(self) -> dict[str, object]:
        """Options for the model card."""
        return {
            "temperature": self.temperature,
            "divergence": self.divergence,
            "labels": self.labels,
            "label_temperature": self.label_temperature,
            "in_batch_weight": self.in_batch_weight,
            "false_negative_margin": self.false_negative_margin,
            "hardness_strength": self.hardness_strength,
            **super().get_config_dict(),
        }


def _divergence(name: Divergence, log_model: Tensor, log_judge: Tensor) -> Tensor:
    """Divergence of each row of two log-probability tables ``(rows, candidates)``.

    Everything stays in log space: adding an epsilon to probabilities, as the released code does, removes the gradient
    as soon as the positive lies about 0.35 in cosine below the best negative.
    """
    if name == "symmetric_kl":
        return 0.5 * ((log_model.exp() - log_judge.exp()) * (log_model - log_judge)).sum(dim=1)
    if name == "kl":
        return _kl(log_judge, log_model)
    log_mean = torch.logaddexp(log_model, log_judge) - math.log(2.0)
    return 0.5 * (_kl(log_model, log_mean) + _kl(log_judge, log_mean))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)
