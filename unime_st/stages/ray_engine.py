"""Ray Data engine: embedding and judging on a cluster, over the shards that one process would do, too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from unime_st.data.parquet_shards import Row
from unime_st.data.records import RecordSet
from unime_st.judging import Judge
from unime_st.judging.judge_pools import JudgeWork, part_lock
from unime_st.judging.score_store import Scores
from unime_st.options import option
from unime_st.retrieval.item_vectors import ChunkEncoder, encode_chunk


@dataclass
class EngineArguments:
    """Options of where a stage between the trainings runs."""

    engine: Literal["local", "ray"] = option("local", "Where it runs: this process, or a Ray cluster (extra `ray`).")
    workers: int = option(2, "With ray: actors at most.", unit="actors", at_least=1, needs="engine")
    gpus_per_worker: float = option(0.0, "With ray: GPUs of an actor.", unit="GPUs", at_least=0, needs="engine")


def cluster_of(args: EngineArguments) -> Cluster | None:
    """The Ray cluster that the options ask for; None: this process."""
    return Cluster(args.workers, gpus_per_worker=args.gpus_per_worker) if args.engine == "ray" else None


class _Embeds:
    """Embeds chunks in an actor."""

    def __init__(self, model: str, folder: str, batch_size: int) -> None:
        from unime_st.model import UniME

        self.model, self.records, self.batch_size = UniME(model), RecordSet.load(folder), batch_size

    def __call__(self, batch: dict[str, np.ndarray]) -> Row:
        (chunk,) = batch["work"].tolist()
        vectors = encode_chunk(self.records, self.model, tuple(chunk), batch_size=self.batch_size)
        return {"start": chunk[:1], "vectors": [vectors]}


class _Judges:
    """Judges shards in an actor and writes them."""

    def __init__(self, pools: str, make_judge: Callable[[], Judge], output: str, shard_size: int) -> None:
        self.work = JudgeWork(pools, make_judge(), output, shard_size=shard_size)

    def __call__(self, batch: dict[str, np.ndarray]) -> Row:
        (number,) = batch["work"].tolist()
        for due in self.work.pending([number]):  # an actor that died may have written it already
            self.work.do(due)
        return {"rows": [len(self.work.rows[number])]}


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster: the one that runs (``RAY_ADDRESS``), else one on this machine.

    Actors load the model once and take shards one after the other; a shard whose actor dies is given to another, and
    one that is there is not done again. All machines have to see the folders under the same paths.

    Args:
        workers: Actors at most. Defaults to 2.
        cpus_per_worker: Cores for each. Defaults to 1.
        gpus_per_worker: GPUs for each. Defaults to 0.

    References:
        Ray Data: https://docs.ray.io/en/latest/data/data.html

    Example:
        ::

            from functools import partial

            from unime_st.stages.ray_engine import Cluster
            from unime_st.judging import LocalJudge

            make_judge = partial(LocalJudge, "Qwen/Qwen2.5-VL-7B-Instruct")
            cluster = Cluster(workers=8, gpus_per_worker=1)
            scores = cluster.judge("runs/pools", make_judge(), make_judge, "runs/scores")
    """

    workers: int = 2
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0

    def embedder(self, model: str, records: RecordSet, *, batch_size: int = 64) -> ChunkEncoder:
        """For :func:`unime_st.retrieval.mine`.

        Args:
            model: Alias or folder of the embedder.
            records: Whose items.
            batch_size: Items per forward pass.

        Returns:
            ChunkEncoder: Embeds chunks on the cluster.
        """
        arguments = {"model": model, "folder": str(Path(records.folder).resolve()), "batch_size": batch_size}

        def embed(chunks: Sequence[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
            for batch in self._over(list(map(list, chunks)), _Embeds, arguments):
                yield int(batch["start"][0]), np.stack(batch["vectors"][0])

        return embed

    def judge(
        self,
        pools: str | Path,
        judge: Judge,
        make_judge: Callable[[], Judge],
        output: str | Path,
        *,
        shard_size: int = 256,
    ) -> Scores:
        """:func:`unime_st.judging.judge_pools.judge_pools` on the cluster, with the same output.

        Args:
            pools: Folder of mined pools.
            judge: Names the scores; it judges nothing itself.
            make_judge: Makes the same judge in every actor.
            output: Folder to write.
            shard_size: Rows per shard. Defaults to 256.

        Returns:
            Scores: As from :func:`~unime_st.judging.judge_pools.judge_pools`.

        Raises:
            StageConflictError: If the output was begun with another judge, prompt or input.
        """
        pools, output = Path(pools).resolve(), Path(output).resolve()
        with part_lock(output):
            work = JudgeWork(pools, judge, output, shard_size=shard_size)
            if work.finished:
                return Scores(output)
            everything = range(len(work.rows))
            pending = work.pending(everything)
            arguments = {
                "pools": str(pools),
                "make_judge": make_judge,
                "output": str(output),
                "shard_size": shard_size,
            }
            with work.progress(everything, pending) as progress:
                for batch in self._over(pending, _Judges, arguments):
                    progress.update(int(batch["rows"][0]))
            scores = work.finish()
        assert scores is not None  # every shard was asked for
        return scores

    def _over(self, work: Sequence[object], actor: type, arguments: dict[str, object]) -> Iterator[Row]:
        """Results of the actors for each piece of work, as they come."""
        if not work:
            return
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise ImportError("engine ray needs Ray: pip install 'unime-st[ray]'") from error
        if not ray.is_initialized():
            ray.init(logging_level=logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        pieces = ray.data.from_items([{"work": piece} for piece in work], override_num_blocks=len(work))
        results = pieces.map_batches(
            actor,
            fn_constructor_kwargs=arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self.workers),
            num_cpus=self.cpus_per_worker,
            num_gpus=self.gpus_per_worker or None,
            max_restarts=-1,
            max_task_retries=-1,
        )
        yield from cast(Iterator[Row], results.iter_batches(batch_size=1, prefetch_batches=0))
