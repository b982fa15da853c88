"""Answers to many prompts that begin alike: the common beginning passes the language model once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision tower made of an image.

    Args:
        token_ids: The tokens that stand for the image in a prompt, wrapping included.
        embeddings: Visual tokens of shape (tokens, hidden), in place of the placeholders among ``token_ids``.
        inner: The same for each inner layer that takes visual tokens, too (Qwen3-VL's DeepStack); else empty.
        grid: Frames, rows and columns of patches where positions depend on them; else None.
    """

    token_ids: list[int]
    embeddings: torch.Tensor
    inner: tuple[torch.Tensor, ...] = ()
    grid: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the visual tokens in bytes."""
        return self.embeddings.nbytes + sum(layer.nbytes for layer in self.inner)


@dataclass(frozen=True)
class Prompt:
    """A stretch of tokens with the images in it.

    Args:
        token_ids: Tokens with images expanded.
        images: The images in order.
        starts: Where in ``token_ids`` the tokens of each image begin.
    """

    token_ids: list[int]
    images: list[ImageFeatures] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __add__(self, other: Prompt) -> Prompt:
        starts = self.starts + [len(self) + start for start in other.starts]
        return Prompt(self.token_ids + other.token_ids, self.images + other.images, starts)


@dataclass(frozen=True)
class Bundle:
    """A beginning and the prompts that continue from it.

    Args:
        prefix: Shared by all; may be empty.
        suffixes: At least one token each; the answer is read after the last.
    """

    prefix: Prompt
    suffixes: list[Prompt]


class PrefixEngine:
    """Reads a few logits behind prompts with a common beginning.

    The beginning is computed once per bundle; every prompt continues from its keys and values, at the positions that it
    would have alone. Visual tokens are given, so no image passes the vision tower here. Only the last position meets
    the language-model head, and only its rows for the wanted tokens, in float32.

    Args:
        model: Generative vision-language model of transformers.
        image_token_id: Token in whose place visual tokens are put.

    Raises:
        TypeError: If the model has no linear language-model head.

    Example:
        >>> from unime_st.judging import LocalJudge
        >>> judge = LocalJudge("unime-tiny", template="tiny", device="cpu")
        >>> engine = PrefixEngine(judge.model[0].model, image_token_id=6)
        >>> bundle = Bundle(Prompt([10, 11, 12]), [Prompt([13]), Prompt([14, 15])])
        >>> engine.logits([bundle], [20, 21])[0].shape
        torch.Size([2, 2])
    """

    def __init__(self, model: PreTrainedModel, image_token_id: int) -> None:
        self.model = model
        self.image_token_id = image_token_id
        if not isinstance(model.get_output_embeddings(), nn.Linear):
            raise TypeError(f"{type(model).__name__} has no linear language-model head")
        self.decoder: Any = model.get_decoder()
        self.positions = _Positions(model.base_model)
        self._takes_inner = "deepstack_visual_embeds" in inspect.signature(self.decoder.forward).parameters

    def logits(
        self, bundles: Sequence[Bundle], token_ids: Sequence[int], *, batch_size: int = 32
    ) -> list[torch.Tensor]:
        """Compute the logits of a few tokens behind every prompt.

        Args:
            bundles: Prompts that begin alike.
            token_ids: Tokens whose logits are wanted.
            batch_size: Prompts, or beginnings, per forward pass. Defaults to 32.

        Returns:
            list[torch.Tensor]: Per bundle float32 of shape (suffixes, tokens), on the CPU.
        """
        found = [torch.empty(len(bundle.suffixes), len(token_ids)) for bundle in bundles]
        # A beginning of which only one prompt goes on is no saving. Where a second only goes on from the first, as from a
        # list to the first digit of its answer, it passes the end of both.
        passing = [index for index, bundle in enumerate(bundles) if _goes_on(bundle)]
        alone = [
            index
            for index, bundle in enumerate(bundles)
            if index not in passing and (len(bundle.suffixes) == 1 or not len(bundle.prefix))
        ]
        shared = sorted(set(range(len(bundles))) - {*alone, *passing}, key=lambda index: len(bundles[index].prefix))
        rows: list[_Row] = []
        for index in alone:
            prompts = [bundles[index].prefix + suffix for suffix in bundles[index].suffixes]
            rows += [(prompt, index, [(column, len(prompt))]) for column, prompt in enumerate(prompts)]
        for index in passing:
            start, (short, long) = len(bundles[index].prefix), bundles[index].suffixes
            rows.append((bundles[index].prefix + long, index, [(0, start + len(short)), (1, start + len(long))]))
        self._answer(rows, token_ids, batch_size, found, None)
        for start in range(0, len(shared), batch_size):
            chunk = shared[start : start + batch_size]
            beginning = self._begin([bundles[index].prefix for index in chunk])
            rows = [
                (suffix, index, [(column, len(suffix))])
                for index in chunk
                for column, suffix in enumerate(bundles[index].suffixes)
            ]
            self._answer(
                rows, token_ids, batch_size, found, beginning, {index: row for row, index in enumerate(chunk)}
            )
        return found

    def _answer(
        self,
        rows: list[_Row],
        token_ids: Sequence[int],
        batch_size: int,
        found: list[torch.Tensor],
        beginning: _Beginning | None,
        row_of: dict[int, int] | None = None,
    ) -> None:
        """Run prompts of like length together and put what they answer in its place."""
        rows = sorted(rows, key=lambda row: -len(row[0]))
        head: Any = self.model.get_output_embeddings()
        wanted = torch.as_tensor(token_ids, device=head.weight.device)
        weight = head.weight[wanted].float()
        bias = None if head.bias is None else head.bias[wanted].float()
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            before = None
            if beginning is not None and row_of is not None:
                before = beginning.rows(torch.tensor([row_of[index] for _, index, _ in batch]))
            hidden, _ = self._forward([prompt for prompt, _, _ in batch], before)
            reads = [(row, index, *read) for row, (_, index, own) in enumerate(batch) for read in own]
            ends = torch.tensor([[row, length - 1] for row, _, _, length in reads], device=hidden.device)
            answers = nn.functional.linear(hidden[ends[:, 0], ends[:, 1]].float(), weight, bias).cpu()
            for (_, index, column, _), answer in zip(reads, answers, strict=True):
                found[index][column] = answer

    def _begin(self, prompts: list[Prompt]) -> _Beginning:
        cache = DynamicCache()
        _, beginning = self._forward(prompts, _Beginning(cache, None, None))
        return beginning

    def _forward(self, prompts: list[Prompt], before: _Beginning | None) -> tuple[torch.Tensor, _Beginning]:
        """Hidden states of all positions, and what a continuation needs."""
        device = self.decoder.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids = torch.tensor([prompt.token_ids + [0] * (width - len(prompt)) for prompt in prompts])
        mask = torch.arange(width) < lengths[:, None]
        indices = self.positions(prompts, width, None if before is None else before.ends)
        ends = torch.where(mask, indices.amax(0) if indices.ndim == 3 else indices, -1).amax(1) + 1
        whole = mask if before is None or before.mask is None else torch.cat([before.mask, mask], 1)
        visual = ((ids == self.image_token_id) & mask).to(device)
        embeddings = self.decoder.get_input_embeddings()(ids.to(device))
        images = [image for prompt in prompts for image in prompt.images]
        extra: dict[str, Any] = {}
        if images:
            seen = torch.cat([image.embeddings for image in images]).to(device, embeddings.dtype)
            embeddings = embeddings.masked_scatter(visual[..., None], seen)
            if self._takes_inner and images[0].inner:
                extra["visual_pos_masks"] = visual
                extra["deepstack_visual_embeds"] = [
                    torch.cat(layer).to(device) for layer in zip(*(image.inner for image in images), strict=True)
                ]
        cache = None if before is None else before.cache
        out = self.decoder(
            inputs_embeds=embeddings,
            attention_mask=None if whole.all() else whole.to(device),
            position_ids=indices.to(device),
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        )
        return out.last_hidden_state, _Beginning(cache, whole, ends)


_Row = tuple[Prompt, int, list[tuple[int, int]]]
"""A prompt, the number of its bundle, and which answers it gives: their column, and behind how many of its tokens."""


def _goes_on(bundle: Bundle) -> bool:
    """Whether there are two prompts, of which the second begins with all of the first."""
    if len(bundle.suffixes) != 2 or any(suffix.images for suffix in bundle.suffixes):
        return False
    short, long = (suffix.token_ids for suffix in bundle.suffixes)
    return len(short) < len(long) and long[: len(short)] == short


@dataclass(frozen=True)
class _Beginning:
    """Keys and values of prompts, which of them count, and the position that follows each."""

    cache: DynamicCache | None
    mask: torch.Tensor | None
    ends: torch.Tensor | None

    def rows(self, index: torch.Tensor) -> _Beginning:
        """The beginnings of some prompts, in any order and number."""
        assert self.cache is not None and self.mask is not None and self.ends is not None
        chosen = DynamicCache()
        width = int(self.mask[index].sum(1).max())  # the chosen may all be shorter than the longest
        for layer, (keys, values, *_) in enumerate(self.cache):
            where = index.to(keys.device)
            chosen.update(keys[where, :, :width], values[where, :, :width], layer)
        return _Beginning(chosen, self.mask[index, :width], self.ends[index])


class _Positions:
    """Positions of the tokens of prompts, as the model would number them."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.spatial = hasattr(base, "get_rope_index")
        # Prompts of one shape are many: the model's own function takes about a millisecond for each.
        self._of_shape = lru_cache(maxsize=1 << 14)(self._compute)

    def __call__(self, prompts: list[Prompt], width: int, starts: torch.Tensor | None) -> torch.Tensor:
        """Positions of shape (prompts, width), or (3, prompts, width) where images have rows and columns."""
        indices = torch.arange(width).expand(len(prompts), -1)
        if self.spatial:
            indices = indices.repeat(3, 1, 1)
            for row, prompt in enumerate(prompts):
                if prompt.images:
                    grids = tuple(
                        (start, len(image.token_ids), image.grid)
                        for start, image in zip(prompt.starts, prompt.images, strict=True)
                    )
                    indices[:, row, : len(prompt)] = self._of_shape(len(prompt), grids)
        return indices if starts is None else indices + starts[:, None]

    def _compute(self, length: int, images: tuple[tuple[int, int, tuple[int, ...]], ...]) -> torch.Tensor:
        types = torch.zeros(1, length, dtype=torch.long)
        for start, count, _ in images:
            types[0, start : start + count] = 1
        grids = torch.tensor([grid for _, _, grid in images])
        return self.base.get_rope_index(torch.zeros_like(types), mm_token_type_ids=types, image_grid_thw=grids)[0][
            :, 0
        ]
