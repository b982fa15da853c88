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
    margin: float | None = None,
    hardness: float = 0.0,
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
            positive = cosine(query, own)
            similarities = [cosine(query, other) for other in others]
            kept = [s for s in similarities if margin is None or not s > positive + margin]
            parts = [torch.exp(s / temperature + hardness * s.item()) for s in kept]
            top = torch.exp(positive / temperature)
            row = row - in_batch_weight * torch.log(top / torch.stack([top, *parts]).sum())
        rows.append(row)
    return torch.stack(rows).mean()


def info_nce(
    columns: list[Tensor],
    temperature: float,
    margin: float | None = None,
    directions: tuple[str, ...] = ("query_to_doc",),
    hardness: tuple[str, float] = ("in_batch_negatives", 0.0),
    per_direction: bool = False,
) -> Tensor:
    queries, *documents = columns
    size = len(queries)
    rows = []
    for i, query in enumerate(queries):
        own = documents[0][i]
        positive = cosine(query, own)
        equal = lambda other, own=own: bool(cosine(other, own) > 1 - 1e-5)
        # Per direction: (similarity, hardness, is a false negative by its document).
        terms: dict[str, list[tuple[Tensor, float, bool]]] = {name: [] for name in directions}
        for number, column in enumerate(documents):
            for j, other in enumerate(column):
                if number == 0 and j == i:
                    continue
                weighted = {"in_batch_negatives": j != i, "hard_negatives": j == i, "all_negatives": True}[hardness[0]]
                similarity = cosine(query, other)
                terms["query_to_doc"].append((similarity, hardness[1] * weighted * similarity.item(), equal(other)))
                if "doc_to_doc" in directions and j != i:
                    terms["doc_to_doc"].append((cosine(own, other), 0.0, equal(other)))
        for j in range(size):
            if j == i:
                continue
            if "query_to_query" in directions:
                terms["query_to_query"].append((cosine(query, queries[j]), 0.0, equal(documents[0][j])))
            if "doc_to_query" in directions:
                terms["doc_to_query"].append((cosine(own, queries[j]), 0.0, equal(documents[0][j])))
        sums = {}
        for name, found in terms.items():
            kept = [(s, h) for s, h, same in found if margin is None or not (same or s > positive + margin)]
            parts = [torch.exp(s / temperature + h) for s, h in kept]
            parts += [torch.exp(positive / temperature)] if name in ("query_to_doc", "doc_to_query") else []
            sums[name] = torch.stack(parts).sum() if parts else positive * 0.0
        top = torch.log(torch.exp(positive / temperature))
        if per_direction:
            rows.append(torch.stack([torch.log(value) for value in sums.values()]).mean() - top)
        else:
            rows.append(torch.log(torch.stack(list(sums.values())).sum()) - top)
    return torch.stack(rows).mean()


def random_rows(seed: int, *shape: int) -> Tensor:
    """Random float64 rows whose norms differ from 1, so that the normalization inside the losses counts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * (1.0 + seed % 3) / math.sqrt(shape[-1])
