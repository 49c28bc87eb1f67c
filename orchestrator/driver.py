"""The loop. One for every method, online or offline, synchronous or not: synchronous is `max_staleness = 0`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from orchestrator.collector import Collected, Collector
from orchestrator.ending import Stop
from orchestrator.pipeline import Pipeline
from orchestrator.roles import Roles


@dataclass
class Progress:
    """Where a phase stands: optimizer steps done in it, and the version of the policy's weights in the whole run."""

    step: int
    version: int


@dataclass(frozen=True)
class StepRecord:
    """What one step was: for the log, the console and the completions table."""

    step: int
    version: int
    collected: Collected
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
    roles: Roles,
    collector: Collector,
    progress: Progress,
    after_step: Callable[[StepRecord], Awaitable[None]],
    stop: Stop,
) -> None:
    """Run a phase from `progress.step` to `steps`. `after_step` logs, evaluates and saves; the weights do not move in
    it. Raises Stopped, between two steps, if it is asked to."""
    while progress.step < steps:
        clock = StepClock()
        with clock("collect"):
            collected = await stop.before(collector.next(progress.version))
        batch, metrics = collected.batch, dict(collected.metrics)
        async with roles.changing_weights():
            for stage in pipeline.learn:
                with clock(stage.name):
                    batch, measured = await roles.run(stage, batch, progress.step)
                metrics.update(measured)
            progress.step, progress.version = progress.step + 1, progress.version + 1
            await collector.expire(progress.version)
            if pipeline.generates:
                with clock("publish"):
                    await roles.publish(progress.version)
        collector.advance(progress.version, collected)
        await after_step(StepRecord(progress.step, progress.version, collected, {**metrics, **clock.metrics()}))
