"""Training rows with negatives that nobody judged, from which a judge learns a new domain."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from unime_st.data.manifest import begin_stage, finish_stage
from unime_st.data.parquet_shards import Row
from unime_st.data.records import PairRecord, RecordSet, RecordWriter
from unime_st.retrieval.mining import Pools
from unime_st.scoring.groups import PairOrder


def unjudged_rows(
    pools: Mapping[PairOrder, str | Path], output: str | Path, *, num_negatives: int = 4, seed: int = 0
) -> RecordSet:
    """Pairs with negatives that nobody judged: half mined, half random. From them a judge learns a new domain.

    Some of the mined ones are false negatives; a judge that is trained on them anyway still ranks what it is asked
    about, which is all that the choice of negatives needs.

    Args:
        pools: Folder of mined pools by the order in which the judge will be asked about them. A pair that is asked
            candidate first is turned, with the queries of the drawn candidates as negatives.
        output: Folder to write.
        num_negatives: Negatives per pair.
        seed: Seed of the draw.

    Returns:
        The records.
    """
    options = {"num_negatives": num_negatives, "seed": seed, "orders": list(pools)}
    if not begin_stage(output, "unjudged", inputs=list(pools.values()), options=options):
        return RecordSet.load(output)
    rng = random.Random(seed)
    with RecordWriter(output) as writer:
        for order, folder in pools.items():
            found = Pools(folder)
            pairs = list(found.row_shards.rows())
            for pair, negatives in zip(pairs, _drawn(pairs, num_negatives, rng, turned=order == "candidate_first")):
                if not negatives:  # the only document of its kind
                    continue
                query, positive = pair["query"], pair["positive"]
                ids = (positive, query, *negatives) if order == "candidate_first" else (query, positive, *negatives)
                first, second, *others = map(found.item, ids)
                writer.add(PairRecord(first, second, pair["dataset"], tuple(others)))
    finish_stage(output, writer.counts)
    return RecordSet.load(output)


def _drawn(pairs: Sequence[Row], num_negatives: int, rng: random.Random, *, turned: bool) -> Iterator[list[str]]:
    """Negatives of each pair in random order: documents, or with ``turned`` queries of other documents."""
    queries: dict[str, dict[str, list[str]]] = {}  # by dataset and document
    for pair in pairs:
        queries.setdefault(pair["dataset"], {}).setdefault(pair["positive"], []).append(pair["query"])
    documents = {dataset: list(found) for dataset, found in queries.items()}
    for pair in tqdm(pairs, desc="drawing negatives", unit="row", leave=False):
        mined, same = pair["candidates"], documents[pair["dataset"]]
        chosen = rng.sample(mined, min(len(mined), num_negatives // 2))
        drawn = rng.sample(same, min(len(same), 2 * num_negatives))
        chosen += [item for item in drawn if item != pair["positive"]][: num_negatives - len(chosen)]
        rng.shuffle(chosen)
        if turned:
            own = queries[pair["dataset"]]
            asked = (rng.choice(own[item]) for item in chosen)
            chosen = [query for query in asked if query not in own[pair["positive"]]]
        yield list(dict.fromkeys(chosen))
