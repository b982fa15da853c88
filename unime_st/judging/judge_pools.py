"""Judge stage: from mined candidate pools to stored scores, shard by shard, in one or several processes."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm.auto import tqdm

from unime_st.data.manifest import begin_stage, link_items
from unime_st.data.parquet_shards import Row
from unime_st.files import folder_lock
from unime_st.judging.score_store import Scores, ScoreShards
from unime_st.retrieval.mining import Pools
from unime_st.scoring.groups import Group, Judge, PairError

logger = logging.getLogger(__name__)


def judge_pools(
    pools: Pools | str | Path,
    judge: Judge,
    output: str | Path,
    *,
    shard_size: int = 256,
    overwrite: bool = False,
) -> Scores:
    """Judge every pair of query and candidate, and every pair of query and positive, once.

    The work is cut into shards of whole queries. A shard is written when all of it is judged; after a kill, finished
    shards are kept and the unfinished one is judged again. Scores of two judges or prompts are never mixed: a folder
    begun with one judge refuses another, and every shard names its judge and prompt.

    For several processes see :func:`judge_part`.

    Args:
        pools: Mined pools, or their folder.
        judge: The judge.
        output: Folder to write.
        shard_size: Rows per shard; the last query of a shard may exceed it. Defaults to 256.
        overwrite: Overwrite an output made with another judge or other options. Defaults to False.

    Returns:
        Scores: Judged pools; rows of the same query are adjacent. Pairs that cannot be judged (a corrupt image) are in
        ``rejected.jsonl``, and so is every row whose positive cannot be judged.

    Raises:
        StageConflictError: If the output was begun with another judge, prompt or input and ``overwrite`` is False.
        ValueError: If the judge returns the wrong number of scores, or a score that is not finite without a reason.

    References:
        UniME-V2 (https://arxiv.org/abs/2510.13515), "MLLM-as-a-Judge": the score of a pair, positive included.

    Example:
        ::

            from unime_st.judging import LocalJudge
            from unime_st.judging.judge_pools import judge_pools
            from unime_st.judging.select_rows import select_rows

            scores = judge_pools("runs/own/pools", LocalJudge("unime-tiny", template="tiny"), "runs/own/scores")
            rows = select_rows(scores, "runs/own/rows")
    """
    scores = judge_part(pools, judge, output, (0, 1), shard_size=shard_size, overwrite=overwrite)
    assert scores is not None  # the only part is all there is
    return scores


def judge_part(
    pools: Pools | str | Path,
    judge: Judge,
    output: str | Path,
    part: tuple[int, int],
    *,
    shard_size: int = 256,
    overwrite: bool = False,
) -> Scores | None:
    """Judge a part of the shards of :func:`judge_pools`, so that several processes share the work.

    All processes write to one folder, and no pair is judged twice. The process that finds all shards done finishes the
    folder.

    Args:
        pools: Mined pools, or their folder.
        judge: The judge; the same in every process.
        output: Folder to write.
        part: (i, n) does every n-th shard from the i-th on, 0 <= i < n.
        shard_size: Rows per shard; the same in every process. Defaults to 256.
        overwrite: Overwrite an output made with another judge or other options; only with n = 1. Defaults to False.

    Returns:
        Scores | None: None while shards of other parts are missing.

    Raises:
        StageConflictError: See :func:`judge_pools`.
        ValueError: See :func:`judge_pools`; also if ``part`` is out of range.
        FolderInUseError: If another process judges the same part.
    """
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part must be (i, n) with 0 <= i < n, got {part}")
    if overwrite and part[1] > 1:
        raise ValueError("overwrite would remove the shards of the other parts: remove the folder instead")
    with part_lock(output, part):
        work = JudgeWork(pools, judge, output, shard_size=shard_size, overwrite=overwrite)
        if work.finished:
            return Scores(output)
        mine = range(part[0], len(work.rows), part[1])
        pending = work.pending(mine)
        with work.progress(mine, pending) as progress:
            for number in pending:
                for due in work.pending([number]):  # a run with another number of parts may have written it already
                    progress.update(work.do(due))
        return work.finish()


def part_lock(output: str | Path, part: tuple[int, int] = (0, 1)) -> AbstractContextManager[None]:
    """Lock of a part of a folder of scores; other parts may be judged meanwhile."""
    output = Path(output)
    return folder_lock(output.with_name(f"{output.name}.part-{part[0]}-of-{part[1]}"), wait=False)


class JudgeWork:
    """Shards of a folder of scores, to be judged one by one by any process; arguments as for :func:`judge_pools`."""

    def __init__(
        self,
        pools: Pools | str | Path,
        judge: Judge,
        output: str | Path,
        *,
        shard_size: int = 256,
        overwrite: bool = False,
    ) -> None:
        self.pools = pools if isinstance(pools, Pools) else Pools(pools)
        self.judge, self.output = judge, Path(output)
        identity = {"name": judge.name, "revision": judge.revision, "prompt_hash": judge.prompt_hash}
        options = {"judge": identity, "shard_size": shard_size}
        with folder_lock(self.output):  # processes that a scheduler starts at once
            self.finished = not begin_stage(
                self.output, "judge", inputs=[self.pools.folder], options=options, overwrite=overwrite
            )
            if not self.finished:
                link_items(self.pools.folder, self.output)
        self.rows = _cut(self.pools.row_shards.column("query").to_pylist(), shard_size)
        self._shards = ScoreShards(self.output, identity, len(self.rows))

    def pending(self, mine: Sequence[int]) -> list[int]:
        """Return which of some shards are still to do."""
        return self._shards.missing(mine)

    def progress(self, mine: Sequence[int], pending: Sequence[int]) -> tqdm[NoReturn]:
        """Log the work to do and return a progress bar over the rows of some shards."""
        logger.info(
            "judge: %d pairs of %d distinct items with %s; %d of %d shards to do here",
            len(self.pools) + self.pools.manifest["candidates"],
            len(self.pools.items),
            self.judge.name,
            len(pending),
            len(mine),
        )
        total, left = (sum(len(self.rows[number]) for number in numbers) for numbers in (mine, pending))
        return tqdm(total=total, initial=total - left, desc="judging", unit="row")

    def do(self, number: int) -> int:
        """Judge and write a shard; return its number of rows."""
        rows = [self.pools.row_shards.row(row) for row in self.rows[number]]
        _judge_shard(self.pools, self.judge, self._shards, number, rows)
        return len(rows)

    def finish(self) -> Scores | None:
        """Finish the folder and return the scores if all shards are there, else None."""
        facts = {"image_root": self.pools.manifest.get("image_root"), "items": len(self.pools.items)}
        return Scores(self.output) if self._shards.finish(facts) else None


def _cut(queries: Sequence[str], shard_size: int) -> list[list[int]]:
    """Row numbers of each shard: rows of one query stay together, so that no pair is judged in two shards."""
    by_query: dict[str, list[int]] = defaultdict(list)
    for row, query in enumerate(queries):
        by_query[query].append(row)
    shards: list[list[int]] = []
    for rows in by_query.values():
        if not shards or len(shards[-1]) >= shard_size:
            shards.append([])
        shards[-1] += rows
    return shards or [[]]


def _judge_shard(pools: Pools, judge: Judge, shards: ScoreShards, number: int, rows: list[Row]) -> None:
    wanted: dict[str, dict[str, None]] = defaultdict(dict)  # distinct candidates by query, in order
    for row in rows:
        wanted[row["query"]].update(dict.fromkeys([row["positive"], *row["candidates"]]))
    errors: list[PairError] = []
    groups = [Group(pools.item(query), list(map(pools.item, found))) for query, found in wanted.items()]
    answers = judge.score(groups, errors=errors)
    reasons = {(error.group, error.candidate): error.reason for error in errors}
    logits: dict[tuple[str, str], float] = {}
    failed: dict[tuple[str, str], str] = {}
    for group, (query, found) in enumerate(wanted.items()):
        if len(answers[group]) != len(found):
            raise ValueError(f"judge {judge.name} gave {len(answers[group])} scores for {len(found)} candidates")
        for index, (item, logit) in enumerate(zip(found, answers[group])):
            if (group, index) in reasons:
                failed[query, item] = reasons[group, index]
            elif np.isfinite(logit):
                logits[query, item] = float(logit)
            else:
                raise ValueError(f"judge {judge.name} gave {logit} for query {query}, candidate {item}")
    shards.write(number, rows, logits, failed)
