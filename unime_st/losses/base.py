"""Base of the embedding losses: gradient caching, computation in chunks of rows, gathering across devices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
import tqdm
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, has_static_embedding_input
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor, nn

from unime_st.options import check_count

ROWS_AT_ONCE = 32
"""Rows of the similarity matrix computed at a time where no ``mini_batch_size`` is given."""


def normalize_rows(embeddings: Tensor) -> Tensor:
    """L2-normalize rows in float32, or in float64 if they are float64.

    Args:
        embeddings: ``(rows, dim)`` of any floating dtype. Half precision is widened first: a cosine rounded to
            bfloat16 is off by up to 0.002, which at temperature 0.02 is 0.1 in the logit.

    Returns:
        Tensor: ``(rows, dim)``, float32 or float64.

    Example:
        >>> normalize_rows(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16))
        tensor([[0.6000, 0.8000]])
    """
    if embeddings.dtype != torch.float64:
        embeddings = embeddings.float()
    return F.normalize(embeddings, p=2, dim=-1)


def check_positive(name: str, value: float) -> float:
    """Return ``value`` if it is a positive finite number, else raise a ValueError with the name of the option.

    Example:
        >>> check_positive("temperature", 0.02)
        0.02
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive finite number, but is {value!r}.")
    return value


@dataclass(frozen=True)
class Shards:
    """Distribution of the rows of a global batch over the processes that gather them.

    Args:
        sizes: Number of rows of each process, in rank order. One entry if nothing is gathered.
        rank: Index of this process in ``sizes``.

    Example:
        >>> shards = Shards([3, 2], rank=1)
        >>> shards.offset, shards.row_weight
        (3, 0.4)
    """

    sizes: list[int]
    rank: int

    @classmethod
    def of(cls, num_rows: int, device: torch.device, gather: bool) -> Shards:
        """Exchange the number of rows with the other processes if ``gather`` is set."""
        if not gather:
            return cls([num_rows], 0)
        return cls(all_gather(torch.tensor([num_rows], device=device)).tolist(), get_rank())

    @property
    def offset(self) -> int:
        """Global index of this process's first row."""
        return sum(self.sizes[: self.rank])

    @property
    def row_weight(self) -> float:
        """Weight of one row in the local loss.

        DDP averages gradients over processes, so the local loss is ``world_size / total_rows`` times the sum of its
        rows. With equal shards that is their mean, as in sentence-transformers' losses; with uneven ones the gradient
        is still that of the mean over the global batch.
        """
        return len(self.sizes) / sum(self.sizes)

    def gather(self, rows: Tensor, with_grad: bool = True) -> Tensor:
        """Concatenate the rows of all processes in rank order. Uneven shards are padded for the transfer only."""
        if len(self.sizes) == 1:
            return rows
        longest = max(self.sizes)
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        gathered = all_gather_with_grad(padded) if with_grad else all_gather(padded)
        shards = gathered.split(longest)
        return torch.cat([shard[:size] for shard, size in zip(shards, self.sizes)])


@dataclass
class RowwiseLoss:
    """A loss that is a sum over rows, as tensors and a function of a chunk of them.

    Args:
        rows: Tensors with one entry per local query. They are split into chunks together.
        shared: Tensors that every chunk needs whole, such as the gathered candidates.
        losses: ``losses(chunk, rows, shared)`` returns the loss of each row of the chunk, shape ``(len(chunk),)``.
            ``chunk`` is the slice of local rows, ``rows`` holds these rows only.
    """

    rows: list[Tensor]
    shared: list[Tensor]
    losses: Callable[[slice, Sequence[Tensor], Sequence[Tensor]], Tensor]


