"""Prompt groups that fail, cannot be scored or are lost: dropped, drawn again, or the end of the run."""

import pytest

from actors.errors import BlockLost, BudgetExhausted, DataFailure, Dropped, InfraFailure
from orchestrator.batches.row_table import RowTable
from orchestrator.pipeline import Pipeline, Prompts, generate
from rollout.sampling import GroupMeta, Request
from tests.unit.collector_stage import Stages, collector


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
