"""Judge calibration: AUC, accuracy, ECE and agreement of judges, and their best pair order, on a labeled sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from unime_st.data.logits import to_scores
from unime_st.files import Json
from unime_st.retrieval.mining import Pools
from unime_st.scoring.groups import Group, Judge, PairOrder, orders_of

_KINDS = ("positive", "random", "hard")
LEAST_AUC = 0.6
"""AUC on mined candidates below which a judge's labels are little better than chance."""
LOW_AUC_ADVICE = (
    "Its labels are little better than chance there: turn the pair (--pair_order), trust the pairs more than the judge "
    "(--min_positive_score 1), or take another judge."
)


def calibration_groups(pools: Pools, queries: int = 200, *, seed: int = 0) -> tuple[list[Group], list[list[str]]]:
    """Draw queries, each with its positive, a random negative and its hardest candidate.

    The hardest candidate counts as a negative although some of them are false negatives: a judge's figures on them are
    a lower bound, and judges are compared on the same sample.

    Returns:
        Groups, and per group the kind of each candidate: "positive", "random" or "hard".

    Raises:
        ValueError: If there are fewer than two pools.
    """
    if len(pools) < 2:
        raise ValueError(f"{pools.folder}: a sample needs at least 2 pools, found {len(pools)}")
    rng = np.random.default_rng(seed)
    groups, kinds = [], []
    for index in rng.choice(len(pools), size=min(queries, len(pools)), replace=False):
        pool = pools[int(index)]
        known = {pool.positive, *pool.candidates, pool.query}
        candidates, found = [pool.positive], ["positive"]
        for other in rng.integers(len(pools), size=20):
            drawn = pools[int(other)].positive
            if drawn not in known and drawn.modality == pool.positive.modality:
                candidates, found = [*candidates, drawn], [*found, "random"]
                break
        if pool.candidates:
            candidates, found = [*candidates, pool.candidates[0]], [*found, "hard"]
        groups.append(Group(pool.query, candidates))
        kinds.append(found)
    return groups, kinds


def calibrate(judges: Sequence[Judge], pools: Pools, queries: int = 200, *, seed: int = 0) -> Json:
    """Measure judges on one sample.

    Args:
        judges: Judges to compare.
        pools: Mined pools to draw from.
        queries: Number of queries. Defaults to 200.
        seed: Seed of the sample. Defaults to 0.

    Returns:
        dict: "sample": number of pairs of each kind; "judges": per name the AUC of positives against random, hard and
        all negatives, the accuracy of P(Yes) > 0.5, the expected calibration error (ECE), the number of pairs that
        could not be judged ("set_aside"), and the AUC against hard negatives for each combination of the modalities of
        query and candidate ("auc_hard_by_pairs"); "pair_orders": per name of a judge that can show pairs in either
        order, and per combination of modalities ("all" for all pairs), the AUC of each order and which is "best"; with
        two or more judges "agreement": per pair of names Spearman's rank correlation of the scores and the fraction of
        equal decisions.
    """
    groups, nested = calibration_groups(pools, queries, seed=seed)
    kinds = np.array([kind for row in nested for kind in row])
    modalities = np.array([f"{g.query.modality} -> {c.modality}" for g in groups for c in g.candidates])
    scores: dict[str, np.ndarray] = {}
    pair_orders: Json = {}
    for number, judge in enumerate(judges):
        name = judge.name if judge.name not in scores else f"{judge.name} ({number + 1})"
        orders = _score_orders(judge, groups)
        scores[name] = orders[getattr(judge, "pair_order", "query_first")]
        if len(orders) > 1:
            pair_orders[name] = _compare_orders(orders, kinds == "positive", modalities)
    result: Json = {
        "sample": {kind: int((kinds == kind).sum()) for kind in _KINDS},
        "judges": {
            name: {**_quality(found, kinds), "auc_hard_by_pairs": _hard_by_pairs(found, kinds, modalities)}
            for name, found in scores.items()
        },
        "pair_orders": pair_orders,
    }
    names = list(scores)
    pairs = [(left, right) for index, left in enumerate(names) for right in names[index + 1 :]]
    if pairs:
        result["agreement"] = {f"{a} / {b}": _agreement(scores[a], scores[b]) for a, b in pairs}
    return result


