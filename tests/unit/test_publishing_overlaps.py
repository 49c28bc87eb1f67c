"""What runs while weights are published: the frozen roles' pass over the next batch, if that may be a version old."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orchestrator.batches.row_table import RowTable
from orchestrator.driver import Progress, train
from orchestrator.losses.likelihood import nll
from orchestrator.losses.reduce import token_mean
from orchestrator.pipeline import Pipeline, Prompts, generate, infer, score, update
from tests.unit.collector_stage import SAMPLES, Stages, collector, settled


class Held(Stages):
    """The frozen roles' pass over a batch does not begin before the weights of the step before it are published."""

    publishes = 0  # begun

    async def run_batch_stages(self, table: RowTable) -> RowTable:
        while self.staged > self.publishes:
            await asyncio.sleep(0.0005)
        return await super().run_batch_stages(table)


class Roles:
    """Stands for the executor. `during`: how many batches the frozen roles were done with in each publish."""

    def __init__(self, stages: Held) -> None:
        self._stages, self.during = stages, list[int]()

    def changing_weights(self) -> Any:
        return nullcontext()  # which may be entered with `async with`, too

    async def run(self, stages: Any, table: RowTable, step: int, clock: Any) -> Any:
        return table, {}

    async def publish(self, version: int) -> None:
        before = self._stages.staged
        self._stages.publishes += 1
        await settled()
        self.during.append(self._stages.staged - before)
        self._stages.version = version


@pytest.mark.parametrize(("staleness", "during"), [(0, [0, 0, 0]), (1, [1, 1, 1])])
async def test_the_frozen_roles_work_on_the_next_batch_while_weights_are_published(staleness: int, during: list[int]):
    stages = Held()
    pipeline = Pipeline(
        Prompts,
        generate(n=SAMPLES),
        score(),
        infer("reference", into="ref_logps"),
        update("policy", nll, reduce=token_mean),
    )
    feed, roles = collector(stages, staleness=staleness, pipeline=pipeline), Roles(stages)
    stop: Any = SimpleNamespace(before=lambda waited: waited)
    await train(pipeline, 3, cast(Any, roles), feed, Progress(0, 0), _nothing, _nothing, stop)
    await feed.close()
    assert roles.during == during
    assert stages.staged >= 3, "each batch passes the frozen roles before it is learned from"


async def _nothing(*_: Any) -> None:
    pass