class CachedEmbeddingLoss(CachedLossMixin, nn.Module, ABC):
    """Base of the embedding losses: plain or gradient-cached, on one process or on several.

    A subclass implements :meth:`check_inputs` and :meth:`prepare`. Losses are computed on unit vectors in at least
    float32.

    Args:
        model: The model to train.
        mini_batch_size: Number of inputs embedded at a time with gradient caching
            (https://huggingface.co/papers/2101.06983), which bounds memory by the mini-batch instead of the batch.
            None (default) embeds the batch in one forward pass.
        mini_batch_num_tokens: If set, mini-batches are packed up to this many non-padding tokens instead of
            ``mini_batch_size`` inputs; turns gradient caching on as well.
        gather_across_devices: Compare with the inputs of all processes, not of this one only. The gradient then equals
            that of one process with the whole batch. Shards may differ in size. Defaults to False.
        show_progress_bar: Show a progress bar over the mini-batches. Defaults to False.
    """

    mini_batch_size: int | None  # type: ignore[assignment]  # None where the cache is off

    def __init__(
        self,
        model: SentenceTransformer,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)):
            if value is not None:
                check_count(name, value)
        self.model = model
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.gather_across_devices = gather_across_devices
        self.show_progress_bar = show_progress_bar
        self._statistics: dict[str, tuple[Tensor | float, int]] = {}
        self._candidates: Tensor | None = None
        self._whole_columns: list[Tensor] | None = None
        self._own_gradients: list[tuple[nn.Parameter, Tensor]] = []
        self.uses_gradient_cache = self.embeds_in_mini_batches
        if self.embeds_in_mini_batches and has_static_embedding_input(model):
            raise ValueError(
                f"{type(self).__name__} cannot cache gradients for a model based on a StaticEmbedding, whose inputs "
                "cannot be split into mini-batches. Leave mini_batch_size and mini_batch_num_tokens at None."
            )

    @property
    def embeds_in_mini_batches(self) -> bool:
        """Whether gradients are cached: each mini-batch is embedded in the forward and again in the backward pass."""
        return self.mini_batch_size is not None or self.mini_batch_num_tokens is not None

    def record(self, name: str, values: Tensor) -> None:
        """Add values, a tensor of any shape, to a statistic whose mean the trainer logs under this name."""
        values = values.detach().float()
        total, count = self._statistics.get(name, (0.0, 0))
        # Sums stay on the device: reading them here would synchronize it after every mini-batch.
        self._statistics[name] = (total + values.sum(), count + values.numel())

    def pop_statistics(self) -> dict[str, float]:
        """Return the mean of each statistic since the last call by its name, and reset them.

        Example:
            >>> import torch
            >>> from unime_st import UniME
            >>> from unime_st.losses import HardNegativeRankingLoss
            >>> loss = HardNegativeRankingLoss(UniME("unime-tiny"), num_negatives=1)
            >>> _ = loss.calculate_loss([[torch.eye(2)], [torch.eye(2)]])
            >>> loss.pop_statistics()
            {'positive_similarity': 1.0, 'negative_similarity': 0.0, 'filtered_candidates': 0.0}
        """
        means = {name: round(float(total) / count, 6) for name, (total, count) in self._statistics.items() if count}
        self._statistics.clear()
        return means

    def count_masked(self, masked: Tensor, candidates: Tensor) -> None:
        """Record the share of candidates that a false-negative mask leaves out, and how many all rows have left."""
        self.record("masked_candidates", masked[candidates])
        counts = torch.stack([candidates.sum(), (candidates & ~masked).sum()])
        self._candidates = counts if self._candidates is None else self._candidates + counts

    def _check_masked(self) -> None:
        counts, self._candidates = self._candidates, None
        if counts is None:
            return
        candidates, left = counts.tolist()
        if candidates and not left:
            raise ValueError(
                f"{type(self).__name__}: false_negative_margin {getattr(self, 'false_negative_margin', None)} masks every "
                "candidate of this batch, so that nothing is learned from it: raise the margin."
            )

    def identities(self, documents: list[Tensor], pool: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
        """Embeddings that tell equal documents: of the positives of the own rows, and of the gathered pool.

        Prefixes and roundings of different documents may be equal, so that the whole embeddings decide where they are
        known.
        """
        if self._whole_columns is None:
            return documents[0].detach(), pool.detach()
        whole = [normalize_rows(column.detach()) for column in self._whole_columns[1:]]
        return whole[0], torch.cat([shards.gather(column, with_grad=False) for column in whole])

    @abstractmethod
    def prepare(self, columns: list[Tensor], labels: Tensor | None, shards: Shards) -> RowwiseLoss:
        """Arrange a checked batch for the computation in chunks of rows.

        ``columns`` are the unit vectors of each input column, ``(rows, dim)``; ``shards`` is the distribution of the
        rows over the processes.
        """

    def check_query_and_positive(self, num_columns: int) -> None:
        """Raise ValueError unless there are a query and a positive column."""
        if num_columns < 2:
            raise ValueError(
                f"{type(self).__name__} takes the columns query, positive and optionally negatives, but got "
                f"{num_columns} column(s)."
            )

    @abstractmethod
    def check_inputs(self, num_columns: int, num_rows: int, labels: Tensor | None) -> None:
        """Raise a ValueError if the number of columns or the labels are not what this loss takes."""

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Embed the columns and compute the loss. With caching, the backward pass embeds the mini-batches again.

        Args:
            sentence_features: Features of each input column, as made by the model's ``preprocess``.
            labels: The labels of the batch, see the class.

        Returns:
            Tensor: Scalar, the mean over the rows.
        """
        sentence_features = list(sentence_features)
        if self.embeds_in_mini_batches:
            return self.attach_own_gradients(self.forward_cached(sentence_features, labels))
        embeddings = embed_columns(self.model, sentence_features)
        return self.calculate_loss([[column] for column in embeddings], labels)

    def attach_own_gradients(self, loss: Tensor, share: float = 1.0) -> Tensor:
        """Let the backward pass of a cached step reach parameters of the loss itself, such as a temperature.

        Their gradients are known before the backward pass, and are scaled by what it begins with, as those of the model.

        Args:
            loss: Loss of the step, from :meth:`forward_cached`.
            share: Factor of the gradients, for a loss that is a mean of several. Defaults to 1.

        Returns:
            Tensor: The loss, with the same value.
        """
        for parameter, gradient in self._own_gradients:
            term = (parameter * gradient * share).sum()
            loss = loss + (term - term.detach())
        self._own_gradients.clear()
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Compute the loss of a batch from its embeddings.

        Args:
            reps: For each input column the embeddings of its mini-batches, ``(mini_batch, dim)`` each. They need not
                be normalized.
            labels: The labels of the whole batch, see the class.
            with_backward: Back-propagate into ``reps``, one chunk of rows at a time so that the similarity matrix is
                never in memory as a whole, and return a detached loss. Defaults to False.

        Returns:
            Tensor: Scalar, the mean over the rows.

        Raises:
            ValueError: If the number of columns or the labels are not what the loss takes, or a false-negative mask leaves
                no candidate to any row.
        """
        device = reps[0][0].device
        # Autocast would round the similarities to half precision whatever dtype the embeddings have.
        with torch.autocast(device.type, enabled=False):
            columns = [normalize_rows(torch.cat(column)) for column in reps]
            self.check_inputs(len(columns), len(columns[0]), labels)
            shards = Shards.of(len(columns[0]), device, self.gather_across_devices)
            batch = self.prepare(columns, labels, shards)
            loss = self._sum_over_chunks(batch, shards.row_weight, with_backward)
        self._check_masked()
        return loss

    def _sum_over_chunks(self, batch: RowwiseLoss, row_weight: float, with_backward: bool) -> Tensor:
        num_rows = len(batch.rows[0])
        # Without a backward pass per chunk the graphs of all chunks would stay alive: chunking would save nothing.
        chunked = with_backward or not torch.is_grad_enabled()
        chunk_size = (self.mini_batch_size or ROWS_AT_ONCE) if chunked else num_rows
        pieces = list(zip(*(tensor.split(chunk_size) for tensor in batch.rows)))
        shared = batch.shared
        if with_backward:
            # Leaves cut the graph at the (gathered) unit vectors: each chunk's graph is freed at once, and the
            # backward pass through normalization and communication below runs once, not once per chunk.
            pieces = [tuple(tensor.detach().requires_grad_() for tensor in piece) for piece in pieces]
            shared = [tensor.detach().requires_grad_() for tensor in batch.shared]

        total = batch.rows[0].new_zeros(())
        begin = 0
        for piece in tqdm.tqdm(pieces, desc="Calculating loss", disable=not self.show_progress_bar):
            chunk = slice(begin, begin + len(piece[0]))
            loss = batch.losses(chunk, piece, shared).sum() * row_weight
            if with_backward:
                loss.backward()
                loss = loss.detach()
            total = total + loss
            begin = chunk.stop

        if with_backward:
            row_gradients = [torch.cat([tensor.grad for tensor in column]) for column in zip(*pieces)]
            torch.autograd.backward([*batch.rows, *batch.shared], [*row_gradients, *(leaf.grad for leaf in shared)])
        return total

    def get_config_dict(self) -> dict[str, object]:
        """Options for the model card."""
        return {
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
            "gather_across_devices": self.gather_across_devices,
        }


@contextmanager
def whole_columns(loss: nn.Module, columns: list[Tensor]) -> Iterator[None]:
    """Tell a loss the whole embeddings of its columns, while it is computed on prefixes or roundings of them.

    Args:
        loss: The loss; one that is not a :class:`CachedEmbeddingLoss` is left as it is.
        columns: ``(rows, dim)`` each, the embeddings of each input column.
    """
    if not isinstance(loss, CachedEmbeddingLoss):
        yield
        return
    loss._whole_columns = columns
    try:
        yield
    finally:
        loss._whole_columns = None
