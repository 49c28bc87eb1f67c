"""Collection by prompt group: what is drawn, dropped, filtered, expired and trained on."""

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from actors.batch import Batch
from actors.errors import BudgetExhausted, DataFailure, InfraFailure, RunError
from actors.worker import Ref
from orchestrator.collector import GroupCollector, RowCollector
from orchestrator.cursor import Cursor
from orchestrator.pipeline import Pipeline, Prompts, generate, keep, score
from orchestrator.staleness import Contract
from orchestrator.supervision import Ledger, Watchdog
from rewards.actor import ScoreResult
from rollout.sampling import Finish, GroupMeta, Request, Sampling

SAMPLES = 2


@dataclass
class Endless:
    """A source whose item i is the prompt [i]."""

    order: Any = field(default_factory=lambda: SimpleNamespace(at=lambda position: (0, position)))

    def item(self, index: int) -> Any:
        return SimpleNamespace(id=index, tokens=(index,), prompt=str(index), columns={})

    def batch(self, positions: list[int]) -> Batch:
        return Batch.build([1] * len(positions), tokens=positions, mask=[False] * len(positions), group=positions)


@dataclass
class Company:
    """Answers at once, except for what it is told to be slow with or to fail."""

    version: int = 0
    slow: set[int] = field(default_factory=set)
    failing: dict[int, Exception] = field(default_factory=dict)
    unscorable: dict[int, Exception] = field(default_factory=dict)
    rewards: dict[int, list[float]] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)
    seeds: dict[int, int] = field(default_factory=dict)
    staged: int = 0  # batches that passed the stages before learning
    paused: bool = False

    async def generate(self, request: Request) -> tuple[GroupMeta, Ref]:
        position = request.group
        self.seen.append(position)
        self.seeds[position] = request.seed
        started = self.version
        while position in self.slow:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        if position in self.failing:
            raise self.failing[position]
        n = self.samples.get(position, request.n)
        batch = Batch.build([2] * n, tokens=[position, 7] * n, mask=[False, True] * n, group=[position] * n)
        meta = GroupMeta(request.id, "w", (1,) * n, (Finish.STOP,) * n, started, self.version, 0.0)
        return meta, Ref(batch)

    async def score(self, prompt: Any, tokens: Ref) -> ScoreResult:
        if prompt.id in self.unscorable:
            raise self.unscorable[prompt.id]
        total = np.array(self.rewards.get(prompt.id, [0.0, 1.0][: len(tokens.target)]), dtype=np.float32)
        return ScoreResult(
            names=("r",), rewards=total[:, None], total=total, texts=[""] * len(total), extra={}, metrics={}
        )

    async def fetch(self, refs: list[Ref]) -> list[Batch]:
        return [ref.target for ref in refs]

    async def run_batch_stages(self, batch: Batch) -> Batch:
        self.staged += 1
        return batch


def spread(rewards: np.ndarray) -> bool:
    return bool(np.ptp(rewards) > 0)


def collector(
    company: Company,
    *,
    batch: int = 3,
    staleness: int = 0,
    version: int = 0,
    cursor: Cursor | None = None,
    on_reward_failure: Literal["drop", "abort"] = "drop",
    keeps: bool = True,
    **ledger,
):
    company.version = version
    return GroupCollector(
        Endless(),
        company,
        Pipeline(Prompts, generate(n=SAMPLES), score(), *([keep(spread)] if keeps else [])),
        cursor or Cursor(),
        Contract(staleness, batch, batches=ledger.get("batches")),
        Sampling(max_tokens=4),
        run="test",
        seed=3,
        version=version,
        ledger=Ledger(ledger.get("allowed", 100)),
        watchdog=ledger.get("watchdog", Watchdog()),
        on_reward_failure=on_reward_failure,
    )


async def step(feed: GroupCollector, company: Company, version: int) -> tuple[int, ...]:
    """One turn of the loop, without a policy."""
    collected = await feed.next(version)
    await feed.expire(version + 1)
    company.version = version + 1
    feed.advance(version + 1, collected)
    return collected.positions


async def test_synchronous_batches_are_the_prompts_in_order_and_nothing_runs_ahead():
    company = Company()
    feed = collector(company)
    for version in range(2):
        collected = await feed.next(version)
        assert collected.positions == tuple(range(3 * version, 3 * version + 3))
        await asyncio.sleep(0.02)
        assert company.seen == list(range(3 * version + 3)), "the next batch was begun before its weights"
        await feed.expire(version + 1)
        company.version = version + 1
        feed.advance(version + 1, collected)
    assert (await feed.next(2)).batch["group"].tolist() == [6, 6, 7, 7, 8, 8]
    await feed.close()


