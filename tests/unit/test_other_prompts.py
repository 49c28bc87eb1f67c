"""Completions behind the prompts of a teacher: what its model says there arrives at the same completions' tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.columns import Head
from actors.distributions import TopK
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.other_prompts import FILL, INSERT, OtherPrompts, exchanged, returned
from actors.sharding import shard
from actors.specs import BackendSpec, OptimSpec
from orchestrator.batches.row_table import RowTable
from orchestrator.credit.advantages import demonstrated_by_siblings
from orchestrator.losses.distillation import TEACHER_TOP_K
from orchestrator.methods import build
from tests.local_executor import batch_stages, executor_of, steps
from tests.unit.tiny import tiny_model_folder

PROMPTS = [(5, 6, 7), (8,), (9, 10)]
COMPLETIONS = [(11, 12, 13), (14, 15), (16, 17, 18, 1)]
BUDGET = 24
K = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec(str(tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=32)))


def sampled(teachers: list[tuple[int, ...]], **columns: Any) -> Batch:
    """The completions behind their own prompts, with those of their teachers."""
    rows = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, COMPLETIONS, strict=True)]
    mask = [[False] * len(prompt) + [True] * len(answer) for prompt, answer in zip(PROMPTS, COMPLETIONS, strict=True)]
    width = max(map(len, teachers))
    return Batch.build(
        list(map(len, rows)),
        tokens=np.concatenate(rows),
        mask=np.concatenate(mask),
        sample_logps=np.full(sum(map(len, rows)), -1.0, np.float32),
        teacher_prompt=[[*prompt, *[FILL] * (width - len(prompt))] for prompt in teachers],
        completion_tokens=list(map(len, COMPLETIONS)),
        teacher_row_tokens=[len(t) + len(answer) for t, answer in zip(teachers, COMPLETIONS, strict=True)],
        group=[0, 0, 1],
        **columns,
    )


def worker(model: ModelSpec, *, trained: bool = False) -> ModelWorker:
    optim = OptimSpec(learning_rate=1e-2, total_steps=10) if trained else None
    made = ModelWorker("policy" if trained else "teacher", model, BackendSpec("single", optim), threads=1)
    made.ready()
    return made


def said(of: ModelWorker, batch: Batch, *, other_prompts: bool) -> Batch:
    ((order, part),) = shard(batch, 1, 64)
    asked = (*TEACHER_TOP_K, "teacher_logps"), Head.VOCABULARY, 0.8, True, TopK(K, 0.8)
    asked = (*asked, OtherPrompts() if other_prompts else None)
    return of.infer(part, *asked)[1].select(np.argsort(order))


def test_behind_the_prompts_that_the_rows_have_anyway_a_model_says_the_same_bit_for_bit(model: ModelSpec) -> None:
    teacher, batch = worker(model), sampled(PROMPTS)
    plain, found = (said(teacher, batch, other_prompts=other) for other in (False, True))
    assert np.ptp(plain["teacher_topk_logps"]) > 0.1
    for name in (*TEACHER_TOP_K, "teacher_logps"):
        np.testing.assert_array_equal(found[name], plain[name], err_msg=name)


def test_behind_longer_and_shorter_prompts_it_says_of_each_completion_s_token_what_it_says_there(
    model: ModelSpec,
) -> None:
    teacher, prompts = worker(model), [(20, 21, 22, 23, 24), (25, 26), (27,)]
    batch = sampled(prompts)
    other = exchanged(batch)
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, COMPLETIONS, strict=True)]
    assert [other.row("tokens", row).tolist() for row in range(3)] == rows
    there, found = said(teacher, other, other_prompts=False), said(teacher, batch, other_prompts=True)
    plain = said(teacher, batch, other_prompts=False)
    for row, answer in enumerate(COMPLETIONS):
        for name in (*TEACHER_TOP_K, "teacher_logps"):
            mine = found.row(name, row)
            np.testing.assert_array_equal(mine[-len(answer) :], there.row(name, row)[-len(answer) :])
            assert not mine[: -len(answer)].any()
        assert np.abs(found.row("teacher_logps", row) - plain.row("teacher_logps", row)).max() > 1e-3


def test_a_demonstration_stands_in_its_place_without_the_token_that_ended_it_or_leaves_no_gap() -> None:
    prompts = [(30, INSERT, 31), (32, INSERT), (33, INSERT)]
    truncated = np.array([False, True, False])
    batch = sampled(prompts, demonstration=[1, 0, -1], truncated=truncated)
    other = exchanged(batch)
    assert other.row("tokens", 0).tolist() == [30, 14, 15, 31, 11, 12, 13]  # the other's was cut: all of it is shown
    assert other.row("tokens", 1).tolist() == [32, 11, 12, 14, 15]
    assert other.row("tokens", 2).tolist() == [33, 16, 17, 18, 1]
    values = np.arange(other.num_tokens, dtype=np.float32)
    found = returned(Batch.build(other.lengths, teacher_logps=values), batch)
    assert found.row("teacher_logps", 0).tolist() == [0, 0, 0, 4, 5, 6]


def test_a_mask_that_skips_tokens_of_a_completion_skips_the_same_behind_another_prompt() -> None:
    batch = sampled([(20, 21), (22,), (23, 24, 25)])
    mask = batch["mask"].copy()
    mask[4] = False
    other = exchanged(batch.with_columns(mask=mask))
    assert other.row("mask", 0).tolist() == [False, False, True, False, True]


def test_behind_its_own_prompts_a_student_learns_what_it_would_without_others_and_behind_others_something_else(
    model: ModelSpec, tmp_path: Path
) -> None:
    """The divergence is the same, bit for bit, of a teacher with weights of its own. (The two methods weigh rows by
    their own reductions, so later steps differ.)"""
    older = ModelSpec(str(tiny_model_folder(tmp_path, hidden=32, seed=1)))
    options = {"teacher_top_k": K, "beta": 0.3, "importance_clip": None, "teacher": "base"}

    def learned(teachers: list[tuple[int, ...]]) -> list[dict[str, float]]:
        pipeline = build("sdft", {**options, "teacher_template": "{prompt}"})
        roles = {"policy": worker(model, trained=True), "reference": worker(older)}
        return steps(executor_of(pipeline, roles, token_budget=BUDGET), RowTable(sampled(teachers)), 3)

    pipeline = build("gkd", {"teacher_top_k": K, "beta": 0.3})
    roles = {"policy": worker(model, trained=True), "teacher": worker(older)}
    plain = steps(executor_of(pipeline, roles, token_budget=BUDGET), RowTable(sampled(PROMPTS)), 3)
    same, other = learned(PROMPTS), learned([(20, 21, 22, 23, 24), (25, 26), (27,)])
    assert same[0]["divergence"] == plain[0]["divergence"] > 1e-3
    assert abs(other[0]["divergence"] - same[0]["divergence"]) > 1e-4
    assert all(found[2]["divergence"] < found[0]["divergence"] for found in (same, other))


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_rank_has_the_demonstrations_of_its_rows_behind_them_in_no_micro_batch(ranks: int) -> None:
    prompts, truncated = [(30, INSERT), (31, INSERT), (32, INSERT)], np.array([False, True, False])
    batch = sampled(prompts, demonstration=[2, 2, 0], truncated=truncated)
    shares = RowTable(batch).shard_behind_teacher_prompts(ranks, BUDGET)
    assert sorted(np.concatenate([share.rows for share in shares]).tolist()) == [0, 1, 2]
    whole = exchanged(batch)
    for share in shares:
        mine = share.shard.fetched([])
        computed = [row for micro_batch in mine.micro_batches for row in micro_batch]
        assert sorted(computed) == list(range(len(share.rows)))
        other = exchanged(mine.batch)
        for at, row in enumerate(share.rows.tolist()):
            assert other.row("tokens", at).tolist() == whole.row("tokens", row).tolist()


def test_a_row_is_shown_the_next_sibling_that_is_right_and_not_learned_from_without_one() -> None:
    rewards = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, np.nan]
    table = RowTable(
        Batch.build(
            [4] * 7,
            reward=np.array(rewards, np.float32),
            group=[0, 0, 0, 1, 1, 2, 2],
            completion_tokens=[2, 3, 4, 1, 2, 3, 4],
            teacher_row_tokens=[10] * 7,
        )
    )
    found = demonstrated_by_siblings(table, threshold=1.0)
    assert found["demonstration"].tolist() == [1, 2, 1, 4, -1, -1, -1]
    assert found["learned"].tolist() == [True, True, True, True, False, False, False]
    assert found["teacher_row_tokens"].tolist() == [12, 13, 12, 11, 9, 9, 9]


def test_of_several_answers_the_wrong_ones_learn_from_a_right_one(model: ModelSpec) -> None:
    options = {"teacher_top_k": K, "teacher": "live", "importance_clip": None, "num_generations": 2}
    pipeline = build("sdpo", options)
    prompts = [(30, INSERT, 31), (30, INSERT, 31), (33, INSERT)]
    batch = sampled(prompts, reward=[0.0, 1.0, 1.0], truncated=np.zeros(3, np.bool_))
    executor = executor_of(pipeline, {"policy": worker(model, trained=True)}, token_budget=BUDGET)

    async def run() -> tuple[RowTable, dict[str, float]]:
        return await executor.run(batch_stages(pipeline), RowTable(batch), 0)

    table, metrics = asyncio.run(run())
    assert table["learned"].tolist() == [True, False, False]
    assert metrics["divergence"] > 1e-4 and metrics["grad_norm"] > 0
