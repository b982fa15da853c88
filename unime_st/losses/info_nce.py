"""In-batch InfoNCE with a false-negative mask, hardness weights, further directions and a learnable temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from unime_st.losses.base import CachedEmbeddingLoss, RowwiseLoss, Shards, check_positive
from unime_st.losses.citations import QWEN3_EMBEDDING_CITATION
from unime_st.losses.false_negatives import check_margin, check_strength, false_negatives, same_documents

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
PartitionMode = Literal["joint", "per_direction"]

_LARGEST_SCALE = 100.0  # of a learnable temperature, as in CLIP (https://arxiv.org/abs/2103.00020)


class InfoNCELoss(CachedEmbeddingLoss):
    citation = QWEN3_EMBEDDING_CITATION

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = 0.02,
        *,
        false_negative_margin: float | None = 0.1,
        directions: Sequence[Direction] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        hardness_mode: HardnessMode = "in_batch_negatives",
        hardness_strength: float = 0.0,
        learnable_temperature: bool = False,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ) -> None:
        """
        InfoNCE over the candidates of the (gathered) batch, as in Qwen3 Embedding. For a query q with positive p and all
        other candidates c of the chosen directions::

            loss = mean_q -log( exp(cos(q, p) / t) / (exp(cos(q, p) / t) + sum_c m_c exp(s_c / t + h_c)) )

        where s_c is the similarity of the candidate in its direction, m_c is 0 for a false negative
        (``s_c > cos(q, p) + false_negative_margin``, or the document is p itself) and h_c the hardness weight
        ``hardness_strength * stop_gradient(s_c)``.

        Args:
            model: The model to train.
            temperature: Divides the cosine similarities, t above. Defaults to 0.02.
            false_negative_margin: Leave candidates more similar than positive + margin out of the softmax, and with them
                the positive's own document where it stands in other rows. 2 leaves out equal documents only. None: no
                mask. Defaults to 0.1, the value of Qwen3 Embedding.
            directions: Similarities in the denominator, of

                - ``"query_to_doc"`` (always): query and all documents, negatives included;
                - ``"query_to_query"``: query and the other queries;
                - ``"doc_to_query"``: positive and all queries;
                - ``"doc_to_doc"``: positive and the documents of other rows.

            partition_mode: ``"joint"`` (default), one softmax over all directions, or ``"per_direction"``, the mean of one
                for each; only with ``"query_to_doc"`` and ``"doc_to_query"``.
            hardness_mode: Candidates with a hardness weight, in ``"query_to_doc"``: ``"in_batch_negatives"`` (default;
                LLaVE), the row's own ``"hard_negatives"`` (EmbeddingGemma) or ``"all_negatives"``.
            hardness_strength: Strength of the weight. LLaVE uses 9, EmbeddingGemma 5. Defaults to 0: no weight.
            learnable_temperature: Train the temperature, from ``temperature`` on and not below 0.01; its gradient is the
                mean over the devices. The trainer stores it with every checkpoint of a stage. Defaults to False.
            mini_batch_size: Number of inputs embedded at a time with gradient caching, which bounds memory by the
                mini-batch instead of the batch. None (default) embeds the batch in one forward pass.
            mini_batch_num_tokens: If set, mini-batches are packed up to this many non-padding tokens instead of
                ``mini_batch_size`` inputs; turns gradient caching on as well.
            gather_across_devices: Compare with the candidates of all processes, not of this one only. Defaults to False.
            show_progress_bar: Show a progress bar over the mini-batches. Defaults to False.

        References:
            - Qwen3 Embedding (mask, directions): https://arxiv.org/abs/2506.05176
            - LLaVE (hardness weight): https://arxiv.org/abs/2503.04812
            - CLIP (learnable temperature): https://arxiv.org/abs/2103.00020
            - Gradient caching: https://huggingface.co/papers/2101.06983

        Requirements:
            1. (query, positive) pairs, optionally with any number of negatives.

        Inputs:
            +-----------------------------------------------+--------+
            | Inputs                                        | Labels |
            +===============================================+========+
            | (query, positive) pairs                       | none   |
            +-----------------------------------------------+--------+
            | (query, positive, negative_1, ..., negative_n)| none   |
            +-----------------------------------------------+--------+

        Recommendations:
            - Use ``BatchSamplers.NO_DUPLICATES``, as the mask compares documents and not queries.

        Relations:
            - :class:`CachedMultipleNegativesRankingLoss` with ``scale = 1 / temperature`` is this loss without mask and
              learnable temperature; directions and hardness weights are the same.

        Example:
            ::

                from datasets import Dataset
                from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
                from unime_st.losses import InfoNCELoss

                model = SentenceTransformer("unime-tiny")
                train_dataset = Dataset.from_dict({
                    "query": ["a red square", "a blue circle", "two green dots"],
                    "positive": ["the square is red", "the circle is blue", "there are two dots, both green"],
                })
                loss = InfoNCELoss(model, false_negative_margin=0.1, hardness_strength=9.0, mini_batch_size=2)
                trainer = SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss)
                trainer.train()
        """
        super().__init__(model, mini_batch_size, mini_batch_num_tokens, gather_across_devices, show_progress_bar)
        check_directions(directions, partition_mode)
        if hardness_mode not in get_args(HardnessMode):
            raise ValueError(f"hardness_mode must be one of {get_args(HardnessMode)}, but is {hardness_mode!r}.")
        check_positive("temperature", temperature)
        if learnable_temperature and temperature < 1 / _LARGEST_SCALE:
            raise ValueError(
                f"a learnable temperature must begin at {1 / _LARGEST_SCALE} or more, but is {temperature}."
            )
        self.false_negative_margin = check_margin(false_negative_margin)
        self.directions, self.partition_mode = tuple(directions), partition_mode
        self.hardness_mode, self.hardness_strength = hardness_mode, check_strength(hardness_strength)
        self._temperature = temperature
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable_temperature else None
        self._leaf: Tensor | None = None  # stands for the parameter in a cached step
        if self.log_scale is not None:
            self.log_scale.register_hook(_mean_over_devices)

    @property
    def temperature(self) -> float:
        """Present temperature."""
        return self._temperature if self.log_scale is None else math.exp(-self.log_scale.item())

    def check_inputs(self, num_columns: int, num_rows: int, labels: Tensor | None) -> None:
        """Check that there are a query and a positive column; labels are ignored. See the base class."""
        self.check_query_and_positive(num_columns)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Compute the loss of a batch; the gradient of a learnable temperature waits for the backward pass."""
        if self.log_scale is None or not with_backward:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        leaf = self._leaf = self.log_scale.detach().clone().requires_grad_()
        try:
            loss = super().calculate_loss(reps, labels, with_backward=True)
        finally:
            self._leaf = None
        assert leaf.grad is not None
        self._own_gradients.append((self.log_scale, leaf.grad))
        return loss

    def prepare(self, columns: list[Tensor], labels: Tensor | None, shards: Shards) -> RowwiseLoss:
        """Arrange queries, positives and the candidates of the whole (gathered) batch; see the base class."""
        queries, *documents = columns
        pool = torch.cat([shards.gather(column) for column in documents])
        compares_queries = bool({"query_to_query", "doc_to_query"} & set(self.directions))
        compares_positives = bool({"doc_to_query", "doc_to_doc"} & set(self.directions))
        known = self.identities(documents, pool, shards) if self.false_negative_margin is not None else None
        shared = [pool, *([shards.gather(queries)] if compares_queries else [])]
        if self.log_scale is not None:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(_LARGEST_SCALE))
                if self._leaf is not None:
                    self._leaf.copy_(self.log_scale)
            self.record("temperature", (-self.log_scale).exp())
            shared.append((self.log_scale if self._leaf is None else self._leaf).exp().to(queries))

        def losses(chunk: slice, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
            own = torch.arange(chunk.start, chunk.stop, device=queries.device) + shards.offset
            scale = 1.0 / self._temperature if self.log_scale is None else shared[-1]
            asked = shared[1] if compares_queries else None
            positive = rows[1] if compares_positives else None
            same = same_documents(known[0][chunk], known[1]) if known is not None else None
            return self._row_losses(rows[0], positive, shared[0], asked, own, scale, len(documents), same)

        rows = [queries, documents[0]] if compares_positives else [queries]
        return RowwiseLoss(rows=rows, shared=shared, losses=losses)

    def _row_losses(
        self,
        query: Tensor,
        positive: Tensor | None,
        pool: Tensor,
        queries: Tensor | None,
        own: Tensor,
        scale: Tensor | float,
        columns: int,
        same: Tensor | None,
    ) -> Tensor:
        """InfoNCE of each row: ``own`` are the global indices of the rows, ``pool`` the documents column by column.

        ``same`` tells which of the pool are the document of each row; None: no mask.
        """
        total = len(pool) // columns
        row = torch.arange(len(query), device=query.device)
        own_row = torch.zeros(len(query), total, dtype=torch.bool, device=query.device)
        own_row[row, own] = True
        own_documents = own_row.repeat(1, columns)
        tables = {"query_to_doc": query @ pool.T}
        excluded = {"query_to_doc": torch.zeros_like(own_documents)}
        if queries is not None and "query_to_query" in self.directions:
            tables["query_to_query"], excluded["query_to_query"] = query @ queries.T, own_row
        if queries is not None and positive is not None and "doc_to_query" in self.directions:
            tables["doc_to_query"], excluded["doc_to_query"] = positive @ queries.T, torch.zeros_like(own_row)
        if positive is not None and "doc_to_doc" in self.directions:
            tables["doc_to_doc"], excluded["doc_to_doc"] = positive @ pool.T, own_documents
        positives = tables["query_to_doc"][row, own]
        self.record("positive_similarity", positives)
        logits = []
        for direction, similarities in tables.items():
            left_out, candidates = excluded[direction], ~excluded[direction]
            if direction in ("query_to_doc", "doc_to_query"):
                candidates[row, own] = False
            if same is not None:
                assert self.false_negative_margin is not None
                equal = same[:, : similarities.shape[1]]
                masked = candidates & false_negatives(similarities, positives, self.false_negative_margin, equal)
                self.count_masked(masked, candidates)
                left_out = left_out | masked
            weights = similarities * scale
            if direction == "query_to_doc" and self.hardness_strength:
                weights = weights + self._hardness(similarities, own_documents, total)
            logits.append(weights.masked_fill(left_out, -math.inf))
        if self.partition_mode == "joint":
            log_sum = torch.cat(logits, dim=1).logsumexp(dim=1)
        else:
            log_sum = torch.stack([table.logsumexp(dim=1) for table in logits]).mean(dim=0)
        return log_sum - positives * scale

    def _hardness(self, similarities: Tensor, own_documents: Tensor, total: int) -> Tensor:
        weighted = {
            "in_batch_negatives": ~own_documents,
            "hard_negatives": own_documents.clone(),
            "all_negatives": torch.ones_like(own_documents),
        }[self.hardness_mode]
        weighted[:, :total] &= ~own_documents[:, :total]  # never the positive
        return self.hardness_strength * similarities.detach() * weighted

    def get_config_dict(self) -> dict[str, object]:
        """Options for the model card."""
        return {
            "temperature": self.temperature,
            "learnable_temperature": self.log_scale is not None,
            "false_negative_margin": self.false_negative_margin,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
            **super().get_config_dict(),
        }


def check_directions(directions: Sequence[str], partition_mode: str) -> None:
    """Raise a ValueError for unknown directions, or a partition that they do not allow.

    Example:
        >>> check_directions(["query_to_doc", "doc_to_query"], "per_direction")
    """
    if unknown := set(directions) - set(get_args(Direction)):
        raise ValueError(f"directions must be of {get_args(Direction)}, but got {sorted(unknown)}.")
    if "query_to_doc" not in directions:
        raise ValueError(
            f"directions must contain 'query_to_doc', which holds the positive, but is {list(directions)}."
        )
    if partition_mode not in get_args(PartitionMode):
        raise ValueError(f"partition_mode must be one of {get_args(PartitionMode)}, but is {partition_mode!r}.")
    if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
        raise ValueError(
            "partition_mode 'per_direction' needs the positive in every direction, and 'query_to_query' and 'doc_to_doc' "
            "have none: use 'joint'."
        )


def _mean_over_devices(gradient: Tensor) -> Tensor:
    """Mean of a gradient over the processes; DDP does it for the weights of the model only."""
    if dist.is_available() and dist.is_initialized():
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient
