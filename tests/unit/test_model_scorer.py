"""Groups that wait for a model's scores at the same time are scored in one call, and each gets its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.backends import BackendSpec
from actors.backends.optimizer import OptimSpec
from actors.batch import Batch
from actors.columns import Head
from actors.errors import InfraFailure
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.sharding import PASS_TOKENS
from actors.worker import Ref
from orchestrator.batches.row_table import RowTable
from orchestrator.collection.model_scorer import ModelScorer
from orchestrator.credit.step_rewards import Steps
from orchestrator.executor import Executor
from orchestrator.losses.likelihood import nll
from orchestrator.losses.reduce import token_mean
from orchestrator.pipeline import Completions, Pipeline, infer, update
from tests.local_executor import in_process, local_executor
from tests.unit.tiny import tiny_model_folder, tiny_tokenizer


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
    scorer = ModelScorer(passes, gather_s=0)
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


async def test_a_group_with_more_columns_than_another_one_shares_its_call() -> None:
    """As a group of the training does that is sampled while an evaluation goes on."""
    passes = Passes()
    passes.may_end.set()
    scorer, wide = ModelScorer(passes), group(3, 2).with_values(sample=np.arange(2))
    of_wide, of_narrow = await asyncio.gather(said(scorer, wide), said(scorer, group(5, 1)))
    assert passes.groups == [[3, 3, 5]], "one call"
    assert rounded(of_wide) == [3.0, 3.01] and rounded(of_narrow) == [5.02]


async def test_a_call_that_fails_fails_its_own_groups_and_no_later_ones() -> None:
    passes = Passes(fails_on=2)
    scorer = ModelScorer(passes, gather_s=0)
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
    scorer = ModelScorer(passes, gather_s=0)
    given_up, other = (asyncio.ensure_future(said(scorer, group(number, 1))) for number in (1, 2))
    await settled()
    given_up.cancel()
    passes.may_end.set()
    assert rounded(await other) == [2.01]
    assert rounded(await said(scorer, group(5, 1))) == [5.0], "and the next call is made"


def dense(folder: Path) -> str:
    return str(tiny_model_folder(folder))


def with_experts(folder: Path) -> str:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": None}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.0}
    config = Qwen3MoeConfig(**sizes, **heads, **experts, eos_token_id=1, initializer_range=0.3)
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "moe")
    tiny_tokenizer().save_pretrained(folder / "moe")
    return str(folder / "moe")


def executor_with(model: str, head: Head, threads: int = 1) -> Executor:
    """An executor whose `reward_model` has a head that gives numbers."""
    backend = BackendSpec("single", OptimSpec(1e-3, total_steps=1))
    worker = ModelWorker("reward_model", ModelSpec(model, head=head), backend, threads=threads)
    worker.ready()
    pipeline = Pipeline(Completions, update("policy", nll, reduce=token_mean))
    return local_executor(pipeline, {"reward_model": in_process("reward_model", worker)}, token_budget=4096)


@pytest.fixture
def judge(tmp_path: Path) -> Executor:
    return executor_with(dense(tmp_path), Head.ROW_SCALAR)


def sampled(position: int, rows: int) -> RowTable:
    """A prompt with `rows` completions, of random tokens and lengths."""
    drawn = np.random.default_rng(position)
    lengths = drawn.integers(5, 14, rows)
    block = Batch.build(lengths, tokens=drawn.integers(2, 60, lengths.sum()), mask=[True] * int(lengths.sum()))
    return RowTable.of_block(Batch.build(lengths, group=[position] * rows), Ref(block), {"tokens", "mask"})


def mixed(position: int) -> RowTable:
    """Small groups and large ones, rows of a group beginning alike."""
    drawn = np.random.default_rng(position)
    lengths = drawn.integers(6, 40, 12 if position % 5 == 0 else drawn.integers(1, 5))
    prompt = drawn.integers(2, 60, 4)
    tokens = np.concatenate([[*prompt, *drawn.integers(2, 60, length - 4)] for length in lengths])
    block = Batch.build(lengths, tokens=tokens, mask=[True] * int(lengths.sum()))
    return RowTable.of_block(Batch.build(lengths, group=[position] * len(lengths)), Ref(block), {"tokens", "mask"})


@pytest.mark.parametrize("head", [Head.ROW_SCALAR, Head.STEP_SCALAR])
@pytest.mark.parametrize("made", [dense, with_experts])
async def test_a_group_has_the_same_scores_to_the_bit_whatever_other_groups_wait_with_it(
    tmp_path: Path, made: Callable[[Path], str], head: Head
) -> None:
    judge = executor_with(made(tmp_path), head)
    steps = Steps("each", ";").found_in(tiny_tokenizer()) if head is Head.STEP_SCALAR else None
    scorer = ModelScorer(partial(judge.batch_stages.scores, "reward_model", steps=steps), gather_s=0)
    groups = [mixed(position) for position in range(16)]

    async def scores(*chosen: int) -> list[bytes]:
        return [each.tobytes() for each in await asyncio.gather(*(said(scorer, groups[index]) for index in chosen))]

    alone = [(await scores(index))[0] for index in range(16)]
    drawn = np.random.default_rng(1)
    for count in (2, 5, 9, 16):
        chosen = drawn.permutation(16)[:count].tolist()
        assert await scores(*chosen) == [alone[index] for index in chosen]
    every = np.frombuffer(b"".join(alone), np.float32)
    assert len(np.unique(every)) == len(every), "and every row has a score of its own"


async def test_a_row_that_is_padded_and_one_that_is_not_score_the_same_but_for_rounding(judge: Executor) -> None:
    stage = infer("reward_model", into="reward", head=Head.ROW_SCALAR)
    groups = [mixed(position) for position in range(16)]
    own = (await judge.run([stage], RowTable.concat(groups)))[0]["reward"]
    found = [(await judge.batch_stages.scores("reward_model", each))["reward"] for each in groups]
    np.testing.assert_allclose(np.concatenate(found), own, rtol=1e-4, atol=1e-5)


async def test_a_group_waits_for_others_until_a_pass_is_full_or_its_time_is_up() -> None:
    passes = Passes()
    passes.may_end.set()
    patient = ModelScorer(passes, gather_s=3600.0)
    await asyncio.gather(*(said(patient, group(PASS_TOKENS // 2, 1)) for _ in range(2)))
    assert passes.groups == [[PASS_TOKENS // 2] * 2], "they fill a pass: nobody waits for the hour to end"
    lonely = asyncio.ensure_future(said(patient, group(PASS_TOKENS // 2 - 1, 1)))
    await settled()
    assert not lonely.done() and len(passes.groups) == 1
    lonely.cancel()
    assert rounded(await said(ModelScorer(passes, gather_s=0.001), group(3, 1))) == [3.0]


async def test_in_one_pass_with_others_a_row_may_score_otherwise_in_the_last_bits(judge: Executor) -> None:
    """Why groups that are scored in one call have passes of their own: without them this is what would happen."""
    groups = [sampled(position, 1) for position in range(12)]
    alone = np.concatenate([(await judge.batch_stages.scores("reward_model", each))["reward"] for each in groups])
    stage = infer("reward_model", into="reward", head=Head.ROW_SCALAR)
    in_one_pass = (await judge.run([stage], RowTable.concat(groups)))[0]["reward"]
    np.testing.assert_allclose(in_one_pass, alone, rtol=1e-4, atol=1e-5)
    assert (in_one_pass != alone).any()
