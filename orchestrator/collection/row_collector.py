"""Batches of rows that are complete from the start: supervised, paired and unpaired data."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from orchestrator.batches.row_table import RowTable
from orchestrator.collection.collected import Collected, RoleClient, cancel
from orchestrator.collection.cursor import Cursor
from orchestrator.collection.group_stages import PromptGroup


class RowCollector:
    """The next batch is read ahead; with `overlaps`, the stages that it passes before learning run ahead, too."""

    def __init__(
        self,
        source: Any,
        roles: RoleClient,
        cursor: Cursor,
        items: int,
        *,
        overlaps: bool = True,
        last: tuple[int, int] | None = None,
    ) -> None:
        """`last`: the version that the last batch is trained at, and its items; without, batches have no end."""
        self._source, self._roles, self._cursor, self._items = source, roles, cursor, items
        self._overlaps, self._last = overlaps, last
        self._drawing = cursor.unsettled()
        self._ahead: asyncio.Task[Collected] | None = None

    async def next(self, version: int) -> Collected:
        ahead = self._ahead or asyncio.ensure_future(self._assemble(version))
        collected = await ahead
        if not self._overlaps:
            collected = await self._pass_stages(collected)
        ended = self._last is not None and version >= self._last[0]
        self._ahead = None if ended else asyncio.ensure_future(self._assemble(version + 1))
        return collected

    async def _assemble(self, version: int) -> Collected:
        items = self._last[1] if self._last is not None and version == self._last[0] else self._items
        positions = [next(self._drawing) for _ in range(items)]
        batch = await asyncio.to_thread(self._source.batch, positions)
        read = Collected(RowTable(batch), tuple(positions))
        return await self._pass_stages(read) if self._overlaps else read

    async def _pass_stages(self, read: Collected) -> Collected:
        return replace(read, table=await self._roles.run_batch_stages(read.table))

    async def expire(self, next_version: int) -> None:
        pass  # rows do not age

    def advance(self, version: int, trained: Collected) -> None:
        self._cursor.settle(trained.positions)

    @property
    def finished(self) -> tuple[PromptGroup, ...]:
        return ()  # rows are read again

    async def close(self) -> None:
        await cancel([self._ahead] if self._ahead else [])
