"""UniME-V2 in one file: learn to retrieve, mine, judge, train on soft labels, evaluate on held-out pairs.

Trains on drawn scenes; `run_import(ImportArguments(source="pairs.csv", output=FOLDER))` makes records of your pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sentence_transformers import SentenceTransformer

from mteb_tasks import RecordsRetrieval, evaluate
from unime_st import stages
from unime_st.data import RecordSet
from unime_st.data.scenes import training_records
from unime_st.stages import HardNegativeArguments, JudgeArguments, MineArguments, SoftLabelArguments


# fmt: off
def main(output: str, size: int, steps: int) -> None:
    """Run every stage; finished ones are skipped, so an interrupted run can be started again."""
    records, held_out = Path(output) / "records", Path(output) / "held_out"
    for folder, split, rows in ((records, "train", size), (held_out, "test", 200)):
        if not folder.exists():
            RecordSet.write(folder, training_records(rows, split=split), {"source": "drawn scenes"})
    training = {"learning_rate": 4e-3, "lora_dropout": 0.0, "temperature": 0.05, "per_device_train_batch_size": 32}

    retriever = stages.train_hard_negatives(HardNegativeArguments(
        data=str(records), output=f"{output}/retriever", max_steps=2 * steps, **training,
    ))
    pools = stages.run_mine(MineArguments(
        data=str(records), model=str(retriever), output=f"{output}/pools", num_candidates=10, max_similarity="none",
    ))
    rows = stages.run_judge(JudgeArguments(
        data=str(pools), scores=f"{output}/scores", output=f"{output}/rows", stride=1, num_negatives=5,
    ))
    trained = stages.train_soft_labels(SoftLabelArguments(
        data=str(rows), model=str(retriever), output=f"{output}/model", max_steps=steps,
        num_negatives=5, in_batch_weight=1.0, **training,
    ))

    for name in ("unime-tiny", str(retriever), str(trained)):
        (scores,) = evaluate(SentenceTransformer(name), [RecordsRetrieval(held_out)]).values()
        mean = sum(subset["hit_rate_at_1"] for subset in scores.values()) / len(scores)
        print(f"{name:<30} hit@1 {mean:.3f}, mean of {len(scores)} tasks")
# fmt: on


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/example", help="(default: runs/example)")
    parser.add_argument("--rows", type=int, default=1000, help="number of training pairs (default: 1000)")
    parser.add_argument("--steps", type=int, default=60, help="steps on soft labels (default: 60)")
    options = parser.parse_args()
    main(options.output, options.rows, options.steps)
