"""Score store: Parquet shards of judge scores that name their judge, written by one or several processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unime_st.data.manifest import StageConflictError, finish_stage, is_complete, is_whole_shard
from unime_st.data.parquet_shards import Row, ShardWriter
from unime_st.data.records import RowFolder
from unime_st.data.validation import RejectedWriter
from unime_st.files import folder_lock
from unime_st.retrieval.mining import POOL_SCHEMA, Pool

logger = logging.getLogger(__name__)

SCORE_SCHEMA = pa.schema(
    [
        *POOL_SCHEMA,
        pa.field("positive_logit", pa.float32(), nullable=False),
        pa.field("logits", pa.list_(pa.float32()), nullable=False),
    ]
)
"""Row of a pool with the judge's log-odds Yes - No of the positive and of each candidate."""


@dataclass(frozen=True)
class JudgedPool(Pool):
    """A pool with the judge's log-odds.

    Args:
        positive_logit: Log-odds Yes - No of the positive.
        logits: The same for each candidate.
    """

    positive_logit: float
    logits: list[float]


class Scores(RowFolder[JudgedPool]):
    """Result of :func:`~unime_st.judging.judge_pools.judge_pools`, a sequence of :class:`JudgedPool`.

    Args:
        folder: Folder written by :func:`~unime_st.judging.judge_pools.judge_pools`.

    Raises:
        FileNotFoundError: If judging has not finished there.
    """

    content = "judge scores"
    row_columns = tuple(SCORE_SCHEMA.names)

    def _build(self, row: Row) -> JudgedPool:
        query, positive = self.item(row["query"]), self.item(row["positive"])
        candidates = [self.item(item_id) for item_id in row["candidates"]]
        return JudgedPool(**{**row, "query": query, "positive": positive, "candidates": candidates})


class ScoreShards:
    """The ``count`` shards of an unfinished folder of scores.

    A shard is written completely or not at all. It names the judge, its revision and its prompt in the file's
    metadata, so that scores of two judges are never mixed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from unime_st.judging.score_store import ScoreShards
        >>> ScoreShards(Path(tempfile.mkdtemp()), {"name": "a judge"}, 3).missing(range(3))
        [0, 1, 2]
    """

    def __init__(self, folder: Path, identity: dict[str, str], count: int) -> None:
        self.folder, self.identity, self.count = folder, identity, count

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Which of some shards are still to do, in order.

        Raises:
            StageConflictError: If an existing shard holds scores of another judge.
        """
        wanted = []
        for number in sorted(numbers):
            path = self._path(number)
            found = _judge_of(path) if path.is_file() else None
            if found not in (None, self.identity):
                raise StageConflictError(
                    f"{path} holds scores of {found or 'an unnamed judge'}, not of {self.identity}: scores of two "
                    "judges are never mixed. Remove that file, or judge into another folder."
                )
            if not is_whole_shard(path):
                wanted.append(number)
        return wanted

    def write(
        self,
        number: int,
        rows: list[Row],
        logits: dict[tuple[str, str], float],
        failed: dict[tuple[str, str], str],
    ) -> None:
        """Write a shard, unless another process has already written it.

        One process writes at a time, so that none removes what another has just written. ``rows`` are those of the
        pools; ``logits`` and ``failed``, the reasons of pairs without log-odds, go by ids of query and candidate.
        """
        schema = SCORE_SCHEMA.with_metadata({"judge": json.dumps(self.identity)})
        with folder_lock(self.folder), ExitStack() as files:
            if not self.missing([number]):
                return
            # The rejected pairs appear first, so that an existing shard is complete.
            shard = files.enter_context(ShardWriter(self.folder, "rows", schema, first_shard=number, resumable=True))
            name = f"rejected-{number:05d}.jsonl"
            rejected = files.enter_context(RejectedWriter(self.folder, name, log_count=False))
            for (query, item), reason in failed.items():
                rejected.add(reason, query=query, candidate=item)
            for row in rows:
                if (row["query"], row["positive"]) in failed:
                    reason = "the positive cannot be judged"
                    rejected.add(reason, query=row["query"], positive=row["positive"])
                else:
                    shard.add(_judged(row, logits))

    def finish(self, facts: Mapping[str, object]) -> bool:
        """Write the manifest, with these facts and the counts, if all shards exist; one of several processes does."""
        with folder_lock(self.folder):
            if not is_complete(self.folder):
                if missing := self.missing(range(self.count)):
                    logger.info("judge: this part is done; %d shards of other parts are missing", len(missing))
                    return False
                finish_stage(self.folder, {**self._gather(), "judge": self.identity, **facts})
                for leftover in self.folder.glob("rejected-*.jsonl"):
                    leftover.unlink()
        return True

    def _path(self, number: int) -> Path:
        return self.folder / f"rows-{number:05d}.parquet"

    def _gather(self) -> dict[str, int]:
        """Join the rejected pairs of all shards, and count rows and pairs."""
        with RejectedWriter(self.folder) as rejected:
            for part in sorted(self.folder.glob("rejected-*.jsonl")):
                for line in part.read_text(encoding="utf-8").splitlines():
                    rejected.add(**json.loads(line))
        rows = pairs = 0
        for number in range(self.count):
            logits = pq.read_table(self._path(number), columns=["logits"])["logits"]
            rows += len(logits)
            pairs += len(logits) + int(pc.sum(pc.list_value_length(logits)).as_py() or 0)
        return {"rows": rows, "pairs": pairs, "rejected": rejected.count, "shards": self.count}


def _judge_of(path: Path) -> dict[str, str] | None:
    """Judge that a shard names; None if the file cannot be read."""
    try:
        found: dict[str, str] = json.loads((pq.read_schema(path).metadata or {}).get(b"judge", b"{}"))
    except (ValueError, OSError):
        return None
    return found


def _judged(row: Row, logits: dict[tuple[str, str], float]) -> Row:
    """Return a row with the scores of its pairs, without the candidates that have none."""
    query = row["query"]
    kept = [index for index, item in enumerate(row["candidates"]) if (query, item) in logits]
    candidates = [row["candidates"][index] for index in kept]
    return {
        **row,
        "candidates": candidates,
        "similarities": [row["similarities"][index] for index in kept],
        "positive_logit": logits[query, row["positive"]],
        "logits": [logits[query, item] for item in candidates],
    }
