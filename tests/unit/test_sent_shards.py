"""A shard reaches its rank in the call if it is small, else through the object store; the rank sees the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.sharding import Shard
from actors.worker import LocalObjects, Ref
from orchestrator.batches.batch_stages import SMALL_SHARD_BYTES
from orchestrator.batches.row_table import RowTable
from orchestrator.methods import build
from tests.local_executor import local_executor
from tests.unit.test_executor import Ranks

DPO = build("dpo", {})


@dataclass
class Kept(LocalObjects):
    """An object store that says what was put into it."""

    put_in: list[Any] = field(default_factory=list)

    async def put(self, value: Any) -> Ref:
        self.put_in.append(value)
        return await super().put(value)


def pairs(length: int) -> RowTable:
    """Two pairs, whose tokens are in the driver."""
    count = 4 * length
    columns = {"tokens": np.arange(count) % 50, "mask": np.arange(count) % length > 0}
    return RowTable(Batch.build([length] * 4, **columns, group=[0, 0, 1, 1], preferred=[True, False] * 2))


@pytest.mark.parametrize(("length", "small"), [(10, True), (SMALL_SHARD_BYTES // 20 - 20, True), (50_000, False)])
async def test_a_small_shard_travels_in_the_call_and_a_large_one_through_the_object_store(
    length: int, small: bool
) -> None:
    objects, policy, reference = Kept(), Ranks("policy", []), Ranks("reference", [])
    groups = {"policy": policy, "reference": reference}
    subject = local_executor(DPO, groups, token_budget=10 * length, objects=objects)
    table, _ = await subject.run([*DPO.collect, *DPO.learn], pairs(length), step=0)
    (learned,) = policy.seen[0]
    np.testing.assert_array_equal(learned["tokens"], table.rows["tokens"])
    np.testing.assert_array_equal(learned["ref_logps"], -table.rows["tokens"].astype(np.float32))
    assert learned["ref_logps"].any()
    (asked,), (given,) = reference.sent, policy.sent
    if small:
        assert isinstance(asked, Shard)
        assert isinstance(given, Shard)
        assert not objects.put_in
    else:
        assert all(isinstance(each, Ref) for each in (asked, given))
        assert all(isinstance(each, Shard) for each in objects.put_in)
        assert len(objects.put_in) == 2


def test_all_that_is_sent_with_a_shard_counts_as_its_size() -> None:
    length = 1_000
    whole = pairs(length).with_values(advantages=np.ones(4, np.float32)).whole().shard
    by_reference = RowTable(Batch.build([length] * 4)).with_blocks({"tokens"}, [(np.arange(4), Ref(None))])
    assert whole.nbytes() == 4 * 8 + 4 * length * (4 + 1) + 4 * (8 + 1) + 4 * 4
    assert by_reference.whole().shard.nbytes() == 4 * 8 + 2 * 4 * 8
