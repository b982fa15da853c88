"""Prompt encoder: a query and its candidates as prompts with a common prefix."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from sentence_transformers.base.modules import Transformer

from unime_st.backbones.video_frames import raise_without_video
from unime_st.data import BadImageError, Item
from unime_st.encoding.input_videos import has_video
from unime_st.encoding.model_inputs import Features
from unime_st.recipes.template_frame import TemplateFrame
from unime_st.scoring.chat_tokenizer import ChatTokenizer, check_length
from unime_st.scoring.prefix import ImageFeatures, Prompt, PromptGroup
from unime_st.scoring.prompts import Message, clean_text, conversation, message, query_comes_first
from unime_st.scoring.visual_token_cache import ImageKey, VisualTokenCache

Pair = tuple[Item, Item]
Query = tuple[Item, Sequence[Item]]
"""A query and its distinct candidates."""

_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")


def _strings_sought(template: str) -> set[str]:
    """Strings that a template looks for, by a method such as ``removeprefix``, the filter ``replace``, or ``in``."""
    known = _GENERATION.sub("", template)  # a tag of transformers, which jinja2 does not know
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(known)
    methods = (call for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Getattr))
    filters = (found for found in tree.find_all(nodes.Filter) if found.name == "replace")
    tests = (test for test in tree.find_all(nodes.Compare) if any(part.op in ("in", "notin") for part in test.ops))
    sought = [argument for call in methods for argument in call.args]
    sought += [argument for found in filters for argument in found.args]
    sought += [test.expr for test in tests]
    return {node.value for node in sought if isinstance(node, nodes.Const) and isinstance(node.value, str)} - {""}


class PairRenderer:
    """Renders the prompts of pairs as the chat template does.

    A template mostly puts texts between fixed pieces. They are found once for every kind of pair
    (:class:`~unime_st.recipes.template_frame.TemplateFrame`); prompts are then joined without the template engine,
    which would take longer than a small model. Texts with a special token, or with a string that the template looks
    for, go through the engine, and so does the first candidate of every query: if its prompt differs from the joined
    one, everything goes through the engine from then on, and ``fixed`` is False.
    """

    def __init__(self, processor: Any, template: str) -> None:
        self.processor = processor
        self.template = template
        self.fixed = True
        special = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
        # Texts with these may be changed by the template.
        self._special = re.compile("|".join(map(re.escape, [*special, *_strings_sought(template)])) or "(?!)")
        self._frames: dict[tuple[bool, ...], TemplateFrame | None] = {}

    def __call__(self, pairs: Sequence[Pair]) -> list[str]:
        """Render queries with a candidate each: prompts with one placeholder per image."""
        if not self.fixed:
            return self._render([conversation(query, [candidate], decode=False) for query, candidate in pairs])
        prompts = [self._join(pair) for pair in pairs]
        rendered = [
            index
            for index, (pair, prompt) in enumerate(zip(pairs, prompts, strict=True))
            if prompt is None or not index or pair[0] is not pairs[index - 1][0]
        ]
        found = self._render([conversation(pairs[index][0], [pairs[index][1]], decode=False) for index in rendered])
        for index, prompt in zip(rendered, found, strict=True):
            self.fixed = self.fixed and prompts[index] in (None, prompt)
            prompts[index] = prompt
        return [prompt for prompt in prompts if prompt is not None] if self.fixed else self(pairs)

    def _render(self, messages: Sequence[list[Message]]) -> list[str]:
        return self.processor.apply_chat_template(messages, chat_template=self.template, tokenize=False)

    def _join(self, pair: Pair) -> str | None:
        """Join the pieces of a prompt; None where the template engine has to render it."""
        texts = [clean_text(item.text) for item in pair if item.text is not None]
        if any(self._special.search(text) for text in texts):
            return None
        kind = tuple(part is not None for item in pair for part in (item.text, item.image, item.video))
        if kind not in self._frames:
            self._frames[kind] = TemplateFrame.find(lambda texts: self._sample(kind, texts), slots=len(texts))
        frame = self._frames[kind]
        self.fixed = self.fixed and frame is not None
        return None if frame is None else frame.join(texts)

    def _sample(self, kind: tuple[bool, ...], texts: Sequence[str]) -> str:
        """Render a pair of a kind with some texts."""
        waiting = iter(texts)
        sides = zip(("query", "document"), kind[::3], kind[1::3], kind[2::3], strict=True)
        sample = [
            message(role, next(waiting) if text else None, image or None, video or None)
            for role, text, image, video in sides
        ]
        return self._render([sample])[0]


class PromptEncoder:
    """Renders and tokenizes prompts and finds how far they begin alike.

    Attributes:
        render: Renders pairs.
        tokenizer: Tokenizes rendered prompts.
        images: Computes the visual tokens of images; a TypeError tells of a model that does not allow it.
        query_first: Whether the template shows the query before the candidate.
    """

    def __init__(
        self, transformer: Transformer, template: str, image_options: dict[str, object], cache_bytes: int
    ) -> None:
        self.transformer = transformer
        self.render = PairRenderer(transformer.processor, template)
        self.tokenizer = ChatTokenizer(transformer, image_options)
        self.images = VisualTokenCache(transformer, self.tokenizer, cache_bytes)
        self.query_first = query_comes_first(transformer.processor, template)

    def encode(
        self, queries: Sequence[Query]
    ) -> tuple[list[tuple[PromptGroup, list[Pair]]], list[tuple[Pair, ValueError]]]:
        """Encode the prompts of queries with their candidates.

        Returns:
            Groups of prompts with a common prefix, each with the pair of every prompt; and the pairs that cannot be
            scored, with the reason.
        """
        pairs = [(query, candidate) for query, candidates in queries for candidate in candidates]
        owners = [number for number, (_, candidates) in enumerate(queries) for _ in candidates]
        rows = self.tokenizer.tokenize(self.render(pairs)) if pairs else []
        keys = [self._image_keys(pair) for pair in pairs]
        images = self.images.encode_images(key for row in keys for key in row)
        alike: dict[tuple[int, int], list[tuple[Pair, list[int], list[ImageFeatures]]]] = defaultdict(list)
        failed: list[tuple[Pair, ValueError]] = []
        for owner, pair, row, row_keys in zip(owners, pairs, rows, keys, strict=True):
            try:
                found = readable_images([images[key] for key in row_keys])
                self.check(row, found)
            except ValueError as error:
                failed.append((pair, error))
                continue
            alike[owner, len(found) if self.tokenizer.counts_images else 1].append((pair, row, found))
        groups = [
            (self.group([(row, found) for _, row, found in members]), [pair for pair, _, _ in members])
            for members in alike.values()
        ]
        return groups, failed

    def _image_keys(self, pair: Pair) -> list[ImageKey]:
        """Keys of the images of a pair in the order in which the prompt shows them."""
        ordered = pair if self.query_first else pair[::-1]
        return self.images.keys([item.image for item in ordered if item.image is not None])

    def check(self, row: list[int], images: Sequence[ImageFeatures], *, continuation: int = 0) -> None:
        """Raise an error for a prompt, one placeholder per image, that cannot be scored.

        Raises:
            PromptTooLongError: If it is longer than the model takes, with ``continuation`` tokens that will follow it.
            ValueError: If the prompt has another number of placeholders than images.
        """
        self.tokenizer.check_placeholders(row, len(images))
        expanded = len(row) + sum(len(image.token_ids) - 1 for image in images)
        check_length(self.transformer, expanded + continuation)

    def group(self, members: Sequence[tuple[list[int], list[ImageFeatures]]]) -> PromptGroup:
        """Cut prompts (token ids and images) where their tokens or images begin to differ."""
        rows = [row for row, _ in members]
        # The first and the last in order share the least.
        low, high = min(rows), max(rows)
        shared = next((index for index, (left, right) in enumerate(zip(low, high)) if left != right), len(low))
        shared = min(shared, min(map(len, rows)) - 1) if len(rows) > 1 else 0
        placeholders = [index for index, token in enumerate(low[:shared]) if token == self.tokenizer.image_token_id]
        first = members[0][1]
        alike = next(
            (
                number
                for number in range(len(placeholders))
                if any(images[number] is not first[number] for _, images in members)
            ),
            len(placeholders),
        )
        shared = min([shared, *placeholders[alike : alike + 1]])
        prefix = self._prompt(rows[0][:shared], first[:alike])
        return PromptGroup(prefix, [self._prompt(row[shared:], images[alike:]) for row, images in members])

    def _prompt(self, row: list[int], images: list[ImageFeatures]) -> Prompt:
        if not images:
            return Prompt(row)
        token_ids, starts = self.tokenizer.expand(row, [image.token_ids for image in images])
        return Prompt(token_ids, images, starts)


def readable_images(images: Sequence[ImageFeatures | BadImageError]) -> list[ImageFeatures]:
    """Return the images of a prompt, or raise the :class:`BadImageError` of one that cannot be read."""
    for image in images:
        if isinstance(image, BadImageError):
            raise image
    return [image for image in images if isinstance(image, ImageFeatures)]


class WholePromptEncoder:
    """Features of whole prompts for the model's own forward, without sharing."""

    def __init__(self, transformer: Transformer, template: str, image_options: dict[str, object]) -> None:
        self.transformer = transformer
        self.template = template
        self.image_options = image_options
        self.query_first = query_comes_first(transformer.processor, template)

    def features(self, pairs: Sequence[Pair]) -> Features:
        """Make the features of one forward pass.

        Raises:
            BadImageError: If an image or a video cannot be decoded.
            PromptTooLongError: If a prompt is longer than the model takes.
            ValueError: If there is a video, which the model or the template does not take.
        """
        if has_video(pairs):
            raise_without_video(self.transformer.processor, self.template)
        features = self.transformer.preprocess(
            # Images are taken in the order of the messages, whatever the order of the template.
            [conversation(query, [candidate])[:: 1 if self.query_first else -1] for query, candidate in pairs],
            processing_kwargs={
                "text": {"truncation": False},
                "image": self.image_options,
                "chat_template": {"chat_template": self.template},
            },
        )
        check_length(self.transformer, int(features["attention_mask"].sum(1).max()))
        return features
