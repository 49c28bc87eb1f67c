"""Groups that wait for a model's scores at the same time are scored in one call, and each gets its own."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from actors.backends import BackendSpec
from actors.backends.optimizer import OptimSpec
from actors.batch import Batch
from actors.columns import Head
from actors.errors import InfraFailure
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.worker import Ref
from orchestrator.collection.model_scorer import ModelScorer
from orchestrator.executor import Executor
from orchestrator.losses.likelihood import nll
from orchestrator.losses.reduce import token_mean
from orchestrator.pipeline import Completions, Pipeline, infer, update
from orchestrator.row_table import RowTable
from tests.local_executor import in_process, local_executor
from tests.unit.tiny import tiny_model_folder


async def settled() -> None:
    """Until everything has happened that nobody waits for: in turns of the event loop, whatever time they take."""
    for _ in range(20):
        await asyncio.sleep(0)


def group(number: int, rows: int) -> RowTable:
    """Rows of `number` tokens."""
    lengths = [number] * rows
    block = Batch.build(lengths, tokens=[7] * sum(lengths), mask=[True] * sum(lengths))
    return RowTable.of_block(Batch.build(lengths, group=[number] * rows), Ref(block), {"tokens", "mask"})


class Passes:
    """A model that scores a row by its length and its place in the call; a call lasts until `may_end` is set."""

    def __init__(self, fails_on: int | None = None) -> None:
        self.groups: list[list[int]] = []
        self.apart: list[list[int]] = []
        self.may_end = asyncio.Event()
        self._fails_on = fails_on

    async def __call__(self, table: RowTable) -> RowTable:
        self.groups.append(table.lengths.tolist())
        self.apart.append(table["group"].tolist())
        await self.may_end.wait()
        if self._fails_on in self.groups[-1]:
            raise InfraFailure("the ranks died")
        return table.with_values(reward=table.lengths + np.arange(len(table)) / 100).only({"reward"})


async def said(scorer: ModelScorer, rows: RowTable) -> np.ndarray:
    return (await scorer.score(rows))["reward"]


def rounded(rewards: np.ndarray) -> list[float]:
    return [round(float(reward), 4) for reward in rewards]


async def test_what_waits_at_the_same_time_is_one_call_and_what_comes_meanwhile_the_next() -> None:
    passes = Passes()
    scorer = ModelScorer(passes)
    first = [asyncio.ensure_future(said(scorer, group(number, rows))) for number, rows in ((1, 2), (2, 1))]
    await settled()
    later = [asyncio.ensure_future(said(scorer, group(number, 2))) for number in (3, 4)]
    await settled()
    assert passes.groups == [[1, 1, 2]]
    passes.may_end.set()
    scores = await asyncio.gather(*first, *later)
    assert passes.groups == [[1, 1, 2], [3, 3, 4, 4]]
    assert passes.apart == [[0, 0, 1], [0, 0, 1, 1]], "what came together is told apart from what did not"
    assert [rounded(found) for found in scores] == [[1.0, 1.01], [2.02], [3.0, 3.01], [4.02, 4.03]]


async def test_a_call_that_fails_fails_its_own_groups_and_no_later_ones() -> None:
    passes = Passes(fails_on=2)
    scorer = ModelScorer(passes)
    failing = [asyncio.ensure_future(said(scorer, group(number, 1))) for number in (1, 2)]
    await settled()
    later = asyncio.ensure_future(said(scorer, group(3, 1)))
    passes.may_end.set()
    for each in failing:
        with pytest.raises(InfraFailure, match="the ranks died"):
            await each
    assert rounded(await later) == [3.0]


async def test_a_cancelled_group_does_not_prevent_the_scores_of_the_others() -> None:
    passes = Passes()
    scorer = ModelScorer(passes)
    given_up, other = (asyncio.ensure_future(said(scorer, group(number, 1))) for number in (1, 2))
    await settled()
    given_up.cancel()
    passes.may_end.set()
    assert rounded(await other) == [2.01]
    assert rounded(await said(scorer, group(5, 1))) == [5.0], "and the next call is made"


@pytest.fixture
def judge(tmp_path: Path) -> Executor:
    """An executor whose `reward_model` is a tiny model with a head that gives a number."""
    model = ModelSpec(str(tiny_model_folder(tmp_path)), head=Head.ROW_SCALAR)
    worker = ModelWorker("reward_model", model, BackendSpec("single", OptimSpec(1e-3, total_steps=1)), threads=1)
    worker.ready()
    pipeline = Pipeline(Completions, update("policy", nll, reduce=token_mean))
    return local_executor(pipeline, {"reward_model": in_process("reward_model", worker)}, token_budget=4096)


def sampled(position: int, rows: int) -> RowTable:
    """A prompt with `rows` completions, of random tokens and lengths."""
    drawn = np.random.default_rng(position)
    lengths = drawn.integers(5, 14, rows)
    block = Batch.build(lengths, tokens=drawn.integers(2, 60, lengths.sum()), mask=[True] * int(lengths.sum()))
    return RowTable.of_block(Batch.build(lengths, group=[position] * rows), Ref(block), {"tokens", "mask"})


@pytest.mark.parametrize("rows", [1, 3])
async def test_a_group_has_the_same_scores_to_the_bit_whatever_other_groups_wait_with_it(
    judge: Executor, rows: int
) -> None:
    scorer = ModelScorer(partial(judge.batch_stages.scores, "reward_model"))
    groups = [sampled(position, rows) for position in range(12)]
    alone = [await said(scorer, each) for each in groups]
    few = await asyncio.gather(*(said(scorer, each) for each in groups[:5]))
    all_at_once = await asyncio.gather(*(said(scorer, each) for each in groups))
    assert [each.tobytes() for each in few] == [each.tobytes() for each in alone[:5]]
    assert [each.tobytes() for each in all_at_once] == [each.tobytes() for each in alone]
    assert len(np.unique(alone)) == 12 * rows, "and every row has a score of its own"


async def test_in_one_pass_with_others_a_row_may_score_otherwise_in_the_last_bits(judge: Executor) -> None:
    """Why groups that are scored in one call have passes of their own: without them this is what would happen."""
    groups = [sampled(position, 1) for position in range(12)]
    alone = np.concatenate([(await judge.batch_stages.scores("reward_model", each))["reward"] for each in groups])
    stage = infer("reward_model", into="reward", head=Head.ROW_SCALAR)
    in_one_pass = (await judge.run([stage], RowTable.concat(groups)))[0]["reward"]
    np.testing.assert_allclose(in_one_pass, alone, rtol=1e-4, atol=1e-5)
    assert (in_one_pass != alone).any()
