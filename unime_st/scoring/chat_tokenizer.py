"""Chat tokenizer: token ids of rendered prompts, and the tokens and tensors of the images in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from PIL import Image
from sentence_transformers.base.modules import Transformer
from transformers import PreTrainedTokenizerBase

from unime_st.backbones.visual_outputs import GRID, PIXELS

IMAGES_PER_PROMPT = "batch_num_images"


class PromptTooLongError(ValueError):
    """A prompt has more tokens than the model takes, so its end, where the answer is read, would be cut off."""


class ChatTokenizer:
    """Tokenizes rendered prompts and processes their images apart from them.

    The token ids equal those of :meth:`sentence_transformers.base.modules.Transformer.preprocess`: a prompt is
    tokenized with one placeholder per image, which :meth:`expand` replaces by the image's own tokens.

    Attributes:
        independent_images: Whether an image gives the same tensors whatever else is in the batch, and images are
            joined by concatenation, as with the processors of Qwen-VL.
        counts_images: Whether the processor treats the images of a prompt with several images differently from a
            single one (LLaVA-OneVision).
        image_ids: Token ids of a sample image, with what the processor wraps around it.

    Example:
        >>> from unime_st import UniMEReranker
        >>> from unime_st.scoring.chat_tokenizer import ChatTokenizer
        >>> tokenizer = ChatTokenizer(UniMEReranker("unime-tiny", template="tiny")[0])
        >>> tokenizer.independent_images, len(tokenizer.tokenize(["a red square", "blue"]))
        (True, 2)
    """

    def __init__(self, transformer: Transformer, image_options: Mapping[str, object] | None = None) -> None:
        self.transformer = transformer
        self.processor: Any = transformer.processor
        self.tokenizer = cast(PreTrainedTokenizerBase, transformer.tokenizer)
        self.image_token_id: int = self.processor.image_token_id
        if image_options is None:
            image_options = transformer.processing_kwargs.get("image", {})
        self.image_options = dict(image_options)
        self._has_types = False
        (self.image_ids,), tensors = self.process_images([Image.new("RGB", (56, 56))])
        self.independent_images = tensors.keys() == {PIXELS, GRID}
        self.counts_images = IMAGES_PER_PROMPT in tensors

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts with one placeholder per image, without padding."""
        # As ProcessorMixin.apply_chat_template: a template that writes the first token itself must not get two.
        bos = self.tokenizer.bos_token
        special = not (bos is not None and prompts[0].startswith(bos))
        return self.tokenizer(list(prompts), add_special_tokens=special, return_attention_mask=False)["input_ids"]

    def process_images(
        self, images: Sequence[Image.Image], per_prompt: int = 1
    ) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        """Run the processor on prompts that hold nothing but ``per_prompt`` decoded images each.

        Returns:
            Token ids of each prompt, and the tensors of the image processor.
        """
        starts = range(0, len(images), per_prompt)
        out = self.processor(
            text=[self.processor.image_token * per_prompt for _ in starts],
            images=[list(images[start : start + per_prompt]) for start in starts],
            images_kwargs=self.image_options,
            text_kwargs={"add_special_tokens": False, "padding": True},
            common_kwargs={"return_tensors": "pt"},
        )
        self._has_types = "mm_token_type_ids" in out
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(out["input_ids"], out["attention_mask"], strict=True)]
        names = {*self.processor.image_processor.model_input_names, IMAGES_PER_PROMPT}
        return rows, {name: out[name] for name in names if name in out}

    def expand(self, token_ids: Sequence[int], images: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Replace the placeholder of each image by the image's own tokens.

        Returns:
            The expanded token ids, and where the tokens of each image begin.

        Raises:
            ValueError: If the prompt has another number of placeholders than there are images.
        """
        self.check_placeholders(token_ids, len(images))
        expanded: list[int] = []
        starts: list[int] = []
        waiting = iter(images)
        for token in token_ids:
            if token == self.image_token_id:
                starts.append(len(expanded))
                expanded += next(waiting)
            else:
                expanded.append(token)
        return expanded, starts

    def check_placeholders(self, token_ids: Sequence[int], images: int) -> None:
        """Raise a ValueError if a prompt has another number of placeholders than images."""
        found = token_ids.count(self.image_token_id)
        if found != images:
            raise ValueError(f"the prompt has {found} image placeholders for {images} images")

    def pad(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Pad expanded prompts on the left: ``input_ids`` and ``attention_mask`` of shape (rows, longest).

        ``mm_token_type_ids`` are added where the processor makes them.
        """
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, width - len(row) :] = torch.tensor(row)
            attention_mask[index, width - len(row) :] = 1
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._has_types:
            features["mm_token_type_ids"] = (input_ids == self.image_token_id).long() * attention_mask
        return features


def check_length(transformer: Transformer, tokens: int) -> None:
    """Raise a :class:`PromptTooLongError` if a prompt of so many tokens would have to be cut."""
    limit = transformer.max_seq_length
    if limit is not None and tokens > limit:
        raise PromptTooLongError(f"the prompt has {tokens} tokens, the model takes at most {limit}: shorten the text")
