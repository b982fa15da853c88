"""One UniME-V2 training step: columns embedded one by one, as stock, against each distinct item embedded once.

python benchmarks/train_step.py [--batch_size 32 --num_negatives 6 --repeats 5]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch
from harness import compare, table

from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.losses import SoftLabelDistillationLoss
from unime_st.model import UniME
from unime_st.training.items import DistinctItemsLoss, ItemCollator
from unime_st.training.stages import judged_rows


def _rows(folder: Path, batch_size: int, num_negatives: int) -> RecordSet:
    """Judged rows whose negatives are other rows' positives, as mining in a small corpus gives them."""
    pairs = list(training_records(batch_size))
    rng = random.Random(0)

    def judged(pair: PairRecord) -> PairRecord:
        negatives = [other.positive for other in rng.sample(pairs, num_negatives)]
        return PairRecord(pair.query, pair.positive, pair.dataset, tuple(negatives), 2.0, (-1.0,) * num_negatives)

    return RecordSet.write(folder, map(judged, pairs), {})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=32, help="queries per step")
    parser.add_argument("--num_negatives", type=int, default=6, help="judged negatives per query")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each variant")
    options = parser.parse_args()
    model = UniME("unime-tiny", device="cuda" if torch.cuda.is_available() else "cpu")
    loss = SoftLabelDistillationLoss(model)
    with tempfile.TemporaryDirectory() as folder:
        records = _rows(Path(folder) / "rows", options.batch_size, options.num_negatives)
        rows = list(judged_rows(records, options.num_negatives))
        columns = [name for name in rows[0] if name != "label"]
        labels = torch.tensor([row["label"] for row in rows], device=model.device)

        def stock() -> None:
            features = [model.preprocess([records.item(row[name]).to_input() for row in rows]) for name in columns]
            features = [
                {key: getattr(v, "to", lambda _, v=v: v)(model.device) for key, v in f.items()} for f in features
            ]
            loss(features, labels).backward()
            model.zero_grad()

        def distinct() -> None:
            batch = ItemCollator(model.preprocess, records=records)(rows)
            batch = {key: getattr(v, "to", lambda _, v=v: v)(model.device) for key, v in batch.items()}
            numbers = sorted({int(key.split("_")[0][6:]) for key in batch if key.startswith("bucket")})
            buckets = [
                {key.removeprefix(f"bucket{n}_"): v for key, v in batch.items() if key.startswith(f"bucket{n}_")}
                for n in numbers
            ]
            DistinctItemsLoss(loss)(buckets, labels).backward()
            model.zero_grad()

        variants = {"columns one by one (stock)": stock, "distinct items, like lengths together": distinct}
        sys.stdout.write(table(compare("train_step", variants, repeats=options.repeats)))


if __name__ == "__main__":
    main()
