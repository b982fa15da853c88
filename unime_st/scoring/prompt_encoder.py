"""From a query and its candidates to prompts that begin alike, each image through the vision tower once."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from sentence_transformers.base.modules import Transformer

from unime_st.data import BadImageError, ImageRef, Item
from unime_st.data.images import padded_to_aspect
from unime_st.scoring.prefix import Bundle, ImageFeatures, Prompt
from unime_st.scoring.prompts import clean_text, conversation, message, query_comes_first

Pair = tuple[Item, Item]
Seen = tuple[ImageRef, int]
"""An image and how many images its prompt has in all, where that changes what is made of it (else 1)."""

_PIXELS, _GRID, _TOGETHER = "pixel_values", "image_grid_thw", "batch_num_images"
_PIXELS_AT_ONCE = 8_000_000  # decoded, whatever the processor leaves of them
_PATCHES_AT_ONCE = 1 << 14


class ImageBank:
    """The visual tokens of images, each computed once while there is room.

    Args:
        transformer: Input module whose processor and model are used.
        options: Passed to the image processor.
        cache_bytes: Upper bound of the memory for visual tokens, in bytes.

    Attributes:
        together_matters: Whether images of a prompt with several are treated differently (LLaVA-OneVision).

    Raises:
        TypeError: If the model cannot be given visual tokens made ahead of it.
    """

    def __init__(self, transformer: Transformer, options: dict[str, Any], cache_bytes: int) -> None:
        self.processor: Any = transformer.processor
        model: Any = transformer.model
        self.model = model.base_model
        if not hasattr(self.model, "get_image_features"):
            raise TypeError(f"{type(transformer.model).__name__} has no vision tower that can be run ahead")
        self.options = options
        self.cache_bytes = cache_bytes
        self._accepted = inspect.signature(self.model.get_image_features).parameters
        self._cache: OrderedDict[Seen, ImageFeatures] = OrderedDict()
        self._held = 0
        self._weights = -1
        rows, tensors = self._process([Image.new("RGB", (56, 56))])
        # What these processors make of an image depends on that image alone, and images are joined by concatenation.
        self._joins = set(tensors) == {_PIXELS, _GRID}
        self.together_matters = _TOGETHER in tensors
        # Between such tokens a tokenizer sees no context, so a prompt may be put together from its parts.
        added = set(self.processor.tokenizer.added_tokens_decoder)
        if rows[0][0] not in added or rows[0][-1] not in added:
            raise TypeError("its processor surrounds images with text, which belongs to the text next to it")

    def clear(self) -> None:
        """Forget all images."""
        self._cache.clear()
        self._held = 0

    def look(self, wanted: Iterable[Seen]) -> dict[Seen, ImageFeatures | BadImageError]:
        """Give the visual tokens of images.

        Args:
            wanted: Images.

        Returns:
            dict: Per image its features, or why it cannot be read.
        """
        self._forget_if_trained()
        found: dict[Seen, ImageFeatures | BadImageError] = {}
        missing: list[tuple[Seen, Image.Image]] = []
        pixels = 0
        for key in dict.fromkeys(wanted):
            if key in self._cache:
                self._cache.move_to_end(key)
                found[key] = self._cache[key]
                continue
            try:
                missing.append((key, padded_to_aspect(key[0].open())))
            except BadImageError as error:
                found[key] = error
                continue
            pixels += missing[-1][1].width * missing[-1][1].height
            if pixels > _PIXELS_AT_ONCE:
                found |= self._compute(missing)
                missing, pixels = [], 0
        return found | self._compute(missing)

    def _forget_if_trained(self) -> None:
        # Every step of an optimiser and every load of weights raises the version of the tensors it writes.
        version = sum(parameter._version for parameter in self.model.parameters())
        if version != self._weights:
            self.clear()
        self._weights = version

    def _compute(self, missing: list[tuple[Seen, Image.Image]]) -> dict[Seen, ImageFeatures | BadImageError]:
        if not missing:
            return {}
        if self._joins:
            made = self._see_many([image for _, image in missing])
        else:
            made = [self._see_one(image, together) for (_, together), image in missing]
        for (key, _), features in zip(missing, made, strict=True):
            self._cache[key] = features
            self._held += features.nbytes
        while self._held > self.cache_bytes and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1].nbytes
        return {key: features for (key, _), features in zip(missing, made, strict=True)}

    def _process(self, images: list[Image.Image], prompts: int = 1) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        """Run the processor on prompts of placeholders alone, all images in the first or one in each."""
        each = len(images) // prompts
        out = self.processor(
            text=[self.processor.image_token * each] * prompts,
            images=[images[start : start + each] for start in range(0, len(images), each)],
            images_kwargs=self.options,
            text_kwargs={"add_special_tokens": False, "padding": True},
            common_kwargs={"return_tensors": "pt"},
        )
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(out["input_ids"], out["attention_mask"], strict=True)]
        names = {*self.processor.image_processor.model_input_names, _TOGETHER}
        return rows, {name: out[name] for name in names if name in out}

    def _see_many(self, images: list[Image.Image]) -> list[ImageFeatures]:
        rows, tensors = self._process(images, prompts=len(images))
        grids = tensors[_GRID].split(1)
        pixels = tensors[_PIXELS].split(tensors[_GRID].prod(-1).tolist())
        made: list[ImageFeatures] = []
        start = patches = 0
        for index in range(len(images)):
            patches += len(pixels[index])
            if patches < _PATCHES_AT_ONCE and index < len(images) - 1:
                continue
            part = slice(start, index + 1)
            found, inner = self._tower({_PIXELS: torch.cat(pixels[part]), _GRID: torch.cat(grids[part])})
            for number, row in enumerate(rows[part]):
                layers = tuple(layer[number] for layer in inner)
                made.append(ImageFeatures(row, found[number], layers, tuple(grids[start + number][0].tolist())))
            start, patches = index + 1, 0
        return made

    def _see_one(self, image: Image.Image, together: int) -> ImageFeatures:
        rows, tensors = self._process([image] * together)
        found, inner = self._tower(tensors)
        if inner or _GRID in tensors:
            raise TypeError("images of this processor are not joined by concatenation")
        flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
        row = rows[0][: len(rows[0]) // together]
        return ImageFeatures(row, flat[: len(flat) // together])

    @torch.inference_mode()
    def _tower(self, tensors: dict[str, torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[Any]]:
        device = self.model.device
        inputs = {name: tensor.to(device) for name, tensor in tensors.items() if name in self._accepted}
        out = self.model.get_image_features(**inputs, return_dict=True)
        return out.pooler_output, getattr(out, "deepstack_features", None) or ()


class _Renderer:
    """Writes prompts of pairs as the chat template does.

    A template mostly puts texts between words that never change; those words are found once for every kind of pair, and
    prompts are then put together without the template engine, which would cost more than a small model does. The first
    candidate of every query still goes through the engine: should it disagree, everything does from then on.
    """

    _MARKS = (' First <&"> {{0}}\n\n', " Second <&'> {%1%}\n\n")

    def __init__(self, processor: Any, template: str) -> None:
        self.processor = processor
        self.template = template
        self.fixed = True
        self._pieces: dict[tuple[bool, ...], list[str]] = {}

    def __call__(self, pairs: Sequence[Pair]) -> list[str]:
        if not self.fixed:
            return self._render([conversation(query, [candidate], decode=False) for query, candidate in pairs])
        prompts = [self._join(pair) for pair in pairs]
        firsts = [index for index, pair in enumerate(pairs) if not index or pair[0] is not pairs[index - 1][0]]
        checked = self._render([conversation(pairs[index][0], [pairs[index][1]], decode=False) for index in firsts])
        if [prompts[index] for index in firsts] != checked:
            self.fixed = False
            return self(pairs)
        return prompts

    def _render(self, messages: list[Any]) -> list[str]:
        return self.processor.apply_chat_template(messages, chat_template=self.template, tokenize=False)

    def _join(self, pair: Pair) -> str:
        kind = tuple(part is not None for item in pair for part in (item.text, item.image))
        if kind not in self._pieces:
            self._pieces[kind] = self._split(kind)
        texts = [None if item.text is None else clean_text(item.text) for item in pair]
        return "".join(texts[int(piece)] if piece in ("0", "1") else piece[1:] for piece in self._pieces[kind])  # type: ignore[misc]

    def _split(self, kind: tuple[bool, ...]) -> list[str]:
        """What a prompt of this kind is made of: "0" and "1" for the two texts, all else behind a mark."""
        sample = [
            message(role, mark if kind[2 * side] else None, True if kind[2 * side + 1] else None)
            for side, (role, mark) in enumerate(zip(("query", "document"), self._MARKS, strict=True))
        ]
        (prompt,) = self._render([sample])
        pieces = ["=" + prompt]
        for side, mark in enumerate(self._MARKS):
            cut: list[str] = []
            for piece in pieces:
                head, found, tail = piece.partition(mark)
                cut += [head, str(side), "=" + tail] if found else [head]
            pieces = cut
        return pieces


class PromptEncoder:
    """Renders and tokenises prompts and finds how far they begin alike.

    Args:
        transformer: Input module with a chat template processor.
        template: Jinja source of the chat template.
        options: Passed to the image processor.
        cache_bytes: Upper bound of the memory for visual tokens, in bytes.

    Raises:
        TypeError: If images cannot be prepared apart from their prompts, see :class:`ImageBank`.
    """

    def __init__(self, transformer: Transformer, template: str, options: dict[str, Any], cache_bytes: int) -> None:
        self.transformer = transformer
        self.processor: Any = transformer.processor
        self.tokenizer: Any = transformer.tokenizer
        self.render = _Renderer(self.processor, template)
        self.bank = ImageBank(transformer, options, cache_bytes)
        self.query_first = query_comes_first(self.processor, template)

    def encode(
        self, queries: Sequence[tuple[Item, Sequence[Item]]]
    ) -> tuple[list[tuple[Bundle, list[Pair]]], list[tuple[Pair, ValueError]]]:
        """Prepare the prompts of queries with their candidates.

        Args:
            queries: Queries, each with its candidates.

        Returns:
            tuple: Prompts that begin alike, with the pair of each; and the pairs that cannot be judged, with the
            reason.
        """
        pairs = [(query, candidate) for query, candidates in queries for candidate in candidates]
        owners = [number for number, (_, candidates) in enumerate(queries) for _ in candidates]
        rows = self._tokenize(pairs)
        images = [self._images(pair) for pair in pairs]
        seen = self.bank.look(key for keys in images for key in keys)
        alike: dict[tuple[int, int], list[tuple[Pair, list[int], list[ImageFeatures]]]] = defaultdict(list)
        failed: list[tuple[Pair, ValueError]] = []
        for owner, pair, row, keys in zip(owners, pairs, rows, images, strict=True):
            found = [seen[key] for key in keys]
            error = next((image for image in found if isinstance(image, ValueError)), None) or self._check(row, found)
            if error is not None:
                failed.append((pair, error))
                continue
            together = len(keys) if self.bank.together_matters else 1
            alike[owner, together].append((pair, row, found))  # type: ignore[arg-type]
        bundles = [
            (self.bundle([(row, found) for _, row, found in members]), [pair for pair, _, _ in members])
            for members in alike.values()
        ]
        return bundles, failed

    def _tokenize(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Token ids of prompts with one placeholder for each image."""
        prompts = self.render(pairs)
        # As ProcessorMixin.apply_chat_template: a template that writes the first token itself must not get two.
        bos = self.tokenizer.bos_token
        special = not (bos is not None and prompts[0].startswith(bos))
        return self.tokenizer(prompts, add_special_tokens=special, return_attention_mask=False)["input_ids"]

    def _images(self, pair: Pair) -> list[Seen]:
        """The images of a pair in the order in which the prompt shows them."""
        ordered = pair if self.query_first else pair[::-1]
        refs = [item.image for item in ordered if item.image is not None]
        return [(ref, len(refs) if self.bank.together_matters else 1) for ref in refs]

    def _check(self, row: list[int], images: Sequence[Any]) -> ValueError | None:
        indices = row.count(self.processor.image_token_id)
        if indices != len(images):
            return ValueError(f"the prompt has {indices} image placeholders for {len(images)} images")
        try:
            check_length(self.transformer, len(row) + sum(len(image.token_ids) - 1 for image in images))
        except ValueError as error:
            return error
        return None

    def bundle(self, members: list[tuple[list[int], list[ImageFeatures]]]) -> Bundle:
        """Cut prompts where they begin to differ: in their tokens or in the image that a placeholder stands for."""
        rows = [row for row, _ in members]
        # The first and the last in order share the least.
        low, high = min(rows), max(rows)
        shared = next((index for index, (left, right) in enumerate(zip(low, high)) if left != right), len(low))
        shared = min(shared, min(map(len, rows)) - 1) if len(rows) > 1 else 0
        token = self.processor.image_token_id
        indices = [index for index, value in enumerate(low[:shared]) if value == token]
        first = members[0][1]
        alike = next(
            (
                number
                for number in range(len(indices))
                if any(images[number] is not first[number] for _, images in members)
            ),
            len(indices),
        )
        shared = min([shared, *indices[alike : alike + 1]])
        prefix = self._expand(rows[0][:shared], first[:alike])
        return Bundle(prefix, [self._expand(row[shared:], images[alike:]) for row, images in members])

    def _expand(self, row: list[int], images: list[ImageFeatures]) -> Prompt:
        """Put the tokens of each image in the place of its placeholder."""
        if not images:
            return Prompt(row)
        expanded: list[int] = []
        starts: list[int] = []
        waiting = iter(images)
        for value in row:
            if value == self.processor.image_token_id:
                starts.append(len(expanded))
                expanded += next(waiting).token_ids
            else:
                expanded.append(value)
        return Prompt(expanded, images, starts)


