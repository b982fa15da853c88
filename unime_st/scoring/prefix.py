"""Shared-prefix engine: logits behind prompts that begin alike, whose common prefix is computed once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from unime_st.backbones.last_token import only_last_tokens, prepare_last_layer


@dataclass(frozen=True)
class ImageFeatures:
    """Visual tokens of an image, as the language model takes them.

    Args:
        token_ids: Token ids of the image in a prompt, wrapping included.
        embeddings: Visual tokens of shape (tokens, hidden); they replace the placeholders among ``token_ids``.
        inner: The same for each inner layer that also takes visual tokens (Qwen3-VL's DeepStack), else empty.
        grid: Frames, rows and columns of patches where positions depend on them, else None.
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
    """A prompt or a part of one: token ids with images expanded, the images, and where the tokens of each begin."""

    token_ids: list[int]
    images: list[ImageFeatures] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __add__(self, other: Prompt) -> Prompt:
        starts = self.starts + [len(self) + start for start in other.starts]
        return Prompt(self.token_ids + other.token_ids, self.images + other.images, starts)


@dataclass(frozen=True)
class PromptGroup:
    """Prompts with a common prefix, which may be empty, and the rest of each, at least one token."""

    prefix: Prompt
    suffixes: list[Prompt]

    @property
    def nested(self) -> bool:
        """Whether the group has two suffixes of texts, and the second begins with all of the first."""
        if len(self.suffixes) != 2 or any(suffix.images for suffix in self.suffixes):
            return False
        short, long = (suffix.token_ids for suffix in self.suffixes)
        return len(short) < len(long) and long[: len(short)] == short


class PrefixEngine:
    """Computes the logits of a few tokens behind prompts with a common prefix.

    The prefix is computed once per group. Every prompt continues from its keys and values, at the positions that it
    would have alone. Visual tokens are given, so no image passes the vision tower here. Only the last position passes
    the language-model head, and only its rows for the requested tokens, in float32. A TypeError tells of a model
    without a linear language-model head.

    Example:
        >>> from unime_st.judging import LocalJudge
        >>> from unime_st.scoring.prefix import PrefixEngine, Prompt, PromptGroup
        >>> judge = LocalJudge("unime-tiny", template="tiny", device="cpu")
        >>> engine = PrefixEngine(judge.model[0].model, image_token_id=6)
        >>> group = PromptGroup(Prompt([10, 11, 12]), [Prompt([13]), Prompt([14, 15])])
        >>> engine.logits([group], [20, 21])[0].shape
        torch.Size([2, 2])
    """

    def __init__(self, model: PreTrainedModel, image_token_id: int) -> None:
        self.model = model
        self.image_token_id = image_token_id
        if not isinstance(model.get_output_embeddings(), nn.Linear):
            raise TypeError(f"{type(model).__name__} has no linear language-model head")
        self.decoder: Any = model.get_decoder()
        self.positions = _Positions(model.base_model)
        self._last_only = prepare_last_layer(model)
        self._takes_inner = "deepstack_visual_embeds" in inspect.signature(self.decoder.forward).parameters

    def logits(
        self,
        groups: Sequence[PromptGroup],
        token_ids: Sequence[int],
        *,
        batch_size: int = 32,
        with_total: bool = False,
    ) -> list[torch.Tensor]:
        """Logits of a few tokens behind every prompt: per group float32 of shape (suffixes, tokens), on the CPU.

        ``batch_size`` counts prompts, or prefixes. ``with_total`` appends the log-sum-exp of the whole vocabulary.
        """
        found = [torch.empty(len(group.suffixes), len(token_ids) + with_total) for group in groups]
        whole: list[_Row] = []
        shared: list[int] = []
        for index, group in enumerate(groups):
            if group.nested:  # as a list and the same list with the first digit of its answer: one row answers both
                short, long = group.suffixes
                start = len(group.prefix)
                whole.append(_Row(group.prefix + long, index, [(0, start + len(short)), (1, start + len(long))]))
            elif len(group.suffixes) == 1 or not len(group.prefix):  # nothing to share
                prompts = [group.prefix + suffix for suffix in group.suffixes]
                whole += [_Row(prompt, index, [(column, len(prompt))]) for column, prompt in enumerate(prompts)]
            else:
                shared.append(index)
        head = _Head(self.model, token_ids, with_total)
        self._answer(whole, head, batch_size, found)
        shared.sort(key=lambda index: len(groups[index].prefix))
        for start in range(0, len(shared), batch_size):
            chunk = shared[start : start + batch_size]
            prefixes = self._compute_prefixes([groups[index].prefix for index in chunk])
            rows = [
                _Row(suffix, index, [(column, len(suffix))], prefix)
                for prefix, index in enumerate(chunk)
                for column, suffix in enumerate(groups[index].suffixes)
            ]
            self._answer(rows, head, batch_size, found, prefixes)
        return found

    def _answer(
        self,
        rows: list[_Row],
        head: _Head,
        batch_size: int,
        found: list[torch.Tensor],
        prefixes: PrefixCache | None = None,
    ) -> None:
        """Run prompts of like length together and write their answers into ``found``."""
        rows = sorted(rows, key=lambda row: -len(row.prompt))
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            before = None if prefixes is None else prefixes.select([row.prefix for row in batch])
            ends_only = all(len(row.reads) == 1 for row in batch)
            hidden, _ = self._forward([row.prompt for row in batch], before, ends_only=ends_only)
            reads = [(number, row.group, *read) for number, row in enumerate(batch) for read in row.reads]
            ends = torch.tensor([[number, length - 1] for number, _, _, length in reads], device=hidden.device)
            answers = head(hidden[ends[:, 0], ends[:, 1]])
            for (_, group, column, _), answer in zip(reads, answers, strict=True):
                found[group][column] = answer

    def _compute_prefixes(self, prompts: list[Prompt]) -> PrefixCache:
        return self._forward(prompts, PrefixCache(DynamicCache(), None, None))[1]

    def _forward(
        self, prompts: list[Prompt], before: PrefixCache | None, *, ends_only: bool = True
    ) -> tuple[torch.Tensor, PrefixCache]:
        """Hidden states of all positions, or right at the ends only, and the cache that a continuation needs."""
        device = self.decoder.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids = torch.tensor([prompt.token_ids + [0] * (width - len(prompt)) for prompt in prompts])
        mask = torch.arange(width) < lengths[:, None]
        positions = self.positions(prompts, width, None if before is None else before.ends)
        ends = torch.where(mask, positions.amax(0) if positions.ndim == 3 else positions, -1).amax(1) + 1
        whole = mask if before is None or before.mask is None else torch.cat([before.mask, mask], 1)
        visual = ((ids == self.image_token_id) & mask).to(device)
        embeddings = self.decoder.get_input_embeddings()(ids.to(device))
        images = [image for prompt in prompts for image in prompt.images]
        extra: dict[str, object] = {}
        if images:
            tokens = torch.cat([image.embeddings for image in images]).to(device, embeddings.dtype)
            embeddings = embeddings.masked_scatter(visual[..., None], tokens)
            if self._takes_inner and images[0].inner:
                extra["visual_pos_masks"] = visual
                extra["deepstack_visual_embeds"] = [
                    torch.cat(layer).to(device) for layer in zip(*(image.inner for image in images), strict=True)
                ]
        cache = None if before is None else before.cache
        shortcut = only_last_tokens(mask.to(device)) if ends_only and self._last_only else nullcontext()
        with shortcut:
            out = self.decoder(
                inputs_embeds=embeddings,
                attention_mask=None if whole.all() else whole.to(device),
                position_ids=positions.to(device),
                past_key_values=cache,
                use_cache=cache is not None,
                **extra,
            )
        return out.last_hidden_state, PrefixCache(cache, whole, ends)


class _Row(NamedTuple):
    """A prompt to run, without its prefix where that is cached.

    Each read is the column of an answer, and behind how many tokens of the prompt it stands. ``prefix`` is the row of
    the prefix in the cache.
    """

    prompt: Prompt
    group: int
    reads: list[tuple[int, int]]
    prefix: int = 0


class _Head:
    """The rows of the language-model head for a few tokens, in float32, and its log-sum-exp if asked for."""

    def __init__(self, model: PreTrainedModel, token_ids: Sequence[int], with_total: bool) -> None:
        head: Any = model.get_output_embeddings()
        rows = torch.as_tensor(token_ids, device=head.weight.device)
        self.weight = head.weight[rows].float()
        self.bias = None if head.bias is None else head.bias[rows].float()
        self.whole = head if with_total else None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.linear(hidden.float(), self.weight, self.bias)
        if self.whole is not None:
            logits = torch.cat([logits, self.whole(hidden).float().logsumexp(-1, keepdim=True)], 1)
        return logits.cpu()


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of prefixes, a mask of their tokens (prefixes, longest), and the next position of each."""

    cache: DynamicCache | None
    mask: torch.Tensor | None
    ends: torch.Tensor | None

    def select(self, rows: list[int]) -> PrefixCache:
        """Return the cache of some prefixes, in any order and number."""
        assert self.cache is not None and self.mask is not None and self.ends is not None
        index = torch.tensor(rows)
        chosen = DynamicCache()
        width = int(self.mask[index].sum(1).max())  # the chosen may all be shorter than the longest
        for keys, values, *_ in self.cache:
            # Not by `update`, which would copy once more. Rows of one prefix, as of one query, are not copied at all.
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = (_rows(tensor[:, :, :width], rows, index) for tensor in (keys, values))
            chosen.layers.append(layer)
        return PrefixCache(chosen, self.mask[index, :width], self.ends[index])


def _rows(tensor: torch.Tensor, rows: list[int], index: torch.Tensor) -> torch.Tensor:
    if len(set(rows)) == 1:
        return tensor[rows[0]].expand(len(rows), *tensor.shape[1:])
    return tensor[index.to(tensor.device)]


class _Positions:
    """Positions of the tokens of prompts, as the model would number them."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.spatial = hasattr(base, "get_rope_index")
        # Prompts of one shape are many: the model's own function takes about a millisecond for each.
        self._of_shape = lru_cache(maxsize=1 << 14)(self._compute)

    def __reduce__(self) -> tuple[type[_Positions], tuple[object]]:
        return _Positions, (self.base,)  # the cache of a function cannot be pickled

    def __call__(self, prompts: list[Prompt], width: int, starts: torch.Tensor | None) -> torch.Tensor:
        """Positions of shape (prompts, width), or (3, prompts, width) where images have rows and columns."""
        positions = torch.arange(width).expand(len(prompts), -1)
        if self.spatial:
            positions = positions.repeat(3, 1, 1)
            for row, prompt in enumerate(prompts):
                if prompt.images:
                    grids = tuple(
                        (start, len(image.token_ids), image.grid)
                        for start, image in zip(prompt.starts, prompt.images, strict=True)
                    )
                    positions[:, row, : len(prompt)] = self._of_shape(len(prompt), grids)
        return positions if starts is None else positions + starts[:, None]

    def _compute(self, length: int, images: tuple[tuple[int, int, tuple[int, ...] | None], ...]) -> torch.Tensor:
        types = torch.zeros(1, length, dtype=torch.long)
        for start, count, _ in images:
            types[0, start : start + count] = 1
        grids = torch.tensor([grid for _, _, grid in images])
        found = self.base.get_rope_index(torch.zeros_like(types), mm_token_type_ids=types, image_grid_thw=grids)
        return found[0][:, 0]
