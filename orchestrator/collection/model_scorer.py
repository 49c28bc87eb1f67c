"""Rewards that a model gives: prompt groups that wait at the same time are scored in one pass.

group ──┐                    ┌──► scores of the group
group ──┼──► one table ─► model
group ──┘   all groups that arrived during the last pass
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from actors.batch import Array
from orchestrator.row_table import RowTable


class ModelScorer:
    """Used from one event loop. `infer` has deadlines of its own; what it raises, every group of that pass gets."""

    def __init__(self, infer: Callable[[RowTable], Awaitable[Array]]) -> None:
        self._infer = infer
        self._waiting: list[tuple[RowTable, asyncio.Future[Array]]] = []
        self._passing: asyncio.Task[None] | None = None

    async def score(self, rows: RowTable) -> Array:
        """[B] float32: one score per row."""
        result: asyncio.Future[Array] = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, result))
        if self._passing is None or self._passing.done():
            self._passing = asyncio.ensure_future(self._pass_until_nobody_waits())
        return await result

    async def _pass_until_nobody_waits(self) -> None:
        await asyncio.sleep(0)  # groups that became ready in this turn of the loop come along
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                scores = await self._infer(RowTable.concat([rows for rows, _ in batch]))
            except Exception as error:
                for _, result in batch:
                    if not result.done():
                        result.set_exception(error)
                continue
            ends = np.cumsum([len(rows) for rows, _ in batch])[:-1]
            for (_, result), mine in zip(batch, np.split(scores, ends), strict=True):
                if not result.done():
                    result.set_result(mine)
