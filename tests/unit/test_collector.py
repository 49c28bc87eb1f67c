"""Collection by prompt group: what is drawn and when, what expires, what is resumed, and which waits are reported."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from actors.errors import RunError
from orchestrator.batches.row_table import RowTable
from orchestrator.cluster.failures import Watchdog
from orchestrator.collection.cursor import Cursor
from orchestrator.collection.scoring import Scored, ToScore
from orchestrator.pipeline import Pipeline, Prompts, generate
from rollout.sampling import GroupMeta, Request
from tests.unit.collector_stage import SAMPLES, Stages, collector, settled, step


async def test_synchronous_batches_are_the_prompts_in_order_and_nothing_runs_ahead():
    stages = Stages()
    feed = collector(stages)
    for version in range(2):
        collected = await feed.next(version)
        assert collected.positions == tuple(range(3 * version, 3 * version + 3))
        await settled()
        assert stages.seen == list(range(3 * version + 3)), "the next batch was begun before its weights"
        await feed.expire(version + 1)
        stages.version = version + 1
        feed.advance(version + 1, collected)
    assert (await feed.next(2)).table["group"].tolist() == [6, 6, 7, 7, 8, 8]
    await feed.close()


async def test_synchronous_collection_starts_the_next_batch_only_after_publishing():
    stages = Stages()
    feed = collector(stages)
    await feed.next(0)
    await settled()
    assert sorted(stages.seen) == [0, 1, 2]
    await feed.close()


async def test_with_staleness_a_slow_group_does_not_hold_up_the_batch():
    stages = Stages(slow={1})
    feed = collector(stages, staleness=1)
    assert await step(feed, stages, 0) == (0, 2, 3)
    stages.slow.clear()
    later = [position for version in (1, 2, 3) for position in await step(feed, stages, version)]
    assert later.count(1) == 1, "late, but trained on once"
    await feed.close()


async def test_a_group_that_would_be_too_old_is_cancelled_before_publishing_and_drawn_again():
    stages = Stages(slow={1})
    feed = collector(stages, staleness=1)
    trained = [await step(feed, stages, version) for version in range(2)]
    await settled()
    assert stages.seen.count(1) == 2, "cancelled at version 2, drawn again"
    stages.slow.clear()
    trained += [await step(feed, stages, version) for version in (2, 3, 4)]
    flat = [position for positions in trained for position in positions]
    assert 1 in flat
    assert len(flat) == len(set(flat))
    await feed.close()


@dataclass
class Gated(Stages):
    """Positions whose samples, or rewards, come when the test says so."""

    sampling: dict[int, asyncio.Event] = field(default_factory=dict[int, asyncio.Event])
    scoring: dict[int, asyncio.Event] = field(default_factory=dict[int, asyncio.Event])

    async def sample(self, role: str, request: Request, sampler: int = 0) -> tuple[GroupMeta, RowTable]:
        if request.group in self.sampling:
            await self.sampling[request.group].wait()
        return await super().sample(role, request, sampler)

    async def score(self, role: str, asked: ToScore) -> Scored:
        found = await super().score(role, asked)
        if asked.prompt.id in self.scoring:
            await self.scoring[asked.prompt.id].wait()
        return found


@pytest.mark.parametrize("fresh", [True, False], ids=["with fresh tokens", "too old"])
async def test_a_straggler_that_ends_in_the_turn_of_the_loop_in_which_groups_expire_is_trained_on_once(fresh: bool):
    stages = Gated(scoring={0: asyncio.Event()}, sampling={0: asyncio.Event()} if fresh else {})
    feed = collector(stages, batch=2, staleness=1, batches=5)
    trained: list[int] = []
    for version in range(5):
        collected = await asyncio.wait_for(feed.next(version), 60)
        trained += collected.positions
        await settled()
        if version == 1:
            for event in stages.sampling.values():
                event.set()
            await settled()
            assert stages.seen.count(0) == 1, "it waits for its reward"
            stages.scoring[0].set()
            for _ in range(10):  # until it has ended, and nobody has been told of that
                if 0 in [group.position for group in feed.finished]:
                    break
                await asyncio.sleep(0)
        await feed.expire(version + 1)
        assert version != 1 or (0 in [group.position for group in feed.finished]) == fresh
        stages.version = version + 1
        feed.advance(version + 1, collected)
    await feed.close()
    assert sorted(trained) == [*range(10)]
    again = [] if fresh else [0]
    assert sorted(stages.seen) == [*again, *range(10)], "what is too old is drawn again, once; no more than needed are"


async def test_a_resumed_collector_draws_what_was_not_trained_on_with_the_same_seeds():
    stages, cursor = Stages(slow={1}), Cursor()
    feed = collector(stages, staleness=1, cursor=cursor)
    first = await step(feed, stages, 0)
    await feed.close()
    assert cursor.to_json() == {"frontier": 1, "beyond": [2, 3]}
    again = Stages()
    resumed = collector(again, staleness=1, version=1, cursor=Cursor.from_json(cursor.to_json()))
    second = await step(resumed, again, 1)
    assert first == (0, 2, 3)
    assert second == (1, 4, 5)
    assert again.seeds[1] == stages.seeds[1]
    await resumed.close()


async def test_samples_of_weights_that_do_not_change_never_grow_old():
    class Still(Stages):
        async def sample(self, role: str, request: Request, sampler: int = 0) -> tuple[GroupMeta, RowTable]:
            meta, rows = await super().sample(role, request, sampler)
            return replace(meta, oldest_version=0), rows

    stages = Still()
    stages.steady = frozenset({"rollout"})
    feed = collector(stages, pipeline=Pipeline(Prompts, generate(n=SAMPLES)))
    assert [await step(feed, stages, version) for version in (0, 1, 2)] == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    assert (await feed.next(3)).metrics["groups/expired"] == 0
    await feed.close()
    stages = Still()
    feed = collector(stages, pipeline=Pipeline(Prompts, generate(n=SAMPLES)))
    await step(feed, stages, 0)
    with pytest.raises(RunError, match="0 of 3 prompt groups are ready for version 1"):
        await feed.next(1)
    await feed.close()


async def test_a_closed_collector_starts_nothing_more():
    stages = Stages(slow={1})
    feed = collector(stages, staleness=2)
    await feed.next(0)
    await feed.close()
    seen = len(stages.seen)
    stages.slow.clear()
    await settled()
    assert len(stages.seen) == seen


async def test_no_deadline_for_prompt_groups_runs_during_a_training_step():
    stages, now = Stages(), [0.0]
    watchdog = Watchdog(clock=lambda: now[0])
    feed = collector(stages, watchdog=watchdog)
    first = await feed.next(0)
    now[0] = 7200.0
    await settled()
    assert watchdog.overdue() == [], "the batch after this one is not missed yet"
    stages.version = 1
    feed.advance(1, first)
    assert (await feed.next(1)).positions == (3, 4, 5)
    await feed.close()


async def test_a_late_batch_is_reported_once_unless_the_pool_is_scaled_to_zero():
    stages, now = Stages(slow={1}), [0.0]
    watchdog = Watchdog(clock=lambda: now[0])
    feed = collector(stages, watchdog=watchdog)
    missed = asyncio.ensure_future(feed.next(0))
    await settled()
    now[0], stages.paused = 40.0, True
    assert watchdog.overdue() == []
    now[0], stages.paused = 80.0, False
    assert watchdog.overdue() == ["waiting 80 s for 3 prompt groups (2 ready, 1 under way)"]
    stages.slow.clear()
    assert (await missed).positions == (0, 1, 2)
    await feed.close()


@pytest.mark.parametrize("waits", [False, True], ids=["before it is waited for", "while it is waited for"])
async def test_a_batch_that_can_never_be_filled_is_an_error_at_once(waits: bool):
    feed = collector(Stages(), batches=1)
    first = await feed.next(0)
    if waits:
        await settled()
    feed.advance(1, first)
    with pytest.raises(RunError, match="0 of 3 prompt groups are ready for version 1, none is under way"):
        await asyncio.wait_for(feed.next(1), 60)
    await feed.close()