async def test_synchronous_collection_starts_the_next_batch_only_after_publishing():
    company = Company()
    feed = collector(company)
    await feed.next(0)
    await asyncio.sleep(0.02)
    assert sorted(company.seen) == [0, 1, 2]
    await feed.close()


async def test_with_staleness_a_slow_group_does_not_hold_up_the_batch():
    company = Company(slow={1})
    feed = collector(company, staleness=1)
    assert await step(feed, company, 0) == (0, 2, 3)
    company.slow.clear()
    later = [position for version in (1, 2, 3) for position in await step(feed, company, version)]
    assert later.count(1) == 1, "late, but trained on once"
    await feed.close()


async def test_a_group_that_would_be_too_old_is_cancelled_before_publishing_and_drawn_again():
    company = Company(slow={1})
    feed = collector(company, staleness=1)
    trained = [await step(feed, company, version) for version in range(2)]
    await asyncio.sleep(0.01)
    assert company.seen.count(1) == 2, "cancelled at version 2, drawn again"
    company.slow.clear()
    trained += [await step(feed, company, version) for version in (2, 3, 4)]
    flat = [position for positions in trained for position in positions]
    assert 1 in flat
    assert len(flat) == len(set(flat))
    await feed.close()


async def test_a_failing_prompt_is_dropped_and_replaced_never_rewarded():
    company = Company(failing={1: DataFailure("cannot be parsed"), 2: InfraFailure("five workers died of it")})
    feed = collector(company)
    collected = await feed.next(0)
    assert collected.positions == (0, 3, 4)
    assert collected.metrics["dropped/data"] == 1
    assert collected.metrics["dropped/infra"] == 1
    await feed.close()


UNSCORABLE = [DataFailure("reward mine raised KeyError"), InfraFailure("prompt 1 failed on 3 worker(s)")]


@pytest.mark.parametrize("error", UNSCORABLE)
async def test_a_group_that_cannot_be_scored_is_dropped_where_the_key_says_drop(error: Exception):
    feed = collector(Company(unscorable={1: error}), on_reward_failure="drop")
    assert (await feed.next(0)).positions == (0, 2, 3)
    await feed.close()


@pytest.mark.parametrize("error", UNSCORABLE)
async def test_a_group_that_cannot_be_scored_ends_the_run_where_the_key_says_abort(error: Exception):
    feed = collector(Company(unscorable={1: error}), on_reward_failure="abort")
    with pytest.raises(
        BudgetExhausted, match=r"prompt 1 could not be scored.*\n.*roles\.reward\.on_failure=abort"
    ) as said:
        await feed.next(0)
    assert str(error) in str(said.value)
    await feed.close()


async def test_a_prompt_whose_generation_fails_is_dropped_also_where_unscorable_groups_end_the_run():
    feed = collector(Company(failing={1: DataFailure("too long")}), on_reward_failure="abort")
    assert (await feed.next(0)).positions == (0, 2, 3)
    await feed.close()


NONE = float("nan")  # what an absent opinion is in a score


async def test_a_group_without_any_opinion_is_dropped_and_one_with_some_is_trained_on():
    feed = collector(Company(rewards={0: [NONE, NONE], 1: [NONE, 1.0], 2: [0.0, 1.0]}), keeps=False)
    collected = await feed.next(0)
    assert collected.positions == (1, 2, 3)
    assert collected.metrics["dropped/no opinion"] == 1
    await feed.close()


async def test_a_run_whose_every_reward_is_no_opinion_ends_with_the_rewards_names():
    feed = collector(Company(rewards={index: [NONE, NONE] for index in range(100)}), allowed=5)
    with pytest.raises(
        BudgetExhausted, match="no reward has an opinion on any sample: r returned None for each of the 2"
    ):
        await feed.next(0)
    await feed.close()


async def test_a_group_with_too_few_survivors_is_dropped():
    company = Company(samples={0: 1})
    feed = collector(company)
    assert (await feed.next(0)).positions == (1, 2, 3)
    await feed.close()


async def test_groups_that_teach_nothing_are_replaced_until_the_batch_is_full():
    company = Company(rewards={index: [1.0, 1.0] for index in (0, 1, 5)})
    feed = collector(company)
    collected = await feed.next(0)
    assert collected.positions == (2, 3, 4)
    assert collected.metrics["groups/filtered"] == 2
    await feed.close()


