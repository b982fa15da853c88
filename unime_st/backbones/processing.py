"""Mixin of our processors: the image rule of a recipe, and truncation that keeps the end of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, TokenizersBackend
from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING

from unime_st.backbones.image_rules import prepare_image
from unime_st.backbones.video_frames import UNIME_LIMITS, FrameLimits, flat_videos, resize_frames
from unime_st.recipes.recipe import ImageRule, RuleFields

Message = dict[str, Any]
Chat = list[Message]
_RULE_OPTIONS = ("image_rule", "image_size", "image_backend")


class UniMEProcessorMixin:
    """Mixin for a transformers processor; comes before it in the list of bases.

    The processor configuration holds three fields more: ``image_rule`` (:class:`~unime_st.recipes.ImageRule` as a
    dict), ``image_size`` and ``image_backend``. All three can be overridden when loading, e.g.
    ``SentenceTransformer(folder, processor_kwargs={"image_size": 336})``.
    """

    tokenizer: Any
    image_processor: Any
    image_token: str
    image_token_id: int
    own_image_processor_class: Any = None  # for families whose image processor transformers lacks

    def set_image_rule(
        self, image_rule: RuleFields | None, image_size: str | int | None, image_backend: str | None
    ) -> None:
        """Set how images are prepared.

        Args:
            image_rule: Fields of :class:`~unime_st.recipes.ImageRule`; None is the default rule.
            image_size: ``"official"``, ``"training"``, ``"native"`` or the side of a square in pixels.
            image_backend: ``"pil"`` or ``"torchvision"``; None takes the backend of the rule.
        """
        rule = ImageRule(**(image_rule or {}))
        self._rule, self._side = rule, rule.side(image_size)
        self.image_rule = asdict(rule)
        self.image_size = "official" if image_size is None else image_size
        self.image_backend = image_backend or rule.backend
        self.set_frame_limits(UNIME_LIMITS)

    def set_frame_limits(self, limits: FrameLimits) -> None:
        """Set the sizes of the frames of videos, for families that take videos."""
        resize_frames(self, limits)

    @property
    def image_side(self) -> int | None:
        """Side in pixels of the square that images are squashed to, None where they keep their shape."""
        return self._side

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[object]:
        """Load the parts, the image processor in the backend that the recipe asks for."""
        stored = processor_dict or {}
        rule = ImageRule(**(kwargs.get("image_rule") or stored.get("image_rule") or {}))
        backend = kwargs.get("image_backend") or stored.get("image_backend") or rule.backend
        if backend not in ("pil", "torchvision"):
            raise ValueError(f"image_backend {backend!r}: use 'pil' or 'torchvision'.")
        kwargs = {key: value for key, value in kwargs.items() if key not in _RULE_OPTIONS}
        parts = []
        for name in cls.get_attributes():  # type: ignore[attr-defined]
            if name == "tokenizer":
                # The official numbers come from tokenizer.json as it is. AutoTokenizer would rebuild some tokenizers
                # from their vocabulary, with other rules for spaces.
                whole = Path(pretrained_model_name_or_path, "tokenizer.json").is_file()
                kind = TokenizersBackend if whole else AutoTokenizer
                parts.append(kind.from_pretrained(pretrained_model_name_or_path, **kwargs))
            elif name == "image_processor" and cls.own_image_processor_class is not None:
                parts.append(cls.own_image_processor_class.from_pretrained(pretrained_model_name_or_path, **kwargs))
            else:
                auto = MODALITY_TO_AUTOPROCESSOR_MAPPING[name]
                chosen = {"backend": backend} if name == "image_processor" else {}
                parts.append(auto.from_pretrained(pretrained_model_name_or_path, **kwargs, **chosen))
        return parts

    def prepare_inputs_layout(
        self, images: object = None, text: object = None, videos: object = None, audio: object = None, **kwargs: object
    ) -> object:
        """Apply the image rule before anything else sees the images."""
        return super().prepare_inputs_layout(  # type: ignore[misc]
            images=self._prepare(images), text=text, videos=videos, audio=audio, **kwargs
        )

    def _prepare(self, images: object) -> object:
        if images is None:
            return None
        if isinstance(images, (list, tuple)):
            return [self._prepare(image) for image in images]
        return prepare_image(images, self._rule, self._side)

    def count_placeholders(self, text: str) -> int:
        """Number of image placeholders in a rendered text."""
        return text.count(self.image_token)

    def image_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Boolean mask of the image tokens."""
        return input_ids == self.image_token_id

    def images_per_row(self, images: Any, texts: list[str]) -> list[list[object]]:
        """Images of every row, one for each placeholder in its text, from None, one list per row, or a flat list.

        Raises:
            ValueError: Images and placeholders of a row do not match; the message names the row.
        """
        counts = [self.count_placeholders(text) for text in texts]
        if images is None:
            images = [[] for _ in texts]
        elif not isinstance(images, (list, tuple)):
            images = [images]
        if not all(isinstance(row, (list, tuple)) for row in images):
            flat, images = iter(images), []
            images = [[pil_image for _, pil_image in zip(range(count), flat)] for count in counts]
        for index, (row, count) in enumerate(zip(images, counts)):
            if len(row) != count:
                raise ValueError(
                    f"Row {index} of the batch has {len(row)} images and {count} image placeholders in its text. "
                    "Remove the placeholder from the text, or give the image."
                )
        return [list(row) for row in images]

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Process images and rendered text, see :class:`transformers.ProcessorMixin`."""
        if text is not None:
            rows = [text] if isinstance(text, str) else list(text)
            self.images_per_row(images, rows)
            self._check_videos(kwargs.get("videos"), rows)
        features: BatchFeature = super().__call__(images=images, text=text, **kwargs)  # type: ignore[misc]
        if "batch_num_images" in features and isinstance(text, list) and len(features["batch_num_images"]) < len(text):
            # One count per row, zeros included: whoever cuts a mixed batch into mini-batches slices rows.
            features["batch_num_images"] = torch.tensor([len(row) for row in images])
        return features

    def _check_videos(self, videos: object, texts: list[str]) -> None:
        """Raise a ValueError for videos that the chat template has dropped."""
        if videos is None:
            return
        found = sum(text.count(getattr(self, "video_token", "<video>")) for text in texts)
        if found != (given := len(list(flat_videos(videos)))):
            raise ValueError(
                f"The batch has {given} videos and {found} video placeholders in its texts. A chat template without a "
                "video slot drops videos: convert the checkpoint again, or remove the placeholder from the text."
            )

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Render and process chats; the end of the prompt is restored in truncated rows with images.

        The embedding is read at the last token. Sentence Transformers restores the end of the prompt in rows of text
        only, so an over-long row with an image would be read at some word of its text.
        """
        if conversation and isinstance(conversation[0], (list, tuple)):
            conversation = [_without_absent_parts(_unwrap(chat)) for chat in conversation]
        output = super().apply_chat_template(conversation, *args, **kwargs)  # type: ignore[misc]
        text_kwargs = (kwargs.get("processor_kwargs") or {}).get("text_kwargs") or {}
        if not isinstance(output, BatchFeature) or not text_kwargs.get("truncation"):
            return output
        limit = text_kwargs.get("max_length") or self.tokenizer.model_max_length
        if output["attention_mask"].shape[-1] >= limit:
            template_kwargs = {
                key: value for key, value in kwargs.items() if key not in ("tokenize", "return_dict", "return_tensors")
            }
            _restore_tails(self, conversation, output, limit, template_kwargs)
        return output


