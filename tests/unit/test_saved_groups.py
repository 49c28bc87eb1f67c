"""Prompt groups that a checkpoint has: trained on once, or sampled again where they do not fit any more."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.batch import Batch
from actors.worker import Ref
from orchestrator.batches.row_table import RowTable
from orchestrator.collection import saved_groups
from orchestrator.collection.cursor import Cursor
from rewards.worker import ScoredTexts
from rollout.sampling import EpisodeFacts, Finish, GroupMeta, TurnRow
from tests.unit.collector_stage import Stages, collector, settled, step


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