def _score_orders(judge: Judge, groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Log-odds of all pairs in each order; in the judge's own one if it knows no other."""
    if not hasattr(judge, "in_order"):
        return {getattr(judge, "pair_order", "query_first"): np.concatenate(judge.score(groups, errors=[]))}
    scores: dict[str, np.ndarray] = {
        order: np.concatenate(judge.in_order(order).score(groups, errors=[])) for order in orders_of("both")
    }
    return {**scores, "both": np.mean(list(scores.values()), axis=0)}


def _compare_orders(orders: Mapping[str, np.ndarray], positive: np.ndarray, modalities: np.ndarray) -> Json:
    """AUC of each order for all pairs and for each combination of modalities, with the best order."""
    judged = np.isfinite(orders["both"])
    result: Json = {}
    for name in ["all", *sorted(set(modalities.tolist()))]:
        own = judged & ((modalities == name) | (name == "all"))
        found = {order: auc(logits[own & positive], logits[own & ~positive]) for order, logits in orders.items()}
        known: dict[str, float] = {order: value for order, value in found.items() if value is not None}
        # Of equal orders the first one: "both" asks twice.
        result[name] = {**found, "best": max(known, key=lambda order: known[order]) if known else None}
    return result


def _quality(logits: np.ndarray, kinds: np.ndarray) -> dict[str, float | int | None]:
    judged = np.isfinite(logits)
    logits, kinds = logits[judged], kinds[judged]
    positive = kinds == "positive"
    probability = to_scores(logits)
    return {
        **{f"auc_{kind}": auc(logits[positive], logits[kinds == kind]) for kind in _KINDS[1:]},
        "auc": auc(logits[positive], logits[~positive]),
        "accuracy": float(((probability > 0.5) == positive).mean()) if len(logits) else None,
        "ece": expected_calibration_error(probability, positive),
        "set_aside": int((~judged).sum()),
    }


def _hard_by_pairs(logits: np.ndarray, kinds: np.ndarray, modalities: np.ndarray) -> dict[str, float | None]:
    """AUC of positives against hard negatives, for each combination of modalities."""
    judged = np.isfinite(logits)
    return {
        name: auc(*(logits[judged & (modalities == name) & (kinds == kind)] for kind in ("positive", "hard")))
        for name in sorted(set(modalities.tolist()))
    }


def auc(positives: np.ndarray, negatives: np.ndarray) -> float | None:
    """Area under the ROC curve: the probability that a positive scores above a negative; None where one is empty.

    Example:
        >>> import numpy as np
        >>> auc(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
        0.875
    """
    if not len(positives) or not len(negatives):
        return None
    labels = np.repeat([1, 0], [len(positives), len(negatives)])
    return float(roc_auc_score(labels, np.concatenate([positives, negatives])))


def expected_calibration_error(probability: np.ndarray, truth: np.ndarray, bins: int = 10) -> float | None:
    """Expected calibration error (ECE): mean distance of P(Yes) from the fraction of matches in bins of equal width.

    None without pairs.

    Example:
        >>> import numpy as np
        >>> expected_calibration_error(np.array([0.75, 0.75]), np.array([True, False]))
        0.25
    """
    if not len(probability):
        return None
    indices = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = [abs((probability[indices == index] - truth[indices == index]).sum()) for index in range(bins)]
    return float(sum(gaps) / len(probability))


def _agreement(left: np.ndarray, right: np.ndarray) -> dict[str, float | None]:
    both = np.isfinite(left) & np.isfinite(right)
    left, right = left[both], right[both]
    if len(left) < 2:
        return {"rank_correlation": None, "same_decision": None}
    constant = np.ptp(left) == 0 or np.ptp(right) == 0
    return {
        "rank_correlation": None if constant else float(spearmanr(left, right).statistic),
        "same_decision": float(((left > 0) == (right > 0)).mean()),
    }


def report(result: Json) -> str:
    """Format the result of :func:`calibrate` as a Markdown table with the judge of the best AUC."""
    columns = ("auc_random", "auc_hard", "auc", "accuracy", "ece", "set_aside")
    lines = [json.dumps(result["sample"]), "| judge | " + " | ".join(columns) + " |", "|---" * 7 + "|"]
    for name, row in result["judges"].items():
        cells = [
            "-" if row[key] is None else f"{row[key]:.3f}" if key != "set_aside" else str(row[key]) for key in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for names, row in result.get("agreement", {}).items():
        lines.append(f"{names}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    lines += _report_orders(result["pair_orders"])
    for name, row in result["judges"].items():
        for pairs, value in row["auc_hard_by_pairs"].items():
            if value is not None and value < LEAST_AUC:
                lines.append(f"WARNING: {name}: AUC {value:.2f} on mined candidates, {pairs}. {LOW_AUC_ADVICE}")
    best = max(result["judges"], key=lambda name: result["judges"][name]["auc"] or 0.0)
    return "\n".join([*lines, f"Best AUC of matches against the rest: {best}"])


def _report_orders(pair_orders: Json) -> list[str]:
    """Table of the AUC in each pair order, and the order to take."""
    names = get_args(PairOrder)
    lines = ["| judge | pairs | " + " | ".join(f"auc {name}" for name in names) + " |", "|---" * 5 + "|"]
    advice = []
    for judge, rows in pair_orders.items():
        for pairs, row in rows.items():
            cells = ["-" if row[name] is None else f"{row[name]:.3f}" for name in names]
            lines.append(f"| {judge} | {pairs} | " + " | ".join(cells) + " |")
        if rows["all"]["best"]:
            advice.append(f"{judge}: take --pair_order {rows['all']['best']}")
        others = {pairs: row["best"] for pairs, row in rows.items() if row["best"] not in (None, rows["all"]["best"])}
        advice += [f"{judge}: for {pairs} alone, take --pair_order {best}" for pairs, best in others.items()]
    return [*lines, *advice] if pair_orders else []
