"""Processor of Phi-3.5-Vision: text around images, tokenized piece by piece as in the published code."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from unime_st.backbones.phi3_v.image_processing import UniMEPhi3VImageProcessor
from unime_st.backbones.processing import UniMEProcessorMixin
from unime_st.recipes.recipe import RuleFields

_PLACEHOLDER = re.compile(r"<\|image_\d+\|>")


class UniMEPhi3VProcessor(UniMEProcessorMixin, ProcessorMixin):
    """Processor of Phi-3.5-Vision with the image rule of a recipe, see :class:`UniMEProcessorMixin`.

    Every piece of text between two images is tokenized on its own, so it begins with the tokenizer's prefix. The model
    was trained so.
    """

    own_image_processor_class = UniMEPhi3VImageProcessor

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        image_rule: RuleFields | None = None,
        image_size: str | int | None = None,
        image_backend: str | None = None,
    ) -> None:
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.set_image_rule(image_rule, image_size, image_backend)

    def count_placeholders(self, text: str) -> int:
        """Number of image placeholders in a rendered text."""
        return len(_PLACEHOLDER.findall(text))

    def image_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Boolean mask of the image tokens."""
        return input_ids < 0

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Process a batch of rendered prompts with ``<|image_1|>``, ``<|image_2|>``, ... and images, one list per row.

        Raises:
            ValueError: Placeholders and images do not match, or truncation would cut image tokens.
        """
        texts = [text] if isinstance(text, str) else list(text)
        rows = self.images_per_row(images, texts)
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        options = merged["text_kwargs"]
        data: dict[str, Any] = {}
        pil_images = [pil_image for row in rows for pil_image in row]
        if pil_images:
            data.update(self.image_processor(self._prepare(pil_images)))
        tokens = iter([self._num_tokens(height, width) for height, width in data.get("image_sizes", [])])
        limit = None
        if options.get("truncation"):
            limit = options.get("max_length") or self.tokenizer.model_max_length
        ids = [
            self._tokenize(prompt, [next(tokens) for _ in row], limit, index, options.get("add_special_tokens", True))
            for index, (prompt, row) in enumerate(zip(texts, rows))
        ]
        if options.get("padding"):
            padded = self.tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt")
            data.update(padded)
            return BatchFeature(data)
        data.update(input_ids=ids, attention_mask=[[1] * len(row) for row in ids])
        return BatchFeature(data, tensor_type=options.get("return_tensors"))

    def _num_tokens(self, height: int, width: int) -> int:
        size = self.image_processor.crop_size
        side = size // 28  # two patches of 14 pixels
        rows, columns = int(height) // size, int(width) // size
        return rows * side * (columns * side + 1) + 1 + side * (side + 1)

    def _tokenize(self, prompt: str, counts: list[int], limit: int | None, index: int, special: bool) -> list[int]:
        pieces = _PLACEHOLDER.split(prompt)
        ids: list[int] = list(self.tokenizer(pieces[0], add_special_tokens=special)["input_ids"])
        for number, (piece, count) in enumerate(zip(pieces[1:], counts), start=1):
            ids += [-number] * count
            ids += self.tokenizer(piece, add_special_tokens=special)["input_ids"]
        if limit is not None and len(ids) > limit:
            if any(token < 0 for token in ids[limit:]):
                raise ValueError(
                    f"Row {index} has {sum(counts)} image tokens, which do not fit into {limit} tokens. Raise "
                    "max_seq_length or use a smaller image size."
                )
            ids = ids[:limit]
        return ids
