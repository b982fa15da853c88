"""How well `unime-tiny` judges: AUC of its log-odds on mined candidates of scenes that it never saw, by kind of pair.

python -m train_scripts.tiny.judge_quality [--queries 1000 --record benchmarks/results/judge_quality.json]

A retriever is trained for 400 in-batch steps on other scenes; its 12 nearest documents of each query, and a right one, are
judged in both orders of the pair. The truth of every pair is known.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_scripts.demo.seed import TINY
from unime_st import UniME
from unime_st.data.records import RecordSet
from unime_st.data.scenes import retrieval_data, training_records
from unime_st.files import write_json
from unime_st.judging import LocalJudge
from unime_st.judging.calibration import auc
from unime_st.options import check_options, option
from unime_st.scoring.groups import PairOrder
from unime_st.scoring.pair_scorer import score_pairs
from unime_st.stages import InBatchArguments, train_in_batch
from unime_st.stages.command import run_script

logger = logging.getLogger(__name__)
KINDS = ("short_t2i", "short_i2t", "long_t2i", "long_i2t", "vqa", "grounding", "twins_t2i", "twins_i2t")
ORDERS: tuple[PairOrder, ...] = ("query_first", "candidate_first")
SEED = 7  # of the retriever's scenes and of those that are judged
_MINED = 12


@dataclass
class QualityArguments:
    """Options of the measurement."""

    queries: int = option(1000, "Queries of each kind.", at_least=1)
    record: str = option("", "File to write the results to.")

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)


def retriever(folder: Path, *, records: int = 6000, steps: int = 400) -> UniME:
    """Train the retriever whose candidates are judged.

    Args:
        folder: Where its data and the model go.
        records: Training pairs.
        steps: Steps of 32 pairs of one kind.
    """
    data = RecordSet.write(folder / "records", training_records(records, seed=SEED), {}).folder
    arguments = InBatchArguments(
        model="unime-tiny",
        data=str(data),
        output=str(folder / "retriever"),
        max_steps=steps,
        per_device_train_batch_size=32,
        sub_batch_size=32,
        learning_rate=6e-3,
        temperature=0.05,
        logging_steps=50,
        seed=SEED,
        **TINY,
    )
    return UniME(str(train_in_batch(arguments)))


def measure(kind: str, queries: int, embedder: UniME, judge: LocalJudge) -> dict[str, Any]:
    """Judge the mined candidates of one kind of pair in both orders.

    Args:
        kind: Task of the drawn scenes.
        queries: Number of queries.
        embedder: The retriever.
        judge: The judge.

    Returns:
        The kind, hit@1 of the retriever, share of right pairs among the judged ones, and by order the AUC over all pairs.
    """
    data = retrieval_data(kind, split="test", size=queries, seed=SEED)
    names, documents = list(data.corpus), list(data.corpus.values())
    asked, stored = (
        embedder.encode(items, normalize_embeddings=True) for items in (list(data.queries.values()), documents)
    )
    groups, true, hits = [], [], []
    for (query, item), similarities in zip(data.queries.items(), asked @ stored.T):
        allowed = set(data.candidates[query]) if data.candidates else data.corpus
        ranked = [names[index] for index in np.argsort(-similarities) if names[index] in allowed]
        right = data.relevant[query]
        judged = list(dict.fromkeys([*ranked[:_MINED], min(right)]))
        groups.append((item, [data.corpus[name] for name in judged]))
        true += [name in right for name in judged]
        hits.append(ranked[0] in right)
    found = {"kind": kind, "hit@1": float(np.mean(hits)), "right": float(np.mean(true)), "pairs": len(true)}
    for order in ORDERS:
        scores = score_pairs(judge.scorer, groups, batch_size=128, pair_order=order, show_progress_bar=True)
        odds = np.concatenate([one.scores for one in scores])
        found[order] = auc(odds[true], odds[~np.array(true)])
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of :func:`measure` as a Markdown table."""
    lines = [
        "| pairs | hit@1 of the retriever | right pairs | AUC, query first | AUC, candidate first |",
        "|---|" + "---:|" * 4,
    ]
    for row in rows:
        shares = [f"{100 * row[name]:.0f} %" for name in ("hit@1", "right")]
        numbers = [*shares, *(f"{row[order]:.2f}" for order in ORDERS)]
        lines.append(f"| {row['kind'].replace('_', ' ')} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def measure_all(arguments: QualityArguments) -> None:
    """Measure every kind of pair; the log shows the table."""
    judge = LocalJudge("unime-tiny", template="tiny")
    with tempfile.TemporaryDirectory() as scratch:
        embedder = retriever(Path(scratch))
        rows = [measure(kind, arguments.queries, embedder, judge) for kind in KINDS]
    if arguments.record:
        write_json(arguments.record, {"rows": rows})
    logger.info("\n%s", table(rows))


if __name__ == "__main__":
    raise SystemExit(run_script(measure_all, QualityArguments, __doc__))
