"""Dynamic batching: calls that arrive while the model is busy are computed together in its next turn."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

CallT = TypeVar("CallT")
ResultT = TypeVar("ResultT")
Batch = list[tuple[CallT, asyncio.Future[ResultT]]]


class Batcher(Generic[CallT, ResultT]):
    """Passes the waiting calls to a function in a thread, one batch after the other.

    There is no waiting time to choose: an idle model starts at once, and a busy one takes all that has come meanwhile,
    up to ``limit``. ``ray.serve.batch`` closes a batch after a fixed time, also behind a busy model, which makes small
    batches. Calls whose caller has gone are left out.

    Args:
        compute: Results of a batch of calls, one for each; runs in a thread.
        size: Size of a call.
        limit: Largest total size of a batch. A larger call is a batch of its own.

    Example:
        >>> async def main():
        ...     batcher = Batcher(lambda calls: [(call, len(calls)) for call in calls], size=len, limit=8)
        ...     return await asyncio.gather(*map(batcher, ["ab", "c", "def"]))
        >>> asyncio.run(main())
        [('ab', 3), ('c', 3), ('def', 3)]
    """

    def __init__(
        self, compute: Callable[[Sequence[CallT]], Sequence[ResultT]], *, size: Callable[[CallT], int], limit: int
    ) -> None:
        self._compute, self._size, self._limit = compute, size, limit
        self._waiting: deque[tuple[CallT, asyncio.Future[ResultT]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, call: CallT) -> ResultT:
        """Result of a call."""
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while batch := self._next():
            await self._run(batch)

    async def _run(self, batch: Batch[CallT, ResultT]) -> None:
        """Compute a batch; if it fails, each call alone, so that one call spoils no other."""
        try:
            results = await asyncio.to_thread(self._compute, [call for call, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    await self._run([entry])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)

    def _next(self) -> Batch[CallT, ResultT]:
        batch: Batch[CallT, ResultT] = []
        total = 0
        while self._waiting:
            call, future = self._waiting[0]
            if future.done():
                self._waiting.popleft()
                continue
            total += self._size(call)
            if batch and total > self._limit:
                break
            batch.append(self._waiting.popleft())
        return batch
