"""Similarity distillation, UniME stage 1: match the in-batch similarities of a text-embedding teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor

from unime_st.losses.base import CachedEmbeddingLoss, RowwiseLoss, Shards, check_positive, normalize_rows
from unime_st.losses.citations import UNIME_CITATION

Direction = Literal["teacher_student", "student_teacher"]


class SimilarityDistillationLoss(CachedEmbeddingLoss):
    citation = UNIME_CITATION

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = 0.02,
        direction: Direction = "teacher_student",
        *,
        mask_diagonal: bool = False,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ) -> None:
        """
        Textual discriminative knowledge distillation, stage 1 of UniME. For the n texts of a batch with unit vectors
        ``s_i`` (student) and ``t_i`` (teacher) it compares the rows of the two similarity matrices::

            S_i = softmax_j(s_i . s_j / temperature)        T_i = softmax_j(t_i . t_j / temperature)
            loss = mean_i KL(T_i || S_i)

        with j over the whole batch, i itself included. Only similarities are compared, never vectors, so the teacher may
        have any embedding dimension. The paper *sums* over i; the mean differs by the factor n and keeps the learning
        rate independent of the batch size.

        Args:
            model: The model to train (the student).
            temperature: Divides the cosine similarities of both sides. Defaults to 0.02, the value of the paper's second
                stage; for this stage it gives none.
            direction: ``"teacher_student"`` (default) is KL(T || S), as in ordinary distillation; ``"student_teacher"``
                is KL(S || T), the order in which the paper's formula is typeset.
            mask_diagonal: Leave each text's similarity to itself (1 on both sides) out of both distributions. At a
                small temperature it takes nearly all of the probability. Defaults to False, the published formula.
            mini_batch_size: Number of texts embedded at a time with gradient caching, which bounds memory by the
                mini-batch instead of the batch. None (default) embeds the batch in one forward pass.
            mini_batch_num_tokens: If set, mini-batches are packed up to this many non-padding tokens instead of
                ``mini_batch_size`` texts; turns gradient caching on as well.
            gather_across_devices: Compare each text with the texts of all processes, not of this one only. Defaults to
                False.
            show_progress_bar: Show a progress bar over the mini-batches. Defaults to False.

        References:
            - UniME: https://arxiv.org/abs/2504.17432, section "Textual Discriminative Knowledge Distillation"
            - Gradient caching: https://huggingface.co/papers/2101.06983

        Requirements:
            1. The teacher's embedding of each text, computed beforehand, as the label.
            2. Batches of more than one text. Larger batches compare more pairs.

        Inputs:
            +-------+-------------------------------------------------------+
            | Texts | Labels                                                |
            +=======+=======================================================+
            | text  | teacher's embedding, any dimension, any norm but zero |
            +-------+-------------------------------------------------------+

        Recommendations:
            - :class:`MatryoshkaLoss` may wrap this loss. It truncates the student's embeddings only: at each dimension
              the student is compared with the whole teacher.

        Relations:
            - :class:`EmbedDistillLoss` and :class:`MSELoss` compare vectors one by one and need equal dimensions.
            - :class:`DistillKLDivLoss` distills scores of explicit candidate columns.

        Example:
            ::

                from datasets import Dataset
                from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
                from unime_st.losses import SimilarityDistillationLoss

                student = SentenceTransformer("unime-tiny")
                teacher = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
                texts = ["a red square", "a square that is red", "a blue circle", "two green dots"]
                train_dataset = Dataset.from_dict({"text": texts, "label": teacher.encode(texts).tolist()})
                loss = SimilarityDistillationLoss(student, mini_batch_size=2)
                trainer = SentenceTransformerTrainer(model=student, train_dataset=train_dataset, loss=loss)
                trainer.train()
        """
        super().__init__(model, mini_batch_size, mini_batch_num_tokens, gather_across_devices, show_progress_bar)
        if direction not in get_args(Direction):
            raise ValueError(f"direction must be one of {get_args(Direction)}, but is {direction!r}.")
        # MatryoshkaLoss leaves the labels of such losses alone. For others it truncates labels of the model's embedding
        # dimension, which here are the embeddings of the teacher.
        self.uses_gradient_cache = True
        self.temperature = check_positive("temperature", temperature)
        self.direction = direction
        self.mask_diagonal = mask_diagonal

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Embed the texts and compute the loss; see the base class."""
        if self.embeds_in_mini_batches or not torch.is_grad_enabled():
            return super().forward(sentence_features, labels)
        # As a loss with gradient cache, which back-propagates inside calculate_loss, but with one forward pass.
        columns = embed_columns(self.model, list(sentence_features))
        leaves = [column.detach().requires_grad_() for column in columns]
        loss = self.calculate_loss([[leaf] for leaf in leaves], labels, with_backward=True)
        surrogate = loss.new_zeros(())
        for column, leaf in zip(columns, leaves):
            assert leaf.grad is not None  # the loss uses every column
            surrogate = surrogate + (column * leaf.grad).sum()
        return loss + surrogate - surrogate.detach()

    def check_inputs(self, num_columns: int, num_rows: int, labels: Tensor | None) -> None:
        """Check that there is one column and a usable teacher embedding per row; see the base class."""
        if num_columns != 1:
            raise ValueError(f"SimilarityDistillationLoss takes one text column, but got {num_columns} columns.")
        if labels is None or labels.ndim != 2 or len(labels) != num_rows:
            found = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)}"
            raise ValueError(
                "SimilarityDistillationLoss takes the teacher's embeddings as labels, shape "
                f"(batch, teacher_dim) = ({num_rows}, any), but got {found}."
            )
        norms = labels.double().norm(dim=1)
        unusable = (~norms.isfinite() | (norms == 0)).nonzero().flatten().tolist()
        if unusable:
            raise ValueError(
                f"The teacher embeddings in row(s) {unusable[:10]} of this batch are zero or not finite, so they have "
                "no direction to distill. Encode these texts again or leave them out."
            )

    def prepare(self, columns: list[Tensor], labels: Tensor | None, shards: Shards) -> RowwiseLoss:
        """Arrange the rows of both similarity matrices; see the base class."""
        assert labels is not None  # check_inputs has run
        (student,) = columns
        teacher = normalize_rows(labels.detach().to(student))
        all_students = shards.gather(student)
        all_teachers = shards.gather(teacher, with_grad=False)

        def losses(chunk: slice, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
            first = shards.offset + chunk.start
            log_student = self._log_probabilities(rows[0] @ shared[0].T, first)
            log_teacher = self._log_probabilities(teacher[chunk] @ all_teachers.T, first)
            if self.direction == "teacher_student":
                return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)
            return (log_student.exp() * (log_student - log_teacher)).sum(dim=1)

        return RowwiseLoss(rows=[student], shared=[all_students], losses=losses)

    def _log_probabilities(self, similarities: Tensor, first_column: int) -> Tensor:
        """Log-softmax of a chunk of rows, whose own entries start at ``first_column``."""
        logits = similarities / self.temperature
        if self.mask_diagonal:
            own = torch.arange(len(logits), device=logits.device)[:, None] + first_column
            # The lowest number instead of -inf: its probability is 0 as well, but 0 * (low - low) is 0 and not NaN,
            # also in a batch of a single text.
            logits = logits.scatter(1, own, torch.finfo(logits.dtype).min)
        return logits.log_softmax(dim=1)

    def get_config_dict(self) -> dict[str, object]:
        """Options for the model card."""
        return {
            "temperature": self.temperature,
            "direction": self.direction,
            "mask_diagonal": self.mask_diagonal,
            **super().get_config_dict(),
        }