def _unwrap(chat: Sequence[Message]) -> Chat:
    """Unwrap chats that Sentence Transformers put into one more message, as it does in a batch with other inputs."""
    flat = []
    for message in chat:
        content = message["content"] if isinstance(message.get("content"), list) else []
        inner = [part["message"] for part in content if part.get("type") == "message"]
        for messages in inner or [[message]]:
            flat += [dict(entry) for entry in messages]
    return flat


def _without_absent_parts(chat: Chat) -> Chat:
    """Remove parts that are None, as rows of a struct column have them: ``{"image": image, "text": None}``."""
    for message in chat:
        if isinstance(message.get("content"), list):
            message["content"] = [part for part in message["content"] if part.get(part.get("type"), part) is not None]
    return chat


def _restore_tails(
    processor: Any, conversations: Any, features: BatchFeature, limit: int, template_kwargs: dict[str, Any]
) -> None:
    """Write the end of the prompt over the last tokens of truncated rows with images or videos, in place."""
    if not isinstance(conversations[0], (list, tuple)):
        conversations = [conversations]
    mask = features["attention_mask"]
    for row, conversation in enumerate(conversations):
        if int(mask[row].sum()) < limit or not _has_media(conversation):
            continue
        tail = _tail_tokens(processor, conversation, template_kwargs)
        if not tail:
            continue
        last = int(mask[row].nonzero()[-1]) + 1
        index = slice(last - len(tail), last)
        media_tokens = processor.image_mask(features["input_ids"][row])
        if (video_token := getattr(processor, "video_token_id", None)) is not None:
            media_tokens |= features["input_ids"][row] == video_token
        if len(tail) >= limit or bool(media_tokens[index].any()):
            raise ValueError(
                f"Row {row} of the batch has {int(media_tokens.sum())} image and video tokens, which leaves no "
                f"room for the end of its prompt within {limit} tokens. Raise max_seq_length, or use smaller images or "
                "fewer frames."
            )
        features["input_ids"][row, index] = torch.tensor(tail)


def _has_media(conversation: Chat) -> bool:
    contents = [message["content"] for message in conversation if isinstance(message["content"], list)]
    return any(part.get("type") in ("image", "video") for content in contents for part in content)


def _tail_tokens(processor: Any, conversation: Chat, template_kwargs: dict[str, Any]) -> list[int]:
    """Tokens at the end of the rendered prompt that do not depend on the text: those that two renderings share."""
    renders = []
    for filler in ("0", "1 2 3 4"):
        skeleton = [_with_text(message, filler) for message in conversation]
        text = super(UniMEProcessorMixin, processor).apply_chat_template(
            [skeleton], tokenize=False, **{k: v for k, v in template_kwargs.items() if k != "processor_kwargs"}
        )[0]
        renders.append(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    first, second = renders
    same = 0
    while same < min(len(first), len(second)) and first[-1 - same] == second[-1 - same]:
        same += 1
    return first[len(first) - same :] if same < min(len(first), len(second)) else []


def _with_text(message: Message, filler: str) -> Message:
    if message["role"] == "system":
        return message
    if isinstance(message["content"], str):
        return {**message, "content": filler}
    placeholder = Image.new("RGB", (1, 1))
    content = []
    for part in message["content"]:
        kind = part.get("type")
        content.append({"type": "text", "text": filler} if kind == "text" else {"type": kind, kind: placeholder})
    return {**message, "content": content}
