"""Hard-negative ranking, UniME stage 2: InfoNCE against the hardest in-batch negatives, false negatives filtered."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from unime_st.losses.base import CachedEmbeddingLoss, RowwiseLoss, Shards, check_positive
from unime_st.losses.citations import UNIME_CITATION
from unime_st.options import check_count


class HardNegativeRankingLoss(CachedEmbeddingLoss):
    citation = UNIME_CITATION

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = 0.02,
        false_negative_margin: float = 0.1,
        num_negatives: int = 8,
        *,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ) -> None:
        """
        Hard-negative enhanced instruction tuning, stage 2 of UniME. For every query q with positive p, among all other
        candidates c of the batch (the positives of the other queries and the negatives of all queries):

        1. *False-negative filter*: candidates with ``cos(q, c) > cos(q, p) + false_negative_margin`` are dropped.
        2. *Hard negatives*: of the rest, the ``num_negatives`` most similar to q are kept.
        3. *InfoNCE* over the positive and these only, from query to candidate::

               loss = mean_q -log( exp(cos(q, p) / t) / (exp(cos(q, p) / t) + sum_n exp(cos(q, n) / t)) )

        With fewer than ``num_negatives`` candidates left, the selected ones are repeated in turn, hardest first, up to
        that number (the paper's duplicate rule, whose order it leaves open). A dropped candidate is never selected. A
        query with no candidate left contributes zero to the mean.

        Args:
            model: The model to train.
            temperature: Divides the cosine similarities, t above. Defaults to 0.02, the value of the released code; the
                paper gives none.
            false_negative_margin: Drop candidates more similar than positive + margin, the paper's beta. Defaults to
                0.1. A negative margin also drops candidates slightly *less* similar than the positive.
            num_negatives: Hard negatives per query, the paper's k. Defaults to 8. May exceed the number of candidates.
            mini_batch_size: Number of inputs embedded at a time with gradient caching, which bounds memory by the
                mini-batch instead of the batch. None (default) embeds the batch in one forward pass.
            mini_batch_num_tokens: If set, mini-batches are packed up to this many non-padding tokens instead of
                ``mini_batch_size`` inputs; turns gradient caching on as well.
            gather_across_devices: Select from the candidates of all processes, not of this one only. Defaults to False.
            show_progress_bar: Show a progress bar over the mini-batches. Defaults to False.

        References:
            - UniME: https://arxiv.org/abs/2504.17432, section "Hard Negative Enhanced Instruction Tuning"
            - Gradient caching: https://huggingface.co/papers/2101.06983

        Requirements:
            1. (query, positive) pairs, optionally with any number of negatives.
            2. A batch size well above ``num_negatives``: the paper uses 1024 for 8.

        Inputs:
            +-----------------------------------------------+--------+
            | Inputs                                        | Labels |
            +===============================================+========+
            | (query, positive) pairs                       | none   |
            +-----------------------------------------------+--------+
            | (query, positive, negative) triplets          | none   |
            +-----------------------------------------------+--------+
            | (query, positive, negative_1, ..., negative_n)| none   |
            +-----------------------------------------------+--------+

        Recommendations:
            - Use ``BatchSamplers.NO_DUPLICATES``. The filter compares similarities, not contents: another query's
              positive that equals the own one has the same similarity, passes the filter and becomes a negative.

        Relations:
            - :class:`CachedGISTEmbedLoss` with the model itself as guide, ``margin=-false_negative_margin`` and no
              anchor or positive contrasts filters the same candidates, but has no top-k.

        Example:
            ::

                from datasets import Dataset
                from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
                from unime_st.losses import HardNegativeRankingLoss

                model = SentenceTransformer("unime-tiny")
                train_dataset = Dataset.from_dict({
                    "query": ["a red square", "a blue circle", "two green dots"],
                    "positive": ["the square is red", "the circle is blue", "there are two dots, both green"],
                })
                loss = HardNegativeRankingLoss(model, mini_batch_size=2)
                trainer = SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss)
                trainer.train()
        """
        super().__init__(model, mini_batch_size, mini_batch_num_tokens, gather_across_devices, show_progress_bar)
        if not math.isfinite(false_negative_margin):
            raise ValueError(f"false_negative_margin must be a finite number, but is {false_negative_margin}.")
        check_count("num_negatives", num_negatives)
        self.temperature = check_positive("temperature", temperature)
        self.false_negative_margin = false_negative_margin
        self.num_negatives = num_negatives

    def check_inputs(self, num_columns: int, num_rows: int, labels: Tensor | None) -> None:
        """Check that there are a query and a positive column; labels are ignored. See the base class."""
        self.check_query_and_positive(num_columns)

    def prepare(self, columns: list[Tensor], labels: Tensor | None, shards: Shards) -> RowwiseLoss:
        """Arrange the queries and the candidates of the whole (gathered) batch; see the base class."""
        queries, *documents = columns
        per_query = len(documents)
        # (rows, 1 + negatives, dim) -> one collective for all columns; the positive of row i is entry i * per_query.
        candidates = shards.gather(torch.stack(documents, dim=1)).flatten(end_dim=1)

        def losses(chunk: slice, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
            similarities = rows[0] @ shared[0].T
            own = torch.arange(chunk.start, chunk.stop, device=similarities.device) + shards.offset
            return self._ranking_losses(similarities, own[:, None] * per_query)

        return RowwiseLoss(rows=[queries], shared=[candidates], losses=losses)

    def _ranking_losses(self, similarities: Tensor, own: Tensor) -> Tensor:
        """InfoNCE of each row of ``similarities`` against its hard negatives; ``own`` (rows, 1) indexes the positive."""
        positives = similarities.gather(1, own)
        with torch.no_grad():
            dropped = similarities > positives + self.false_negative_margin
            dropped.scatter_(1, own, True)
            # topk needs k <= number of candidates; the duplicate rule below fills the other slots.
            k = min(self.num_negatives, similarities.shape[1])
            hardest = similarities.masked_fill(dropped, -torch.inf).topk(k, dim=1).indices
            num_left = (~dropped).sum(dim=1, keepdim=True).clamp(max=k)
            # Slots beyond num_left point at dropped candidates (-inf sorts last): cycle through the ones before.
            slots = torch.arange(self.num_negatives, device=own.device) % num_left.clamp(min=1)
            negatives = hardest.gather(1, slots)
        chosen = similarities.gather(1, negatives)
        self.record("positive_similarity", positives)
        self.record("negative_similarity", chosen[num_left[:, 0] > 0])
        self.record("filtered_candidates", dropped.sum(dim=1) - 1)  # per query, its positive not counted
        logits = torch.cat([positives, chosen], dim=1) / self.temperature
        # Multiplying instead of skipping keeps rows without negatives in the graph: their gradient is zero, not absent.
        return -logits.log_softmax(dim=1)[:, 0] * (num_left[:, 0] > 0)

    def get_config_dict(self) -> dict[str, object]:
        """Options for the model card."""
        return {
            "temperature": self.temperature,
            "false_negative_margin": self.false_negative_margin,
            "num_negatives": self.num_negatives,
            **super().get_config_dict(),
        }
