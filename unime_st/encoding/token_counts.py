"""Token counts of inputs before images are decoded, and batching by length within a budget."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from unime_st.backbones.video_frames import raise_without_video, resize_frames, times_of_frames, video_tokens
from unime_st.compat import image_token_counter
from unime_st.data.images import MAX_ASPECT
from unime_st.encoding.input_videos import VideoShape, video_shapes
from unime_st.encoding.model_inputs import texts_and_sizes

Size = tuple[int, int]

_CPU_PIXELS, _DEVICE_PIXELS = 8_000_000, 64_000_000

_MOST_FRAME_PIXELS = 1280 * 28 * 28
"""Pixels of a frame after it is resized; frames that are decoded one by one count as so many at most."""

_MEASURED_STEP = 112
"""Grid in pixels to which image sizes are rounded for processors whose token counts have to be measured."""


def decoded_pixels(shape: VideoShape) -> int:
    """Pixels of a video that are in memory at once: frames that are decoded one by one are resized before the next."""
    stored = shape.width * shape.height
    return shape.num_frames * (min(stored, _MOST_FRAME_PIXELS) if shape.one_by_one else stored)


class TokenCounter:
    """Counts the tokens of inputs after template and processor, from texts and image headers only.

    Texts are counted by the tokenizer, images and videos by the resize rule of the processor. For a processor without
    such a rule, a blank image of about the same size is processed once.

    Args:
        model: A Sentence Transformers model.
        prompt: Instruction that is added to every input. Defaults to None.
        **options: Further options of ``model.preprocess``.

    Example:
        >>> from PIL import Image
        >>> from unime_st import Item, UniME
        >>> from unime_st.encoding import TokenCounter
        >>> cost = TokenCounter(UniME("unime-tiny"))
        >>> cost([Item("a red circle"), Item(image=Image.new("RGB", (84, 84)))]).tolist()
        [5, 11]
    """

    def __init__(self, model: SentenceTransformer, prompt: str | None = None, **options: object) -> None:
        self._preprocess = model.preprocess
        self._tokenizer = model.tokenizer
        self._processor = resize_frames(copy.copy(getattr(model[0], "processor", None)))
        self._images: dict[Size, int] = {}
        probe = model.preprocess(["0"], prompt=prompt, **options)
        # From the attention mask rather than the width, because some processors pad to a multiple. A StaticEmbedding
        # has no mask: it takes the tokens of all texts in one row.
        mask = probe.get("attention_mask")
        length = probe["input_ids"].numel() if mask is None else int(mask.sum())
        self._fixed = length - len(self._tokens(["0"])[0])

    def __call__(self, inputs: Sequence[object]) -> np.ndarray:
        """Count the tokens of inputs.

        Args:
            inputs: Items or any inputs of ``SentenceTransformer.encode``.

        Returns:
            np.ndarray: int64 of shape (len(inputs),), the length of each row before padding. Exact for texts; for
            images it may differ by the few tokens that a template adds. Unreadable images count zero.
        """
        return self.measure(inputs)[0]

    def measure(self, inputs: Sequence[object]) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ...]]]:
        """Count the tokens of inputs, the pixels to decode, and the frames of each video: (len(inputs),) each.

        Raises:
            BadImageError: If a frame cannot be read, or the frames of a video differ in size.
            ValueError: If there is a video, and the model takes none.
        """
        texts: list[str] = []
        sizes: list[Size] = []
        owner_of_text, owner_of_size = [], []
        for index, value in enumerate(inputs):
            of_text, of_size = texts_and_sizes(value)
            texts += of_text
            sizes += of_size
            owner_of_text += [index] * len(of_text)
            owner_of_size += [index] * len(of_size)
        costs = np.full(len(inputs), self._fixed, dtype=np.int64)
        if texts:
            np.add.at(costs, owner_of_text, [len(ids) for ids in self._tokens(texts)])
        if sizes:
            np.add.at(costs, owner_of_size, self.image_tokens(sizes))
        pixels = np.zeros(len(inputs), dtype=np.int64)
        np.add.at(pixels, owner_of_size, [width * height for width, height in sizes])
        frames: list[tuple[int, ...]] = [()] * len(inputs)
        for index, value in enumerate(inputs):
            for shape in video_shapes(value):
                frames[index] += (shape.num_frames,)
                costs[index] += self.video_tokens(shape)
                pixels[index] += decoded_pixels(shape)
        return costs, pixels, frames

    def video_tokens(self, shape: VideoShape) -> int:
        """Count the tokens of a video of this shape."""
        raise_without_video(self._processor)
        times = times_of_frames(self._processor, shape.num_frames)
        return video_tokens(self._processor, shape[:3]) + (len(self._tokens([times])[0]) if times else 0)

    def image_tokens(self, sizes: Sequence[Size]) -> list[int]:
        """Count the tokens of images of these sizes, (width, height) in pixels."""
        sizes = [self._processed(size) for size in sizes]
        unknown = list({size for size in sizes if size not in self._images})
        if unknown:
            self._images.update(zip(unknown, self._count(unknown)))
        return [self._images[size] for size in sizes]

    def _processed(self, size: Size) -> Size:
        """Size at which an image is given to the image processor."""
        width, height = size
        if (side := getattr(self._processor, "image_side", None)) is not None:
            return side, side
        shortest = -(-max(width, height) // MAX_ASPECT)
        width, height = max(width, shortest, 1), max(height, shortest, 1)
        if image_token_counter(self._processor) is not None:
            return width, height
        return -(-width // _MEASURED_STEP) * _MEASURED_STEP, -(-height // _MEASURED_STEP) * _MEASURED_STEP

    def _count(self, sizes: list[Size]) -> list[int]:
        if (count := image_token_counter(self._processor)) is not None:
            return count([[height, width] for width, height in sizes])
        blanks = ([{"image": Image.new("RGB", size)}] for size in sizes)
        return [int(self._preprocess(blank)["attention_mask"].sum()) - self._fixed for blank in blanks]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        if isinstance(self._tokenizer, Tokenizer):  # that of a StaticEmbedding
            return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def pack(costs: npt.ArrayLike, budget: int, *, tolerance: float = 0.8, least: int = 512) -> list[np.ndarray]:
    """Group rows into padded batches of similar length within a token budget, longest rows first.

    Args:
        costs: Number of tokens of each row, of shape (n,).
        budget: Maximum number of tokens of a batch, padding included. A longer row forms a batch of its own.
        tolerance: Minimum length of a row relative to the longest row of its batch. Defaults to 0.8.
        least: Batches below this number of tokens are filled with shorter rows, because every forward pass has a fixed
            cost. Defaults to 512.

    Returns:
        list[np.ndarray]: Indices of the rows of each batch; every row occurs once.

    Raises:
        ValueError: If the budget is not positive.

    Example:
        >>> from unime_st.encoding import pack
        >>> [batch.tolist() for batch in pack([3, 100, 4, 90, 3], budget=200, least=10)]
        [[1, 3], [2, 0, 4]]
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    sizes = np.asarray(costs, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    falling = np.maximum(sizes[order], 1)
    batches, start = [], 0
    while start < len(order):
        longest = int(falling[start])
        fitting = max(1, budget // longest)
        alike = int(np.searchsorted(-falling, -tolerance * longest, side="right")) - start
        end = start + min(fitting, max(alike, -(-least // longest)))
        batches.append(order[start:end])
        start = end
    return batches


def even_budget(costs: Sequence[int], budget: int, turns: int, *, least: int = 32) -> int:
    """Lower a budget so that the batches that run side by side are even, and a few rows keep all threads busy.

    Args:
        costs: Tokens or pixels of each row.
        budget: Maximum of a batch.
        turns: Number of batches that run side by side.
        least: Batches below this number are not made smaller. Defaults to 32.

    Returns:
        int: At most ``budget``.

    Example:
        >>> from unime_st.encoding.token_counts import even_budget
        >>> even_budget([100] * 7, budget=1000, turns=2)  # four rows and three
        449
    """
    total, longest = sum(costs), max(costs)
    if turns == 1 or total < turns * least:
        return budget
    batches = -(-total // (budget * turns)) * turns
    return min(budget, -(-total // batches) + longest - 1)


def pixel_budget(*devices: torch.device) -> int:
    """Maximum number of stored pixels of the images in a batch, which bounds the memory for decoded images.

    8 million if all devices are CPUs, 64 million otherwise.
    """
    return _CPU_PIXELS if all(device.type == "cpu" for device in devices) else _DEVICE_PIXELS


def split_by_pixels(batches: Iterable[np.ndarray], pixels: npt.ArrayLike, limit: int) -> list[np.ndarray]:
    """Split batches whose decoded images would take too much memory.

    Args:
        batches: Indices of the rows of each batch.
        pixels: Number of stored pixels of each row, of shape (n,).
        limit: Maximum number of pixels of a batch. A larger row forms a batch of its own.

    Returns:
        list[np.ndarray]: Batches with the same indices in the same order.

    Example:
        >>> import numpy as np
        >>> from unime_st.encoding import split_by_pixels
        >>> [batch.tolist() for batch in split_by_pixels([np.array([2, 0]), np.array([1, 3])], [5, 0, 4, 9], limit=9)]
        [[2, 0], [1, 3]]
        >>> [batch.tolist() for batch in split_by_pixels([np.array([2, 0]), np.array([1, 3])], [5, 0, 4, 9], limit=8)]
        [[2], [0], [1], [3]]
    """
    counts = np.asarray(pixels, dtype=np.int64)
    parts = []
    for batch in batches:
        start = held = 0
        for index, count in enumerate(counts[batch].tolist()):
            if index > start and held + count > limit:
                parts.append(batch[start:index])
                start, held = index, 0
            held += count
        parts.append(batch[start:])
    return parts
