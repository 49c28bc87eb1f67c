"""Rewards that a model gives: prompt groups that wait at the same time are scored in one call.

group ──┐                                                    ┌──► scores of the group
group ──┼──► one table ──► model: a pass for each group ─────┼──► scores of the group
group ──┘    all groups that arrived during the last call    └──► scores of the group

Which groups wait at the same time depends on the speed of the machine, and must not show in the scores: a run that is
resumed, or repeated, would learn from other numbers. So a group's scores depend on no other group, to the bit: `infer`
gives the rows of each group forward passes of their own (`actors.sharding.shard_groups`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from orchestrator.row_table import RowTable


class ModelScorer:
    """Used from one event loop. `infer` is told by the column `group` which rows came together; it scores these without
    regard to the others. It has deadlines of its own; what it raises, every group of that call gets."""

    def __init__(self, infer: Callable[[RowTable], Awaitable[RowTable]]) -> None:
        self._infer = infer
        self._waiting: list[tuple[RowTable, asyncio.Future[RowTable]]] = []
        self._calling: asyncio.Task[None] | None = None

    async def score(self, rows: RowTable) -> RowTable:
        """The same rows with what the model says of them: `reward`, and perhaps `process_reward`."""
        result: asyncio.Future[RowTable] = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, result))
        if self._calling is None or self._calling.done():
            self._calling = asyncio.ensure_future(self._call_until_nobody_waits())
        return await result

    async def _call_until_nobody_waits(self) -> None:
        await asyncio.sleep(0)  # groups that became ready in this turn of the loop come along
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                # by its place in this call: an evaluation's group and one of the training may have the same number
                groups = [rows.with_values(group=np.full(len(rows), place)) for place, (rows, _) in enumerate(batch)]
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
