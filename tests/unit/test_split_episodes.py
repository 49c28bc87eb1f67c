"""Episodes each turn of which is a row: baselines and rewards are those of episodes."""

from __future__ import annotations

import numpy as np
import pytest

from actors.backends.single import SoloWorld
from actors.batch import Batch
from actors.worker import Ref
from orchestrator.batches.row_table import RowTable
from orchestrator.batches.split_episodes import by_episode, whole_episodes
from orchestrator.collection.samples import rows_of_turns
from orchestrator.credit.advantages import group_zscore, leave_one_out, mask_truncated, zscore_by_group
from orchestrator.credit.returns import reward_at_the_end, reward_less_kl
from rollout.sampling import Finish, GroupMeta, TurnRow

TURNS = (3, 1, 2, 2, 1)  # of five episodes, the first three of which are of one prompt
REWARDS = (1.0, 0.0, 0.25, 2.0, np.nan)
MEMBER = np.repeat(np.arange(len(TURNS)), TURNS)


def table() -> RowTable:
    parts: list[RowTable] = []
    for number, (turns, reward) in enumerate(zip(TURNS, REWARDS, strict=True)):
        rows = tuple(TurnRow(4 + turn, 2 + turn, 0.5 * turn) for turn in range(turns))
        finish = Finish.LENGTH if number == 2 else Finish.STOP
        meta = GroupMeta("e", "w", (9,), (finish,), 0, 0, 0.1, totals=(9,), turn_rows=rows)
        group = 7 if number < 3 else 2
        part = rows_of_turns(meta, Ref(None), group=group, sampler=0, number=number % 3)
        parts.append(part.with_values(reward=np.full(turns, reward)))
    return RowTable.concat(parts)


def test_an_episode_is_its_last_row_with_the_tokens_of_all() -> None:
    episodes, member = whole_episodes(table())
    assert member.tolist() == MEMBER.tolist() and episodes.lengths.tolist() == [6, 4, 5, 5, 4]
    assert episodes["completion_tokens"].tolist() == [9, 2, 5, 5, 2]
    assert episodes["group"].tolist() == [7, 7, 7, 2, 2]
    plain = table().without({"episode"})
    found, member = whole_episodes(plain)
    assert found is plain and member.tolist() == list(range(len(plain)))


@pytest.mark.parametrize("call", [group_zscore, leave_one_out])
def test_a_baseline_is_over_episodes_however_many_rows_they_have(call) -> None:  # type: ignore[no-untyped-def]
    found, naive = by_episode(call, table()), call(table())
    episodes = Batch.build([1] * 5, group=[7, 7, 7, 2, 2], reward=REWARDS)
    expected = call(RowTable(episodes))
    for name in ("advantages", "learned"):
        assert found[name].tolist() == expected[name][MEMBER].tolist()
    assert np.abs(naive["advantages"] - found["advantages"]).max() > 0.1, "siblings of one episode would bias it"
    if call is group_zscore:
        z = zscore_by_group(np.array(REWARDS), np.array([7, 7, 7, 2, 2]))
        assert found["advantages"].tolist() == z[MEMBER].tolist()


def test_an_episode_that_was_cut_is_left_out_whole() -> None:
    assert by_episode(mask_truncated, table())["learned"].tolist() == (MEMBER != 2).tolist()


def test_a_turn_earns_what_is_still_to_come() -> None:
    """Turns were given 0.5 each by the environment, and the whole is worth 2."""
    lengths = [2, 2, 2]
    given = {"turn_reward": [0, 0.5] * 3, "earlier_reward": [0.0, 0.5, 1.0], "episode": [0, 0, 0]}
    batch = Batch.build(lengths, mask=[False, True] * 3, reward=[2.0] * 3, **given)
    columns, _ = reward_at_the_end(batch, SoloWorld(), {})
    assert columns["step_reward"].tolist() == [0, 2.0, 0, 1.5, 0, 1.0]


def test_the_kl_that_is_taken_off_an_episode_s_reward_is_that_of_all_turns() -> None:
    """Of two episodes of one prompt with two turns and one, and one of another prompt with the same number."""
    logps = {"old_logps": [0, 1.0, 0, 2.0, 0, 4.0, 0, 8.0], "ref_logps": [0.0] * 8}
    numbers = {"group": [1, 1, 1, 2], "episode": [0, 0, 1, 0]}
    batch = Batch.build([2] * 4, mask=[False, True] * 4, reward=[10.0] * 4, **logps, **numbers)
    found, _ = reward_less_kl(batch, SoloWorld(), {}, coefficient=1.0)
    assert found["reward"].tolist() == [7.0, 7.0, 6.0, 2.0]
    alone, _ = reward_less_kl(batch.only(batch.columns.keys() - {"episode"}), SoloWorld(), {}, coefficient=1.0)
    assert alone["reward"].tolist() == [9.0, 8.0, 6.0, 2.0]
    empty, _ = reward_less_kl(batch.select([]), SoloWorld(), {}, coefficient=1.0)
    assert len(empty["reward"]) == 0
