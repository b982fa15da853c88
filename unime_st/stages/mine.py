"""Mining of hard negatives: the candidates of every pair, by exact global retrieval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unime_st.data.records import RecordSet
from unime_st.model import UniME
from unime_st.options import check_options, option, require_options
from unime_st.retrieval.mining import mine
from unime_st.stages.ray_engine import EngineArguments, cluster_of


@dataclass
class MineArguments(EngineArguments):
    """Options of :func:`run_mine`."""

    data: str = option(
        "",
        "Folder of pair records.",
        required=True,
        path="stage",
        made_by="unime import --source FILE --output FOLDER",
    )
    model: str = option("unime-tiny", "Embedding model that retrieves: alias, folder or hub name.")
    output: str = option("", "Folder for the candidate pools.", required=True)
    vectors: str = option("", "Folder for the vectors, shared by runs; default: in the output folder.")
    overwrite: bool = option(False, "Overwrite the output folder.")
    num_candidates: int = option(50, "Candidates of a query.", unit="candidates", at_least=1)
    pool: Literal["modality", "dataset", "global"] = option(
        "modality", "Candidates of a query: positives of the same modality, of the same dataset, or all."
    )
    max_similarity: float | Literal["positive"] | None = option(
        "positive",
        "Ceiling of a candidate's similarity: that of the positive, that plus a margin (a number), or none.",
    )
    batch_size: int = option(64, "Batch size.", unit="items", at_least=1)

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)


def run_mine(args: MineArguments) -> Path:
    """Embed the items of the records once and write the hard candidates of every pair.

    Args:
        args: Options.

    Returns:
        Folder of the candidate pools.
    """
    require_options(args)
    records = RecordSet.load(args.data)
    cluster = cluster_of(args)
    pools = mine(
        records,
        UniME(args.model),
        args.output,
        num_candidates=args.num_candidates,
        pool=args.pool,
        max_similarity=args.max_similarity,
        batch_size=args.batch_size,
        embed=cluster.embedder(args.model, records, batch_size=args.batch_size) if cluster else None,
        vectors=args.vectors or None,
        overwrite=args.overwrite,
    )
    return pools.folder
