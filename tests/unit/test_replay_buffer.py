"""Groups that teach nothing give their places to earlier ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.errors import ConfigError
from actors.worker import LocalObjects
from orchestrator.batches.replay_buffer import Kept, ReplayBuffer, group_scores, load, replayed, save
from orchestrator.batches.row_table import RowTable
from orchestrator.losses.declare import columns_of
from orchestrator.methods import build
from orchestrator.pipeline import Pipeline, Verb

OBJECTS = LocalObjects()


async def batch(first: int, *rewards: list[float]) -> RowTable:
    """A group for each list, numbered from `first`, its tokens in a block of its own."""
    return RowTable.concat([await group(first + index, each) for index, each in enumerate(rewards)])


async def group(number: int, rewards: list[float]) -> RowTable:
    count = len(rewards)
    rows = Batch.build([3] * count, group=[number] * count, reward=np.array(rewards, np.float32))
    block = Batch.build(
        [3] * count,
        tokens=np.arange(3 * count) + 100 * number,
        mask=[False, True, True] * count,
        version=np.full(3 * count, number),
    )
    return RowTable.of_block(rows, await OBJECTS.put(block), {"tokens", "mask", "version"})


def replay(table: RowTable, buffer: ReplayBuffer, step: int, max_age: int = 9) -> tuple[RowTable, dict[str, float]]:
    return replayed(table, buffer, step=step, seed=0, max_age=max_age, scale="group")


def groups_of(table: RowTable) -> list[int]:
    return list(dict.fromkeys(table["group"].tolist()))


async def tokens_of(table: RowTable) -> list[int]:
    whole = table.whole()
    blocks = [await OBJECTS.get(ref, timeout_s=1.0) for ref in whole.blocks]
    return whole.shard.fetched(blocks).batch["tokens"].tolist()


async def test_a_group_of_one_reward_gives_its_place_to_an_earlier_one_with_the_tokens_and_versions_of_then() -> None:
    buffer = ReplayBuffer(2)
    first, said = replay(await batch(0, [0, 1], [1, 1], [0, 3]), buffer, step=0)
    assert groups_of(first) == [0, 1, 2] and said["replay/groups_replaced"] == 0
    assert [kept.rows["group"][0] for kept in buffer.groups] == [2, 0], "the better first"
    second, said = replay(await batch(5, [2, 2], [0, 9], [4, 4]), buffer, step=3)
    assert set(groups_of(second)[::2]) == {0, 2} and groups_of(second)[1] == 6
    assert said == {
        "replay/groups_without_spread": 2,
        "replay/groups_replaced": 2,
        "replay/buffer": 2,
        "replay/age": 3,
    }
    place = groups_of(second).index(2)
    assert (await tokens_of(second))[6 * place : 6 * place + 6] == [200, 201, 202, 203, 204, 205]
    assert [kept.rows["group"][0] for kept in buffer.groups] == [6, 2], "the batch's own is in it from now on"


async def test_a_group_is_forgotten_after_its_age_and_samples_without_a_score_make_no_spread() -> None:
    buffer = ReplayBuffer(4)
    replay(await batch(0, [0, 1], [float("nan"), 5]), buffer, step=0)
    assert [kept.rows["group"][0] for kept in buffer.groups] == [0]
    again, _ = replay(await batch(2, [1, 1]), buffer, step=2, max_age=2)
    assert groups_of(again) == [0]
    later, _ = replay(await batch(3, [1, 1]), buffer, step=3, max_age=2)
    assert groups_of(later) == [3] and not buffer.groups


async def test_the_score_is_the_sum_of_absolute_advantages_times_the_deviation() -> None:
    groups, scores = group_scores(await batch(0, [0, 1, 1, 0], [0, 10, 10, 0], [3, 3, 3, 3]), "none")
    deviation = np.std([0, 1, 1, 0], ddof=1)
    assert (groups, scores) == ([0, 1, 2], [pytest.approx(2 * deviation), pytest.approx(200 * deviation), 0])


async def test_a_saved_buffer_replays_the_same_groups_in_the_same_order(tmp_path: Path) -> None:
    buffer = ReplayBuffer(3)
    replay(await batch(0, [0, 1], [0, 2], [0, 3], [0, 4]), buffer, step=0)
    await save(buffer, OBJECTS, tmp_path)
    restored = ReplayBuffer(3, (await load(OBJECTS, tmp_path, {"tokens", "mask", "reward"})).groups)
    dead = await batch(9, [1, 1], [2, 2])
    expected, found = (replay(dead, each, step=1)[0] for each in (buffer, restored))
    assert groups_of(expected) == groups_of(found) != [9, 10]
    assert await tokens_of(expected) == await tokens_of(found)
    with pytest.raises(ConfigError, match="replayed no groups"):
        await load(OBJECTS, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.without({"reward"}), "1 groups.*their rows lack reward"),
        (
            lambda rows: replace(rows, rows=replace(rows.rows, columns={**rows.rows.columns, "of_old": rows["group"]})),
            "1 groups.*their rows have of_old",
        ),
    ],
    ids=["a column less", "a column that is unknown now"],
)
async def test_a_saved_group_with_other_columns_than_new_ones_is_not_replayed_and_the_run_is_told_why(
    tmp_path: Path, change: Callable[[RowTable], RowTable], said: str
) -> None:
    """It could not stand in a batch beside them."""
    buffer = ReplayBuffer(3)
    replay(await batch(0, [0, 1], [0, 2]), buffer, step=0)
    best, other = buffer.groups
    await save(ReplayBuffer(3, [replace(best, rows=change(best.rows)), other]), OBJECTS, tmp_path)
    found = await load(OBJECTS, tmp_path, {"tokens", "mask", "version", "group", "reward"})
    assert found.warning is not None and re.search(said, found.warning)
    again, metrics = replay(await batch(9, [1, 1], [2, 2]), ReplayBuffer(3, found.groups), step=1)
    assert groups_of(again) == [other.rows["group"][0], 10] and metrics["replay/groups_replaced"] == 1


async def test_a_saved_group_keeps_values_per_token_that_are_one_a_row(tmp_path: Path) -> None:
    rows = (await group(4, [0, 1])).with_values(advantages=[0.5, -0.5])
    await save(ReplayBuffer(1, [Kept(1.0, 0, rows)]), OBJECTS, tmp_path)
    (found,) = (await load(OBJECTS, tmp_path)).groups
    assert found.rows["advantages"].tolist() == [0.5, -0.5]
    assert groups_of(RowTable.concat([rows, found.rows])) == [4], "they are kept in the same way"


def test_ratios_of_replayed_samples_are_to_their_own_sampler_and_what_is_replayed_waits_for_no_batch_ahead() -> None:
    pipeline = build("grpo", {"replay_buffer_size": 8, "beta": 0.1, "updates_per_batch": 2})
    (update,) = pipeline.updates
    assert update.call is not None and "sample_logps" in columns_of(update.call, {})
    verbs = [stage.verb for stage in pipeline.learn]
    assert verbs[0] is Verb.REPLAY and verbs.index(Verb.INFER) == 1, (
        "the reference reads the rows that are learned from"
    )
    assert "old_logps" not in {name for stage in pipeline for name in stage.writes}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"replay_buffer_size": 8, "dynamic_sampling": True}, "leave out one of the two"),
        ({"replay_buffer_size": 8, "correction": "token_mask"}, "set options.correction=none"),
        ({"replay_max_age": 3}, "set options.replay_buffer_size"),
    ],
)
def test_options_that_do_not_go_with_replay_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build("grpo", options)


def test_a_pipeline_has_one_buffer() -> None:
    pipeline = build("grpo", {"replay_buffer_size": 8})
    (stage,) = (stage for stage in pipeline if stage.verb is Verb.REPLAY)
    with pytest.raises(ConfigError, match="one buffer"):
        Pipeline(pipeline.data, *list(pipeline)[:2], stage, stage)


def test_groups_are_drawn_by_their_scores_and_by_the_seed() -> None:
    buffer = ReplayBuffer(2, [Kept(99.0, 0, RowTable(Batch.empty())), Kept(1.0, 0, RowTable(Batch.empty()))])
    drawn = [buffer.draw(1, (seed, 0))[0].score for seed in range(100)]
    assert drawn == [buffer.draw(1, (seed, 0))[0].score for seed in range(100)]
    assert 90 <= drawn.count(99.0) < 100
    assert len(buffer.draw(5, (0, 0))) == 2
