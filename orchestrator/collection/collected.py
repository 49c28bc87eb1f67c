"""What a training step learns from, who delivers it, and what delivering asks of the roles."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.batches.row_table import RowTable
from orchestrator.collection.group_stages import PromptGroup
from orchestrator.pipeline import Stage


@dataclass(frozen=True)
class Collected:
    """What one training step learns from."""

    table: RowTable
    positions: tuple[int, ...]
    groups: tuple[PromptGroup, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict[str, float])


class Collector(Protocol):
    """Where the loop's batches come from."""

    async def next(self, version: int) -> Collected:
        """The next batch, for a policy at `version`."""
        ...

    async def expire(self, next_version: int) -> None:
        """Weights of `next_version` are about to be published: give up what would be too old under them."""
        ...

    def advance(self, version: int, trained: Collected) -> None:
        """The policy is at `version` now, having trained on that batch."""
        ...

    @property
    def finished(self) -> tuple[PromptGroup, ...]:
        """Groups that a checkpoint keeps, because the next step would train on them."""
        ...

    async def close(self) -> None: ...


class RoleClient(Protocol):
    """What collection asks of the roles (`orchestrator.executor.Executor`)."""

    @property
    def paused(self) -> bool:
        """Whether groups wait because a pool was resized to no workers."""
        ...

    async def run_group(self, stage: Stage, group: PromptGroup) -> PromptGroup | None: ...

    async def run_batch_stages(self, table: RowTable) -> RowTable: ...

    async def lost(self, tables: Sequence[RowTable]) -> list[bool]:
        """Which of the tables have blocks that are gone with their node."""
        ...


async def cancel(tasks: list[asyncio.Task[Any]]) -> None:
    """End tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
