"""What the stages of a pipeline make of a prompt group: it is filtered, regrouped, sampled by several roles, or taken
from the data."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.errors import DataFailure
from actors.worker import Ref
from orchestrator.batches.records import scored_pairs
from orchestrator.batches.regrouping import best_and_worst
from orchestrator.batches.row_table import RowTable
from orchestrator.collection.collected import Collected
from orchestrator.collection.cursor import Cursor
from orchestrator.collection.group_stages import DATA
from orchestrator.pipeline import AnsweredPrompts, Pipeline, Prompts, generate, one_of, regroup, score, take, write
from orchestrator.reporting.rollout_metrics import rollout_metrics
from rollout.sampling import GroupMeta, Request
from tests.unit.collector_stage import Endless, Stages, collector


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