async def test_a_data_set_on_which_everything_fails_ends_the_run_with_the_reason():
    company = Company(failing=dict.fromkeys(range(100), DataFailure("the reward raised KeyError: 'answer'")))
    feed = collector(company, allowed=5)
    with pytest.raises(BudgetExhausted, match="KeyError: 'answer'"):
        await feed.next(0)
    await feed.close()


async def test_a_bug_in_the_driver_is_raised_not_dropped():
    company = Company(failing={0: ZeroDivisionError("a bug")})
    feed = collector(company)
    with pytest.raises(ZeroDivisionError):
        await feed.next(0)
    await feed.close()


async def test_a_resumed_collector_draws_what_was_not_trained_on_with_the_same_seeds():
    company, cursor = Company(slow={1}), Cursor()
    feed = collector(company, staleness=1, cursor=cursor)
    first = await step(feed, company, 0)
    await feed.close()
    assert cursor.to_json() == {"frontier": 1, "beyond": [2, 3]}
    again = Company()
    resumed = collector(again, staleness=1, version=1, cursor=Cursor.from_json(cursor.to_json()))
    second = await step(resumed, again, 1)
    assert first == (0, 2, 3)
    assert second == (1, 4, 5)
    assert again.seeds[1] == company.seeds[1]
    await resumed.close()


async def test_a_closed_collector_starts_nothing_more():
    company = Company(slow={1})
    feed = collector(company, staleness=2)
    await feed.next(0)
    await feed.close()
    seen = len(company.seen)
    company.slow.clear()
    await asyncio.sleep(0.02)
    assert len(company.seen) == seen


async def test_while_a_step_is_trained_nobody_waits_for_prompt_groups_and_no_deadline_runs():
    company, now = Company(), [0.0]
    watchdog = Watchdog(clock=lambda: now[0])
    feed = collector(company, watchdog=watchdog)
    first = await feed.next(0)
    now[0] = 7200.0
    await asyncio.sleep(0.01)
    assert watchdog.overdue() == [], "the batch after this one is not missed yet"
    company.version = 1
    feed.advance(1, first)
    assert (await feed.next(1)).positions == (3, 4, 5)
    await feed.close()


async def test_a_batch_that_is_missed_is_named_once_unless_somebody_wants_no_workers():
    company, now = Company(slow={1}), [0.0]
    watchdog = Watchdog(clock=lambda: now[0])
    feed = collector(company, watchdog=watchdog)
    missed = asyncio.ensure_future(feed.next(0))
    await asyncio.sleep(0.01)
    now[0], company.paused = 40.0, True
    assert watchdog.overdue() == []
    now[0], company.paused = 80.0, False
    assert watchdog.overdue() == ["waiting 80 s for 3 prompt groups (2 ready, 1 under way)"]
    company.slow.clear()
    assert (await missed).positions == (0, 1, 2)
    await feed.close()


async def test_a_batch_that_can_never_be_filled_is_an_error_and_not_a_wait_for_ever():
    feed = collector(Company(), batches=1)
    feed.advance(1, await feed.next(0))
    with pytest.raises(RunError, match="0 of 3 prompt groups are ready for version 1, none is under way"):
        await feed.next(1)
    await feed.close()


async def test_rows_come_in_batches_in_order_and_are_settled_after_training():
    cursor = Cursor()
    feed = RowCollector(Endless(), Company(), cursor, items=2)
    first = await feed.next(0)
    assert first.batch["tokens"].tolist() == [0, 1]
    assert cursor.frontier == 0, "not trained on yet"
    feed.advance(1, first)
    assert cursor.frontier == 2
    assert (await feed.next(1)).positions == (2, 3)
    await feed.close()


async def test_the_last_batch_of_rows_has_its_own_size_and_none_is_read_ahead_of_it():
    company = Company()
    feed = RowCollector(Endless(), company, Cursor(), items=2, last=(6, 1))
    assert [(await feed.next(version)).positions for version in (5, 6)] == [(0, 1), (2,)]
    await asyncio.sleep(0.05)
    assert company.staged == 2
    await feed.close()


@pytest.mark.parametrize(("overlaps", "ahead"), [(True, 2), (False, 1)])
async def test_stages_before_learning_run_ahead_only_where_roles_overlap(overlaps: bool, ahead: int):
    company = Company()
    feed = RowCollector(Endless(), company, Cursor(), items=2, overlaps=overlaps)
    await feed.next(0)
    await asyncio.sleep(0.05)
    assert company.staged == ahead
    await feed.close()
