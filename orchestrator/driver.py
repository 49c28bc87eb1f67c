"""The loop. One for every method, online or offline, synchronous or not: synchronous is `max_staleness = 0`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from orchestrator.batches.row_table import RowTable
from orchestrator.cluster.shutdown import Stop
from orchestrator.collection.collected import Collected, Collector
from orchestrator.executor import Executor
from orchestrator.pipeline import Pipeline


@dataclass
class Progress:
    """Where a phase stands: optimizer steps done in it, and the version of the policy's weights in the whole run."""

    step: int
    version: int


@dataclass(frozen=True)
class StepRecord:
    """What one step was: for the log, the console and the tables of completions and their tokens. `learned`: the rows
    that were learned from, with every column that a stage wrote."""

    step: int
    version: int
    collected: Collected
    learned: RowTable
    metrics: dict[str, float]


@dataclass
class StepClock:
    """Seconds of one step by part; what no part claims is `rest`."""

    began: float = field(default_factory=time.perf_counter)
    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        total = time.perf_counter() - self.began
        named = {f"time/{part}": seconds for part, seconds in self.parts.items()}
        return {**named, "time/rest": total - sum(self.parts.values()), "step_time": total}


async def train(
    pipeline: Pipeline,
    steps: int,
    roles: Executor,
    collector: Collector,
    progress: Progress,
    before_step: Callable[[], Awaitable[None]],
    after_step: Callable[[StepRecord], Awaitable[None]],
    stop: Stop,
) -> None:
    """Run a phase from `progress.step` to `steps`. `before_step` does what was asked from outside (a checkpoint, a
    pause), `after_step` logs, evaluates and saves; the weights do not move in either. Raises Stopped, between two
    steps, if it is asked to."""
    while progress.step < steps:
        await before_step()
        clock = StepClock()
        with clock("collect"):
            collected = await stop.before(collector.next(progress.version))
        async with roles.changing_weights():
            table, metrics = await roles.run(pipeline.learn, collected.table, progress.step, clock)
            progress.step, progress.version = progress.step + 1, progress.version + 1
            await collector.expire(progress.version)
            if pipeline.generates:
                with clock("publish"):
                    await roles.publish(progress.version)
        collector.advance(progress.version, collected)
        metrics = {**collected.metrics, **metrics, **clock.metrics()}
        await after_step(StepRecord(progress.step, progress.version, collected, table, metrics))
