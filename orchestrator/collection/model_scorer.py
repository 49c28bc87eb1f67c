"""Rewards that a model gives: prompt groups that wait at the same time are scored in one call.

group ──┐                                                    ┌──► scores of the group
group ──┼──► one table ──► model: passes that they share ────┼──► scores of the group
group ──┘    all groups that arrived during the last call    └──► scores of the group

Which groups wait at the same time depends on the speed of the machine, and must not show in the scores: a run that is
resumed, or repeated, would learn from other numbers. So a group's scores depend on no other group, to the bit: `infer`
gives large groups passes of their own, and small ones passes of one shape (`actors.sharding.shard_groups`).

A group waits until the call under way has ended, which has its deadline, and then until a pass is full, or for
`GATHER_S`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import numpy as np

from actors.sharding import PASS_TOKENS
from orchestrator.batches.row_table import RowTable

GATHER_S = 0.01  # a call of a small model takes about as long


class ModelScorer:
    """Used from one event loop. `infer` is told by the column `group` which rows came together; it scores these without
    regard to the others. It has deadlines of its own; what it raises, every group of that call gets."""

    def __init__(self, infer: Callable[[RowTable], Awaitable[RowTable]], *, gather_s: float = GATHER_S) -> None:
        self._infer, self._gather_s = infer, gather_s
        self._full = asyncio.Event()  # as many tokens wait as fill a pass
        self._waiting: list[tuple[RowTable, asyncio.Future[RowTable]]] = []
        self._calling: asyncio.Task[None] | None = None

    async def score(self, rows: RowTable) -> RowTable:
        """The same rows with what the model says of them: `reward`, and perhaps `process_reward`."""
        result: asyncio.Future[RowTable] = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, result))
        if sum(waiting.num_tokens for waiting, _ in self._waiting) >= PASS_TOKENS:
            self._full.set()
        if self._calling is None or self._calling.done():
            self._calling = asyncio.ensure_future(self._call_until_nobody_waits())
        return await result

    async def _call_until_nobody_waits(self) -> None:
        while self._waiting:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), self._gather_s)
            batch, self._waiting = self._waiting, []
            self._full.clear()
            try:
                # An evaluation's group and one of the training may have the same number, and other columns.
                shared = frozenset.intersection(*(rows.columns for rows, _ in batch))
                groups = [
                    rows.only(shared).with_values(group=np.full(len(rows), place))
                    for place, (rows, _) in enumerate(batch)
                ]
                scores = await self._infer(RowTable.concat(groups))
            except Exception as error:
                for _, result in batch:
                    if not result.done():
                        result.set_exception(error)
                continue
            ends = np.cumsum([len(rows) for rows, _ in batch])[:-1]
            for (_, result), mine in zip(batch, np.split(np.arange(len(scores)), ends), strict=True):
                if not result.done():
                    result.set_result(scores.select(mine))
