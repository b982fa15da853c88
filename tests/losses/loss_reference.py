"""Reference of the embedding losses from the papers' formulas: plain loops in float64, one cosine at a time.

Nothing here is shared with the library, and no log-space trick is used: in float64, at the temperatures tested, the
literal exponentials neither overflow nor vanish.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def softmax(values: list[Tensor], temperature: float) -> list[Tensor]:
    exponentials = [torch.exp(value / temperature) for value in values]
    return [value / torch.stack(exponentials).sum() for value in exponentials]


def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
    return torch.stack([a * torch.log(a / b) for a, b in zip(p, q)]).sum()


def similarity_distillation(
    texts: Tensor, teachers: Tensor, temperature: float, direction: str, mask_diagonal: bool
) -> Tensor:
    rows = []
    for i in range(len(texts)):
        others = [j for j in range(len(texts)) if j != i or not mask_diagonal]
        student = softmax([cosine(texts[i], texts[j]) for j in others], temperature)
        teacher = softmax([cosine(teachers[i], teachers[j]) for j in others], temperature)
        rows.append(kl(teacher, student) if direction == "teacher_student" else kl(student, teacher))
    return torch.stack(rows).mean()


def hard_negative_ranking(columns: list[Tensor], temperature: float, margin: float, num_negatives: int) -> Tensor:
    queries, positives, *negatives = columns
    rows = []
    for i, query in enumerate(queries):
        positive = cosine(query, positives[i])
        candidates = [cosine(query, other) for j, other in enumerate(positives) if j != i]
        candidates += [cosine(query, other) for column in negatives for other in column]
        left = sorted((c for c in candidates if not c > positive + margin), key=Tensor.item, reverse=True)[
            :num_negatives
        ]
        if not left:
            rows.append(positive * 0.0)
            continue
        chosen = [left[n % len(left)] for n in range(num_negatives)]
        rows.append(-torch.log(softmax([positive, *chosen], temperature)[0]))
    return torch.stack(rows).mean()


def soft_label_distillation(
    columns: list[Tensor],
    scores: Tensor,
    temperature: float,
    divergence: str,
    label_temperature: float,
    in_batch_weight: float,
) -> Tensor:
    queries, *documents = columns
    rows = []
    for i, query in enumerate(queries):
        p = softmax([cosine(query, column[i]) for column in documents], temperature)
        q = softmax(list(scores[i]), label_temperature)
        if divergence == "symmetric_kl":
            row = (kl(p, q) + kl(q, p)) / 2
        elif divergence == "kl":
            row = kl(q, p)
        else:
            m = [(a + b) / 2 for a, b in zip(p, q)]
            row = (kl(p, m) + kl(q, m)) / 2
        if in_batch_weight:
            own = documents[0][i]
            others = [column[j] for column in documents for j in range(len(queries)) if j != i]
            others = [other for other in others if not torch.equal(other, own)]
            pool = softmax([cosine(query, other) for other in [own, *others]], temperature)
            row = row - in_batch_weight * torch.log(pool[0])
        rows.append(row)
    return torch.stack(rows).mean()


def random_rows(seed: int, *shape: int) -> Tensor:
    """Random float64 rows whose norms differ from 1, so that the normalization inside the losses counts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * (1.0 + seed % 3) / math.sqrt(shape[-1])
