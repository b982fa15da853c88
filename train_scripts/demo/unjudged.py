"""Training rows with negatives that nobody judged, from which a judge learns a new domain."""

from __future__ import annotations

import random
from pathlib import Path

from tqdm.auto import tqdm

from unime_st.data.manifest import begin_stage, finish_stage
from unime_st.data.records import PairRecord, RecordSet, RecordWriter
from unime_st.retrieval.mining import Pools


def unjudged_rows(pools: str | Path, output: str | Path, *, num_negatives: int = 4, seed: int = 0) -> RecordSet:
    """Pairs with negatives that nobody judged: half mined, half random. From them a judge learns a new domain.

    Some of the mined ones are false negatives; a judge that is trained on them anyway still ranks what it is asked
    about, which is all that the choice of negatives needs.

    Args:
        pools: Folder of mined pools.
        output: Folder to write.
        num_negatives: Negatives per pair.
        seed: Seed of the draw.

    Returns:
        The records.
    """
    options = {"num_negatives": num_negatives, "seed": seed}
    if not begin_stage(output, "unjudged", inputs=[pools], options=options):
        return RecordSet.load(output)
    found = Pools(pools)
    rng = random.Random(seed)
    pairs = list(found.row_shards.rows())
    by_dataset: dict[str, list[str]] = {}
    for pair in pairs:
        by_dataset.setdefault(pair["dataset"], []).append(pair["positive"])
    with RecordWriter(output) as writer:
        for pair in tqdm(pairs, desc="drawing negatives", unit="row", leave=False):
            mined = pair["candidates"]
            chosen = rng.sample(mined, min(len(mined), num_negatives // 2))
            same = by_dataset[pair["dataset"]]
            drawn = rng.sample(same, min(len(same), 2 * num_negatives))
            others = [item_id for item_id in drawn if item_id != pair["positive"]]
            chosen += others[: num_negatives - len(chosen)]
            query, positive, *negatives = map(found.item, (pair["query"], pair["positive"], *chosen))
            writer.add(PairRecord(query, positive, pair["dataset"], tuple(negatives)))
    finish_stage(output, writer.counts)
    return RecordSet.load(output)