class ProcessorEncoder:
    """Hands whole prompts to the processor and the model, as any model takes them; nothing is shared.

    Args:
        transformer: Input module with a chat template processor.
        template: Jinja source of the chat template.
        options: Passed to the image processor.
    """

    def __init__(self, transformer: Transformer, template: str, options: dict[str, Any]) -> None:
        self.transformer = transformer
        self.template = template
        self.options = options
        self.query_first = query_comes_first(transformer.processor, template)

    def features(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Make the features of one forward pass.

        Args:
            pairs: Queries with a candidate each.

        Returns:
            dict: Input of the model.

        Raises:
            BadImageError: If an image cannot be decoded.
            ValueError: If a prompt is longer than the model takes.
        """
        features = self.transformer.preprocess(
            # Images are taken in the order of the messages, whatever the order of the template.
            [conversation(query, [candidate])[:: 1 if self.query_first else -1] for query, candidate in pairs],
            processing_kwargs={
                "text": {"truncation": False},
                "image": self.options,
                "chat_template": {"chat_template": self.template},
            },
        )
        check_length(self.transformer, int(features["attention_mask"].sum(1).max()))
        return features


class PromptTooLongError(ValueError):
    """A prompt would have to be cut to fit the model."""


def check_length(transformer: Transformer, tokens: int) -> None:
    """Refuse a prompt that would have to be cut: its end is where the answer is read.

    Args:
        transformer: Input module.
        tokens: Length of the longest prompt.

    Raises:
        PromptTooLongError: If the model takes fewer.
    """
    limit = transformer.max_seq_length
    if limit is not None and tokens > limit:
        raise PromptTooLongError(f"the prompt has {tokens} tokens, the model takes at most {limit}: shorten the text")
