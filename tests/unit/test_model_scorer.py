"""Groups that wait for a model's scores at the same time are scored in one pass, and each gets its own."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from actors.batch import Batch
from actors.errors import InfraFailure
from actors.worker import Ref
from orchestrator.collection.model_scorer import ModelScorer
from orchestrator.row_table import RowTable


def group(number: int, rows: int) -> RowTable:
    block = Batch.build([1] * rows, tokens=[number] * rows, mask=[True] * rows)
    return RowTable.of_block(Batch.build([1] * rows, group=[number] * rows), Ref(block), {"tokens", "mask"})


class Passes:
    """A model that scores a row by its group and its place in the pass; a pass lasts until `may_end` is set."""

    def __init__(self, fails_on: int | None = None) -> None:
        self.groups: list[list[int]] = []
        self.may_end = asyncio.Event()
        self._fails_on = fails_on

    async def __call__(self, table: RowTable) -> np.ndarray:
        self.groups.append(table["group"].tolist())
        await self.may_end.wait()
        if self._fails_on in self.groups[-1]:
            raise InfraFailure("the ranks died")
        return table["group"] + np.arange(len(table)) / 100


async def test_what_waits_at_the_same_time_is_one_pass_and_what_comes_meanwhile_the_next() -> None:
    passes = Passes()
    scorer = ModelScorer(passes)
    first = [asyncio.ensure_future(scorer.score(group(number, rows))) for number, rows in ((1, 2), (2, 1))]
    await asyncio.sleep(0.01)
    later = [asyncio.ensure_future(scorer.score(group(number, 2))) for number in (3, 4)]
    await asyncio.sleep(0.01)
    assert passes.groups == [[1, 1, 2]]
    passes.may_end.set()
    scores = await asyncio.gather(*first, *later)
    assert passes.groups == [[1, 1, 2], [3, 3, 4, 4]]
    assert [found.tolist() for found in scores] == [[1.0, 1.01], [2.02], [3.0, 3.01], [4.02, 4.03]]


async def test_a_pass_that_fails_fails_its_own_groups_and_no_later_ones() -> None:
    passes = Passes(fails_on=2)
    scorer = ModelScorer(passes)
    failing = [asyncio.ensure_future(scorer.score(group(number, 1))) for number in (1, 2)]
    await asyncio.sleep(0.01)
    later = asyncio.ensure_future(scorer.score(group(3, 1)))
    passes.may_end.set()
    for each in failing:
        with pytest.raises(InfraFailure, match="the ranks died"):
            await each
    assert (await later).tolist() == [3.0]


async def test_a_group_that_is_given_up_does_not_keep_the_others_from_their_scores() -> None:
    passes = Passes()
    scorer = ModelScorer(passes)
    given_up, other = (asyncio.ensure_future(scorer.score(group(number, 1))) for number in (1, 2))
    await asyncio.sleep(0.01)
    given_up.cancel()
    passes.may_end.set()
    assert (await other).tolist() == [2.01]
    assert (await scorer.score(group(5, 1))).tolist() == [5.0], "and the next pass runs"
