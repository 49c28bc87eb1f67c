"""Collection by row: batches in order, and the stages before learning."""

import pytest

from orchestrator.collection.cursor import Cursor
from orchestrator.collection.row_collector import RowCollector
from tests.unit.collector_stage import Endless, Stages, settled


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
