"""What ranks need for a pass is with all of them before one begins it: a pass may be a collective."""

from __future__ import annotations

from typing import Any

import pytest

from actors.batch import Batch
from actors.errors import BlockLost
from actors.worker import LocalObjects, Ref
from orchestrator.batches.batch_stages import BatchStages, PhaseSettings
from orchestrator.batches.row_table import RowTable
from orchestrator.losses.likelihood import nll
from orchestrator.pipeline import Completions, Pipeline, infer, update
from rollout.sampling import Sampling

LOST = "the node that held it is gone"


class Ranks:
    """A group whose nodes cannot get the blocks of `lost`, and which notes what it is called for."""

    def __init__(self, ranks: int, lost: set[int]) -> None:
        self.workers, self.called, self._lost = range(ranks), list[str](), lost

    async def call(self, method: str, *, blocks: list[list[Ref]], **_: Any) -> list[None]:
        self._note(method, blocks)
        return [None] * len(self.workers)

    async def call_split(self, method: str, *_: Any, blocks: list[list[Ref]], **__: Any) -> list[tuple[None, Ref]]:
        self._note(method, blocks)
        return [(None, Ref(None))] * len(self.workers)

    def _note(self, method: str, blocks: list[list[Ref]]) -> None:
        self.called.append(method)
        if any(ref.target["tokens"][0] in self._lost for refs in blocks for ref in refs):
            raise BlockLost(LOST)


def table() -> RowTable:
    """Two groups of one row in a block of its own."""
    blocks = [Batch.build([3], tokens=[number] * 3, mask=[True] * 3) for number in (1, 2)]
    columns = {"tokens", "mask"}
    return RowTable.concat(
        RowTable.of_block(Batch.build([3], group=[number]), Ref(block), columns) for number, block in enumerate(blocks)
    )


def stages(group: Ranks) -> BatchStages:
    found = BatchStages({"reference": group}, LocalObjects(), call_timeout_s={"reference": 9.0}, stand_ins={})  # type: ignore[dict-item]
    found.enter(PhaseSettings(Pipeline(Completions, update("policy", nll)), 100, 1.0, 0, Sampling(max_tokens=9)))
    return found


STAGE = infer("reference", into="ref_logps")


async def test_no_rank_begins_a_pass_for_which_another_one_lacks_rows():
    group = Ranks(2, {2})
    with pytest.raises(BlockLost, match=LOST):
        await stages(group).run(STAGE, table(), 0)
    assert group.called == ["hold"]


@pytest.mark.parametrize(("ranks", "called"), [(2, ["hold", "infer"]), (1, ["infer"])])
async def test_ranks_get_their_rows_first_and_a_single_one_with_its_call(ranks: int, called: list[str]):
    group = Ranks(ranks, set())
    await stages(group).run(STAGE, table(), 0)
    assert group.called == called
