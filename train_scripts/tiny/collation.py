"""Turns lessons of the embedded default into model inputs; judgements that share a beginning are packed into a row."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2VLProcessor

from train_scripts.tiny.curriculum import Example
from train_scripts.tiny.summaries import IGNORED, TURN, Summary, collate_answers


def _positions(row: list[int], parts: list[int], image_id: int, sides: list[tuple[int, int]]) -> torch.Tensor:
    """M-RoPE positions, shape (3, length): every part goes on where part 0, the beginning, ends."""
    places, place, end, part, picture, index = [], 0, 0, 0, 0, 0
    while index < len(row):
        if parts[index] != part:
            end = end if part else place
            part, place = parts[index], end
        if row[index] == image_id:
            height, width = sides[picture]
            places += [(place, place + r, place + c) for r in range(height) for c in range(width)]
            place += max(height, width)
            index += height * width
            picture += 1
        else:
            places.append((place, place, place))
            place += 1
            index += 1
    return torch.tensor(places).T


def collate(examples: list[Example], processor: Qwen2VLProcessor) -> dict[str, Any]:
    """Model inputs and labels of a batch; only what has to be answered is a label.

    Returns:
        ``input_ids``, ``labels`` of shape (batch, length), padded on the right; ``attention_mask`` of shape (batch, 1,
        length, length), true where a position (row) sees another (column); ``position_ids`` of shape (3, batch,
        length); ``mm_token_type_ids``; and ``pixel_values``, ``image_grid_thw`` of all pictures in order.
    """
    tokenizer = processor.tokenizer
    pictures = [image for example in examples for image in example.images]
    vision = processor.image_processor(images=pictures, return_tensors="pt") if pictures else {}
    side = processor.image_processor.merge_size
    sides = [(int(h) // side, int(w) // side) for _, h, w in vision["image_grid_thw"]] if pictures else []
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    rows, used = [], 0
    for example in examples:
        row: list[int] = []
        labels: list[int] = []
        parts: list[int] = []
        first = used
        for part, (said, answered) in enumerate([(example.beginning, ""), *example.turns]):
            prompt: list[int] = []
            for token in tokenizer.encode(said, add_special_tokens=False):
                if token == image_id:
                    height, width = sides[used]
                    prompt += [token] * (height * width)
                    used += 1
                else:
                    prompt.append(token)
            answer = tokenizer.encode(f"{answered}<|im_end|>", add_special_tokens=False) if answered else []
            row += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
            parts += [part if example.beginning else 0] * (len(prompt) + len(answer))
        rows.append((row, labels, parts, _positions(row, parts, image_id, sides[first:used])))
    width = max(len(row) for row, *_ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    batch = {"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}
    places = torch.zeros(3, len(rows), width, dtype=torch.long)
    part_of = torch.full_like(ids, -1)
    for index, (row, labels, parts, positions) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        batch["labels"][index, : len(row)] = torch.tensor(labels)
        part_of[index, : len(row)] = torch.tensor(parts)
        places[:, index, : len(row)] = positions
    seen = (part_of[:, None, :] == 0) | (part_of[:, None, :] == part_of[:, :, None])
    mask = (seen & torch.ones(width, width, dtype=torch.bool).tril())[:, None]
    types = (ids == image_id).long()
    return {**batch, "attention_mask": mask, "position_ids": places, "mm_token_type_ids": types, **vision}


def collate_summaries(examples: list[Summary], processor: Qwen2VLProcessor) -> dict[str, Any]:
    """What :func:`~train_scripts.tiny.summaries.summary_loss` takes: items, where each ends, and the answers about them."""
    items = collate([Example(example.images, [(f"{example.said}{TURN}", "")]) for example in examples], processor)
    del items["labels"]
    ends = (items["input_ids"] != processor.tokenizer.pad_token_id).sum(dim=1) - 1
    return {"items": items, "last": ends, "answers": collate_answers(examples, processor)}
