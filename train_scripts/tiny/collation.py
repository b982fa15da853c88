"""Collation of the pre-training examples of `unime-tiny`; judgements that share a prefix are packed into one row."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2VLProcessor

from train_scripts.tiny.summaries import IGNORED, TURN, Summary, collate_answers
from train_scripts.tiny.telling_apart import Example


def _positions(row: list[int], parts: list[int], image_id: int, sides: list[tuple[int, int]]) -> torch.Tensor:
    """M-RoPE positions, shape (3, length): every part continues from the end of part 0, the prefix."""
    positions, position, end, part, image, index = [], 0, 0, 0, 0, 0
    while index < len(row):
        if parts[index] != part:
            end = end if part else position
            part, position = parts[index], end
        if row[index] == image_id:
            height, width = sides[image]
            positions += [(position, position + r, position + c) for r in range(height) for c in range(width)]
            position += max(height, width)
            index += height * width
            image += 1
        else:
            positions.append((position, position, position))
            position += 1
            index += 1
    return torch.tensor(positions).T


def collate(examples: list[Example], processor: Qwen2VLProcessor) -> dict[str, Any]:
    """Model inputs and labels of a batch; only the answers have labels.

    Returns:
        ``input_ids``, ``labels`` of shape (batch, length), padded on the right; ``attention_mask`` of shape (batch, 1,
        length, length), true where a position (row) sees another (column); ``position_ids`` of shape (3, batch,
        length); ``mm_token_type_ids``; and ``pixel_values``, ``image_grid_thw`` of all images in order.
    """
    tokenizer = processor.tokenizer
    images = [image for example in examples for image in example.images]
    vision = processor.image_processor(images=images, return_tensors="pt") if images else {}
    side = processor.image_processor.merge_size
    sides = [(int(h) // side, int(w) // side) for _, h, w in vision["image_grid_thw"]] if images else []
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    rows, used = [], 0
    for example in examples:
        row: list[int] = []
        labels: list[int] = []
        parts: list[int] = []
        first = used
        for part, (text, answered) in enumerate([(example.prefix, ""), *example.turns]):
            prompt: list[int] = []
            for token in tokenizer.encode(text, add_special_tokens=False):
                if token == image_id:
                    height, width = sides[used]
                    prompt += [token] * (height * width)
                    used += 1
                else:
                    prompt.append(token)
            answer = tokenizer.encode(f"{answered}<|im_end|>", add_special_tokens=False) if answered else []
            row += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
            parts += [part if example.prefix else 0] * (len(prompt) + len(answer))
        rows.append((row, labels, parts, _positions(row, parts, image_id, sides[first:used])))
    width = max(len(row) for row, *_ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    batch = {"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}
    position_ids = torch.zeros(3, len(rows), width, dtype=torch.long)
    part_of = torch.full_like(ids, -1)
    for index, (row, labels, parts, positions) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        batch["labels"][index, : len(row)] = torch.tensor(labels)
        part_of[index, : len(row)] = torch.tensor(parts)
        position_ids[:, index, : len(row)] = positions
    seen = (part_of[:, None, :] == 0) | (part_of[:, None, :] == part_of[:, :, None])
    mask = (seen & torch.ones(width, width, dtype=torch.bool).tril())[:, None]
    types = (ids == image_id).long()
    return {**batch, "attention_mask": mask, "position_ids": position_ids, "mm_token_type_ids": types, **vision}


def collate_summaries(examples: list[Summary], processor: Qwen2VLProcessor) -> dict[str, Any]:
    """Inputs of :func:`~train_scripts.tiny.summaries.summary_loss`: items, positions of their last tokens, and answers."""
    items = collate([Example(example.images, [(f"{example.text}{TURN}", "")]) for example in examples], processor)
    del items["labels"]
    ends = (items["input_ids"] != processor.tokenizer.pad_token_id).sum(dim=1) - 1
    return {"items": items, "last": ends, "answers": collate_answers(examples, processor)}
