"""Collection by prompt group: what is drawn, dropped, filtered, expired and trained on."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from actors.batch import Batch
from actors.errors import BlockLost, BudgetExhausted, DataFailure, Dropped, InfraFailure, RunError
from actors.worker import LocalObjects, Ref
from orchestrator.batches.records import scored_pairs
from orchestrator.batches.regrouping import best_and_worst
from orchestrator.batches.row_table import RowTable
from orchestrator.cluster.failures import Ledger, Watchdog
from orchestrator.collection import saved_groups
from orchestrator.collection.collected import Collected
from orchestrator.collection.cursor import Cursor
from orchestrator.collection.group_collector import GroupCollector
from orchestrator.collection.group_stages import DATA, GroupStages, PromptGroup
from orchestrator.collection.row_collector import RowCollector
from orchestrator.collection.scoring import Scored, ToScore
from orchestrator.collection.staleness import Contract
from orchestrator.pipeline import (
    AnsweredPrompts,
    Pipeline,
    Prompts,
    Stage,
    generate,
    keep,
    one_of,
    regroup,
    score,
    take,
    write,
)
from orchestrator.reporting.rollout_metrics import rollout_metrics
from rewards.worker import ScoredTexts, ScoreResult
from rollout.sampling import EpisodeFacts, Finish, GroupMeta, Request, Sampling, TurnRow

SAMPLES = 2


@dataclass
class Endless:
    """A source whose item i is the prompt [i]."""

    order: Any = field(default_factory=lambda: SimpleNamespace(at=lambda position: (0, position)))

    def item(self, index: int) -> Any:
        return SimpleNamespace(
            id=index, tokens=(index,), prompt=str(index), columns={}, row_values={}, teacher_prompt=None
        )

    def batch(self, positions: list[int]) -> Batch:
        return Batch.build([1] * len(positions), tokens=positions, mask=[False] * len(positions), group=positions)


@dataclass
class Stages(GroupStages):
    """Group-wise stages over workers that answer at once, except for what they are told to be slow with or to fail."""

    version: int = 0
    slow: set[int] = field(default_factory=set)
    failing: dict[int, Exception] = field(default_factory=dict)
    unscorable: dict[int, Exception] = field(default_factory=dict)
    scorable_again: bool = False  # what is unscorable is so once
    rewards: dict[int, list[float]] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    on_failure: Literal["drop", "abort"] = "drop"
    seen: list[int] = field(default_factory=list)
    seeds: dict[int, int] = field(default_factory=dict)
    all_seeds: dict[int, list[int]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)  # positions whose blocks are lost once they were collected
    gone_again: bool = False
    staged: int = 0  # batches that passed the stages before learning
    paused: bool = False

    def __post_init__(self) -> None:
        policy = SimpleNamespace(abort_on_failure=self.on_failure == "abort")
        super().__init__({}, {"reward": SimpleNamespace(policy=policy)}, {}, LocalObjects())

    async def sample(self, role: str, request: Request, sampler: int = 0) -> tuple[GroupMeta, RowTable]:
        position = request.group
        self.seen.append(position)
        self.seeds[position] = request.seed
        self.all_seeds.setdefault(position, []).append(request.seed)
        started = self.version
        while position in self.slow:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        if position in self.failing:
            raise self.failing[position]
        n = self.samples.get(position, request.n)
        block = Batch.build([2] * n, tokens=[position, 7] * n, mask=[False, True] * n)
        meta = GroupMeta(request.id, "w", (1,) * n, (Finish.STOP,) * n, started, self.version, 0.25)
        of_row = {"sampler": np.full(n, sampler, np.int8), "completion_tokens": np.ones(n, np.int32)}
        rows = Batch.build([2] * n, group=[position] * n, **of_row)
        return meta, RowTable.of_block(rows, Ref(block), {"tokens", "mask"})

    async def score(self, role: str, asked: ToScore) -> Scored:
        prompt, rows = asked.prompt, asked.rows
        if prompt.id in self.unscorable:
            raise self.unscorable.pop(prompt.id) if self.scorable_again else self.unscorable[prompt.id]
        total = np.array(self.rewards.get(prompt.id, [0.0, 1.0][: len(rows)]), dtype=np.float32)
        parts, weights = total[:, None], np.ones(1, np.float32)
        return Scored(ScoreResult(names=("r",), rewards=parts, total=total, weights=weights), (Ref(None),))

    async def run_group(self, stage: Stage, group: PromptGroup) -> PromptGroup | None:
        return await self.run(stage, group, Sampling(max_tokens=4))

    async def run_batch_stages(self, table: RowTable) -> RowTable:
        self.staged += 1
        return table

    async def lost(self, tables: Sequence[RowTable]) -> list[bool]:
        found = [bool(len(table)) and int(table["group"][0]) in self.gone for table in tables]
        self.gone = self.gone if self.gone_again else set()
        return found


def spread(rewards: np.ndarray) -> bool:
    return bool(np.ptp(rewards) > 0)


def collector(
    stages: Stages,
    *,
    batch: int = 3,
    staleness: int = 0,
    version: int = 0,
    cursor: Cursor | None = None,
    keeps: bool = True,
    pipeline: Pipeline | None = None,
    source: Any = None,
    **ledger,
):
    stages.version = version
    return GroupCollector(
        source or Endless(),
        stages,
        pipeline or Pipeline(Prompts, generate(n=SAMPLES), score(), *([keep(spread)] if keeps else [])),
        cursor or Cursor(),
        Contract(staleness, batch, batches=ledger.get("batches")),
        run="test",
        seed=3,
        version=version,
        ledger=Ledger(ledger.get("allowed", 100)),
        watchdog=ledger.get("watchdog", Watchdog()),
    )


async def settled() -> None:
    """Until everything has happened that nobody waits for. In turns of the event loop, because on a busy machine a time
    may pass without a single one."""
    for _ in range(50):
        await asyncio.sleep(0.0005)


async def step(feed: GroupCollector, stages: Stages, version: int) -> tuple[int, ...]:
    """One turn of the loop, without a policy."""
    collected = await feed.next(version)
    await feed.expire(version + 1)
    stages.version = version + 1
    feed.advance(version + 1, collected)
    return collected.positions


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


async def test_a_failing_prompt_is_dropped_and_replaced_never_rewarded():
    stages = Stages(failing={1: DataFailure("cannot be parsed"), 2: InfraFailure("five workers died of it")})
    feed = collector(stages)
    collected = await feed.next(0)
    assert collected.positions == (0, 3, 4)
    assert collected.metrics["dropped/data"] == 1
    assert collected.metrics["dropped/infra"] == 1
    await feed.close()


UNSCORABLE = [DataFailure("reward mine raised KeyError"), InfraFailure("prompt 1 failed on 3 worker(s)")]


@pytest.mark.parametrize("error", UNSCORABLE)
async def test_a_group_that_cannot_be_scored_is_dropped_where_the_key_says_drop(error: Exception):
    feed = collector(Stages(unscorable={1: error}, on_failure="drop"))
    assert (await feed.next(0)).positions == (0, 2, 3)
    await feed.close()


@pytest.mark.parametrize("error", UNSCORABLE)
async def test_a_group_that_cannot_be_scored_ends_the_run_where_the_key_says_abort(error: Exception):
    feed = collector(Stages(unscorable={1: error}, on_failure="abort"))
    with pytest.raises(
        BudgetExhausted, match=r"prompt 1 could not be scored.*\n.*roles\.reward\.on_failure=abort"
    ) as said:
        await feed.next(0)
    assert str(error) in str(said.value)
    await feed.close()


async def test_a_group_that_a_reward_says_to_drop_is_dropped_and_counted_so_also_where_the_key_says_abort():
    error = Dropped("reward judge: timeout", "reward judge: no answer within 3 s")
    feed = collector(Stages(unscorable={1: error}, on_failure="abort"))
    collected = await feed.next(0)
    assert collected.positions == (0, 2, 3)
    assert collected.metrics["dropped/reward judge: timeout"] == 1
    await feed.close()


async def test_a_group_for_which_a_reward_ends_the_run_ends_it_also_where_the_key_says_drop():
    feed = collector(Stages(unscorable={1: BudgetExhausted("on_failure=fail ends the run")}, on_failure="drop"))
    with pytest.raises(BudgetExhausted, match="on_failure=fail"):
        await feed.next(0)
    await feed.close()


async def test_a_prompt_whose_generation_fails_is_dropped_also_where_unscorable_groups_end_the_run():
    feed = collector(Stages(failing={1: DataFailure("too long")}, on_failure="abort"))
    assert (await feed.next(0)).positions == (0, 2, 3)
    await feed.close()


NONE = float("nan")  # what an absent opinion is in a score


async def test_a_group_without_any_opinion_is_dropped_and_one_with_some_is_trained_on():
    feed = collector(Stages(rewards={0: [NONE, NONE], 1: [NONE, 1.0], 2: [0.0, 1.0]}), keeps=False)
    collected = await feed.next(0)
    assert collected.positions == (1, 2, 3)
    assert collected.metrics["dropped/no opinion"] == 1
    await feed.close()


async def test_a_run_whose_every_reward_is_no_opinion_ends_with_the_rewards_names():
    feed = collector(Stages(rewards={index: [NONE, NONE] for index in range(100)}), allowed=5)
    with pytest.raises(
        BudgetExhausted, match="no reward has an opinion on any sample: r returned None for each of the 2"
    ):
        await feed.next(0)
    await feed.close()


async def test_samples_lost_before_they_were_learned_are_drawn_again_from_the_same_seed_and_no_others_are():
    stages = Stages(gone={1})
    feed = collector(stages)
    collected = await feed.next(0)
    assert collected.positions == (0, 1, 2)
    assert sorted(stages.seen) == [0, 1, 1, 2]
    assert stages.all_seeds[1][0] == stages.all_seeds[1][1] != stages.all_seeds[2][0]
    assert (collected.metrics["groups/lost"], stages.staged) == (1, 2)
    assert [group.id for group in collected.groups] == ["test/0/v0", "test/1/v0/again", "test/2/v0"]
    await feed.close()


async def test_samples_lost_before_they_were_scored_are_drawn_again():
    stages = Stages(unscorable={1: BlockLost("its node is gone")}, scorable_again=True)
    feed = collector(stages)
    collected = await feed.next(0)
    assert (collected.positions, stages.seen.count(1), collected.metrics["groups/lost"]) == ((0, 1, 2), 2, 1)
    assert not any(name.startswith("dropped/") for name in collected.metrics)
    await feed.close()


async def test_a_group_whose_samples_are_lost_again_and_again_is_dropped():
    stages = Stages(gone={1}, gone_again=True)
    feed = collector(stages)
    collected = await feed.next(0)
    assert (collected.positions, stages.seen.count(1)) == ((0, 2, 3), 4)
    assert (collected.metrics["groups/lost"], collected.metrics["dropped/infra"]) == (4, 1)
    await feed.close()


async def test_a_group_with_too_few_survivors_is_dropped():
    stages = Stages(samples={0: 1})
    feed = collector(stages)
    assert (await feed.next(0)).positions == (1, 2, 3)
    await feed.close()


async def test_groups_without_signal_are_replaced_until_the_batch_is_full():
    stages = Stages(rewards={index: [1.0, 1.0] for index in (0, 1, 5)})
    feed = collector(stages)
    collected = await feed.next(0)
    assert collected.positions == (2, 3, 4)
    assert collected.metrics["groups/filtered"] == 2
    cost = {name: collected.metrics[f"groups/{name}"] for name in ("kept", "filtered_samples", "filtered_tokens")}
    of_kept = {len(group.metas[0].lengths): sum(group.metas[0].lengths) for group in collected.groups}
    ((samples, tokens),) = of_kept.items()
    assert cost == {"kept": 3, "filtered_samples": 2 * samples, "filtered_tokens": 2 * tokens} and tokens > 0
    assert collected.metrics["groups/filtered_seconds"] == 2 * collected.groups[0].metas[0].seconds > 0
    await feed.close()


PAIRED = Pipeline(Prompts, generate(n=3), score(), regroup(best_and_worst, rows=2))


async def test_samples_become_the_rows_that_a_stage_makes_of_them_and_keep_their_tokens():
    stages = Stages(rewards={0: [0.5, 0.1, 0.9], 1: [0.3, 0.2, 0.1], 2: [0.0, 0.0, 0.4]})
    feed = collector(stages, pipeline=PAIRED)
    collected = await feed.next(0)
    assert collected.table["group"].tolist() == [0, 0, 1, 1, 2, 2]
    assert collected.table["preferred"].tolist() == [True, False] * 3
    assert collected.table["reward"].tolist() == pytest.approx([0.9, 0.1, 0.3, 0.1, 0.4, 0.0])
    whole = collected.table.whole()
    tokens = whole.shard.fetched([block.target for block in whole.blocks]).batch["tokens"]
    assert tokens.tolist() == [0, 7, 0, 7, 1, 7, 1, 7, 2, 7, 2, 7]
    assert [len(group.score.total) for group in collected.groups] == [3, 3, 3], "what is reported is of all samples"
    await feed.close()


async def test_a_group_of_which_no_rows_can_be_made_is_replaced():
    stages = Stages(rewards={**{index: [0.0, 0.0, 1.0] for index in range(10)}, 1: [0.5, 0.5, 0.5]})
    feed = collector(stages, pipeline=PAIRED)
    collected = await feed.next(0)
    assert collected.positions == (0, 2, 3)
    assert collected.metrics["groups/filtered"] == 1
    await feed.close()


async def test_of_data_that_is_only_written_a_dropped_prompt_leaves_a_gap_and_no_other_takes_its_place():
    """One prompt gives no pair, and one cannot be sampled; the batch is of the three that were asked all the same."""
    rewards = {**{index: [0.0, 0.0, 1.0] for index in range(10)}, 1: [0.5, 0.5, 0.5]}
    stages = Stages(rewards=rewards, failing={2: DataFailure("cannot be used")})
    stages.steady = frozenset({"rollout"})  # nothing is trained, so its weights stay
    written = Pipeline(Prompts, *PAIRED, write(scored_pairs))
    feed = collector(stages, pipeline=written)
    collected = await feed.next(0)
    assert collected.positions == (0, 1, 2) and sorted(set(stages.seen)) == [0, 1, 2]
    assert set(collected.table["group"].tolist()) == {0}
    assert collected.metrics["groups/filtered"] == 1 and collected.metrics["dropped/data"] == 1
    assert rollout_metrics(collected, 0)["completions/mean_length"] == 1.0
    feed.advance(1, collected)
    assert (await feed.next(1)).positions == (3, 4, 5)
    await feed.close()


async def test_samples_of_several_stages_are_one_group_scored_together_each_stage_with_seeds_of_its_own():
    seeds: dict[int, list[int]] = {}

    class Seen(Stages):
        async def sample(self, role: str, request: Request, sampler: int = 0) -> tuple[GroupMeta, RowTable]:
            seeds.setdefault(request.group, []).append(request.seed)
            assert role == ("rollout", "elder")[sampler]
            return await super().sample(role, request, sampler)

    twice = Pipeline(Prompts, generate(n=2), generate("elder", n=1), score())
    feed = collector(Seen(rewards={index: [0.0, 1.0, 0.5] for index in range(9)}), pipeline=twice)
    collected = await feed.next(0)
    assert collected.table["sampler"].tolist() == [0, 0, 1] * 3
    assert collected.table["reward"].tolist() == [0.0, 1.0, 0.5] * 3
    assert all(len(set(of_prompt)) == 2 for of_prompt in seeds.values())
    assert all(len(group.metas) == 2 for group in collected.groups)
    assert set(collected.metrics) >= {"time/generate", "time/score"}
    await feed.close()


ONE_OF = Pipeline(AnsweredPrompts, *one_of(0.4, generate(n=1), take()))
LENGTH = 4  # tokens of what is taken: a prompt of one, and an answer


class Answered(Endless):
    """Each prompt has the answer 8 8 8."""

    def item(self, index: int) -> Any:
        mask = [False] + [True] * (LENGTH - 1)
        answer = Batch.build([LENGTH], tokens=[index, 8, 8, 8], mask=mask, group=[index])
        return SimpleNamespace(
            id=index, tokens=(index,), prompt=str(index), columns={}, answer=answer, row_values={}, teacher_prompt=None
        )


class LikeAnEngine(Stages):
    """Samples have what those of an engine have."""

    async def sample(self, role: str, request: Request, sampler: int = 0) -> tuple[GroupMeta, RowTable]:
        meta, rows = await super().sample(role, request, sampler)
        block = rows.blocks[0].target.with_columns(sample_logps=[0.0, -1.0], version=[-1, self.version])
        table = rows.rows.with_columns(truncated=[False])
        return meta, RowTable.of_block(table, Ref(block), {"tokens", "mask", "sample_logps", "version"})


def sampled_or_taken(collected: Collected) -> dict[int, bool]:
    """Of each position, whether its row was sampled."""
    return {group.position: group.metas[0].worker != DATA for group in collected.groups}


async def test_of_two_stages_each_group_passes_the_one_that_its_seed_and_position_decide():
    feed = collector(LikeAnEngine(), batch=400, pipeline=ONE_OF, source=Answered())
    found = await feed.next(0)
    await feed.close()
    chosen = sampled_or_taken(found)
    assert np.mean(list(chosen.values())) == pytest.approx(0.4, abs=0.08)  # three standard deviations
    assert rollout_metrics(found, 0)["completions/from_data"] == 1 - np.mean(list(chosen.values()))
    stages, cursor, again = LikeAnEngine(slow={1}), Cursor(), dict[int, bool]()
    feed = collector(stages, pipeline=ONE_OF, source=Answered(), staleness=1, cursor=cursor)
    first = await feed.next(0)
    await feed.close()
    cursor.settle(first.positions)
    feed = collector(LikeAnEngine(), batch=50, pipeline=ONE_OF, source=Answered(), version=1, cursor=cursor)
    again = sampled_or_taken(first) | sampled_or_taken(await feed.next(1))
    await feed.close()
    assert again == {position: chosen[position] for position in again} and len(again) == 53


async def test_what_is_taken_is_a_row_like_those_that_are_sampled_and_does_not_grow_old():
    feed = collector(LikeAnEngine(), batch=20, pipeline=ONE_OF, source=Answered())
    collected = await feed.next(0)
    await feed.close()
    chosen = sampled_or_taken(collected)
    taken = np.array([not chosen[position] for position in collected.table["group"].tolist()])
    assert 0 < taken.sum() < 20
    assert collected.table["sampler"].tolist() == taken.astype(int).tolist()
    assert collected.table.lengths.tolist() == np.where(taken, LENGTH, 2).tolist()
    whole = collected.table.whole()
    batch = whole.shard.fetched([block.target for block in whole.blocks]).batch
    for row, position in enumerate(collected.table["group"].tolist()):
        expected = [position, 7] if chosen[position] else [position, 8, 8, 8]
        assert batch.row("tokens", row).tolist() == expected
        assert np.isnan(batch.row("sample_logps", row)).tolist() == (batch.row("mask", row) & taken[row]).tolist()
    ages = [group.oldest_version for group in collected.groups]
    assert ages == [0 if chosen[group.position] else None for group in collected.groups]


async def test_a_group_is_dropped_if_one_of_its_stages_returns_too_few_samples():
    class Fails(Stages):
        async def sample(self, role: str, request: Request, sampler: int = 0) -> tuple[GroupMeta, RowTable]:
            if role == "elder" and request.group == 1:
                raise DataFailure("the prompt is too long for it")
            return await super().sample(role, request, sampler)

    feed = collector(Fails(), pipeline=Pipeline(Prompts, generate(n=2), generate("elder", n=1)))
    collected = await feed.next(0)
    assert collected.positions == (0, 2, 3)
    assert collected.metrics["dropped/data"] == 1
    await feed.close()


async def test_a_data_set_whose_every_prompt_fails_ends_the_run_with_the_reason():
    stages = Stages(failing=dict.fromkeys(range(100), DataFailure("the reward raised KeyError: 'answer'")))
    feed = collector(stages, allowed=5)
    with pytest.raises(BudgetExhausted, match="KeyError: 'answer'"):
        await feed.next(0)
    await feed.close()


async def test_a_bug_in_the_driver_is_raised_not_dropped():
    stages = Stages(failing={0: ZeroDivisionError("a bug")})
    feed = collector(stages)
    with pytest.raises(ZeroDivisionError):
        await feed.next(0)
    await feed.close()


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


async def test_a_batch_that_can_never_be_filled_is_an_error_at_once():
    feed = collector(Stages(), batches=1)
    feed.advance(1, await feed.next(0))
    with pytest.raises(RunError, match="0 of 3 prompt groups are ready for version 1, none is under way"):
        await feed.next(1)
    await feed.close()


async def test_rows_come_in_batches_in_order_and_are_settled_after_training():
    cursor = Cursor()
    feed = RowCollector(Endless(), Stages(), cursor, items=2)
    first = await feed.next(0)
    assert first.table.rows["tokens"].tolist() == [0, 1]
    assert cursor.frontier == 0, "not trained on yet"
    feed.advance(1, first)
    assert cursor.frontier == 2
    assert (await feed.next(1)).positions == (2, 3)
    await feed.close()


async def test_the_last_batch_of_rows_has_its_own_size_and_none_is_read_ahead_of_it():
    stages = Stages()
    feed = RowCollector(Endless(), stages, Cursor(), items=2, last=(6, 1))
    assert [(await feed.next(version)).positions for version in (5, 6)] == [(0, 1), (2,)]
    await settled()
    assert stages.staged == 2
    await feed.close()


@pytest.mark.parametrize(("overlaps", "ahead"), [(True, 2), (False, 1)])
async def test_stages_before_learning_run_ahead_only_where_roles_overlap(overlaps: bool, ahead: int):
    stages = Stages()
    feed = RowCollector(Endless(), stages, Cursor(), items=2, overlaps=overlaps)
    await feed.next(0)
    await settled()
    assert stages.staged == ahead
    await feed.close()


async def test_groups_that_a_checkpoint_has_are_trained_on_once_and_not_sampled_again(tmp_path: Path):
    """Two batches ahead; the process ends after the first step, and another one goes on from what was saved."""
    before, cursor = Stages(), Cursor()
    feed = collector(before, staleness=2, cursor=cursor)
    first = await feed.next(0)
    before.version = 1
    await feed.expire(1)
    feed.advance(1, first)
    await settled()
    await saved_groups.save(feed.finished, before._objects, tmp_path)
    saved = {group.position: group.rows for group in feed.finished}
    at, kept = cursor.to_json(), {group.position: group.oldest_version for group in feed.finished}
    await feed.close()
    assert sorted(kept.values()) == [0] * 6 + [1] * 3 and set(saved).isdisjoint(first.positions)

    after, cursor = Stages(version=1), Cursor.from_json(at)
    feed = collector(after, staleness=2, cursor=cursor, version=1)
    feed.restore((await saved_groups.load(after._objects, tmp_path, feed.drawn)).groups)
    trained: list[int] = []
    for version in (1, 2, 3, 4):
        batch = await feed.next(version)
        trained += batch.positions
        for group in batch.groups:
            assert group.position not in saved or group.oldest_version == kept[group.position]
            assert group.score is not None and group.score.total.tolist() == [0.0, 1.0]
        after.version = version + 1
        await feed.expire(version + 1)
        feed.advance(version + 1, batch)
    await feed.close()
    assert set(trained) >= set(saved)
    assert len(trained) == len(set(trained)) == 12 and set(trained).isdisjoint(first.positions)
    assert set(after.seen).isdisjoint(saved)


async def test_a_saved_group_that_is_too_old_for_the_resumed_run_is_sampled_again(tmp_path: Path):
    before = Stages()
    feed = collector(before, staleness=2)
    await feed.next(0)
    await settled()
    await saved_groups.save(feed.finished, before._objects, tmp_path)
    await feed.close()
    after = Stages(version=1)
    feed = collector(after, staleness=0, version=1)  # the run allows no staleness any more
    feed.restore((await saved_groups.load(after._objects, tmp_path, feed.drawn)).groups)
    assert feed.finished == ()
    batch = await feed.next(1)
    assert set(after.seen) >= set(batch.positions)
    await feed.close()


async def test_a_saved_group_keeps_what_is_known_of_its_episodes_and_what_was_logged_of_its_texts(tmp_path: Path):
    stages = Stages()
    feed = collector(stages)
    facts = EpisodeFacts(2, 1, 0, 5, 0.5, 0.25, None)
    meta = GroupMeta("r", "w", (3,), (Finish.STOP,), 0, 0, 0.5, ("why",), (9,), (facts,), (TurnRow(9, 3, 0.5),))
    rows = Batch.build([2, 2], group=[5, 5], sampler=np.zeros(2, np.int8), tokens=[1, 2, 3, 4])
    table = RowTable.of_block(rows.only({"group", "sampler"}), Ref(rows.only({"tokens"})), {"tokens"})
    texts = Ref(ScoredTexts(("a", "b"), {"seen": (1, "x")}))
    group = replace(feed.drawn(5), rows=table.with_values(version=[3, 4]), metas=(meta,), own=(True,), texts=(texts,))
    await saved_groups.save([group, feed.drawn(6)], stages._objects, tmp_path)
    found, empty = (await saved_groups.load(stages._objects, tmp_path, feed.drawn)).groups
    assert (found.metas, found.own, found.id, found.seed) == (group.metas, group.own, group.id, group.seed)
    (said,) = [await stages._objects.get(ref, timeout_s=1) for ref in found.texts]
    assert (said.texts, dict(said.extra)) == (("a", "b"), {"seen": (1, "x")})
    assert found.rows._layout == group.rows._layout
    assert found.rows["version"].tolist() == [3, 4]
    (block,) = [await stages._objects.get(ref, timeout_s=1) for ref in found.rows.blocks]
    assert block["tokens"].tolist() == [1, 2, 3, 4]
    assert len(empty.rows) == 0 and empty.score is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.without({"sample"}), "their rows lack sample"),
        (
            lambda rows: replace(rows, rows=replace(rows.rows, columns={**rows.rows.columns, "of_old": rows["group"]})),
            "their rows have of_old",
        ),
    ],
    ids=["a column less", "a column that is unknown now"],
)
async def test_a_saved_group_with_other_columns_than_new_ones_is_sampled_again_and_the_run_is_told_why(
    tmp_path: Path, change: Callable[[RowTable], RowTable], said: str
):
    """It could not stand in a batch beside them."""
    before = Stages()
    feed = collector(before, staleness=2)
    await feed.next(0)
    await settled()
    first, *others = feed.finished
    await saved_groups.save([replace(first, rows=change(first.rows)), *others], before._objects, tmp_path)
    await feed.close()
    after = Stages()
    feed = collector(after, staleness=2)
    found = await saved_groups.load(after._objects, tmp_path, feed.drawn, {"sample", "group", "reward"})
    assert found.warning is not None and said in found.warning and found.warning.startswith("1 finished prompt groups")
    assert [group.position for group in found.groups] == [group.position for group in others]
    feed.restore(found.groups)
    trained = [position for version in range(3) for position in await step(feed, after, version)]
    assert {first.position, *(group.position for group in others)} <= set(trained) and first.position in after.seen
    assert set(after.seen).isdisjoint(group.position for group in others)
    await feed.close()
