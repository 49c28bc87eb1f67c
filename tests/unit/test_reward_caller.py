"""What is done around the calls of a reward function: its deadline, its retries, and what follows if it gives none."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from actors.errors import BudgetExhausted, DataFailure, Dropped, InfraFailure, NoAnswer
from actors.worker import LocalWorker
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.pool import Pool, PoolPolicy
from rewards.judge import Judge, JudgeSpec
from rewards.loading import RewardSpec
from rewards.named_actor import ActorSpec
from rewards.reward import LONGEST_PAUSE_S, Handling, pause_s
from rewards.specs import GRACE_S, call_timeout_s, with_concurrency, with_deadlines
from rewards.worker import RewardWorker, ScoreResult
from tests.unit.reward_stage import samples, tokenizer

__all__ = ["tokenizer"]  # a fixture

FUNCTIONS = """
import asyncio, time
calls = []

def hangs(completions, until):
    while not __import__("os").path.exists(until):
        time.sleep(0.01)
    return [1.0] * len(completions)

async def waits(completions):
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        calls.append("cancelled")
        raise

def recovers(completions, log_metric, after=2):
    calls.append(1)
    log_metric("call", len(calls))
    if len(calls) <= after:
        raise ConnectionError("the index is being loaded")
    return [1.0] * len(completions)

def seen(completions):
    return [float(len(calls))] * len(completions)

def two(completions):
    return [2.0] * len(completions)

at = most = 0

def alone(completions, until):
    global at, most
    calls.append("alone")
    at += 1
    most = max(at, most)
    hangs(completions, until)
    at -= 1
    return [float(most)] * len(completions)

def fails_beside(completions, until):
    while "alone" not in calls:
        time.sleep(0.01)
    if not __import__("os").path.exists(until):
        raise ValueError("no such column")
    return [0.0] * len(completions)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def spec(file: Path, function: str, options: dict[str, Any] | None = None, **handling: Any) -> RewardSpec:
    return RewardSpec(f"{file}:{function}", options=options or {}, handling=Handling(**handling)).located()


async def worker_of(tokenizer: str, *specs: RewardSpec) -> LocalWorker:
    worker = LocalWorker("reward/0", RewardWorker("reward/0", specs, tokenizer))
    await worker.call("ready", timeout_s=60)
    return worker


async def scored(worker: LocalWorker) -> ScoreResult:
    return (await worker.call("score", samples("abc", "xy"), "q", {}, timeout_s=60))[0]


async def test_an_async_function_is_cancelled_at_its_deadline_and_its_worker_stays(file: Path, tokenizer: str) -> None:
    worker = await worker_of(tokenizer, spec(file, "waits", timeout_s=0.1))
    with pytest.raises(InfraFailure, match=r"reward waits: no answer within 0\.1 s") as caught:
        await scored(worker)
    assert not isinstance(caught.value, NoAnswer), "for which the pool would kill the worker"
    assert (await worker.call("ping", timeout_s=60))["alive"]
    assert (await scored(await worker_of(tokenizer, spec(file, "seen")))).total.tolist() == [1.0, 1.0]


async def test_a_function_that_hangs_is_given_up_at_its_deadline_and_its_process_is_of_no_use_until_it_ends(
    file: Path, tokenizer: str, tmp_path: Path
) -> None:
    until = tmp_path / "go"
    hangs = spec(file, "hangs", {"until": str(until)}, timeout_s=0.1, retries=5, on_failure=0.5)
    worker = await worker_of(tokenizer, hangs, spec(file, "two"))
    result = await scored(worker)
    assert result.rewards.tolist() == [[0.5, 2.0], [0.5, 2.0]]
    assert result.calls[0].failures == {"timeout": 1}, "it is not tried again beside itself"
    health = await worker.call("ping", timeout_s=60)
    assert not health["alive"] and health["why"] == "the reward hangs hangs and cannot be stopped"
    until.touch()
    deadline = time.monotonic() + 60
    while not (await worker.call("ping", timeout_s=60))["alive"]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_for_a_function_that_hangs_the_pool_replaces_the_worker_and_tries_elsewhere(
    file: Path, tokenizer: str, tmp_path: Path
) -> None:
    until = tmp_path / "go"
    events: list[tuple[str, dict[str, Any]]] = []

    async def start(index: int) -> LocalWorker:
        if index:
            until.touch()
        hangs = spec(file, "hangs", {"until": str(until)}, timeout_s=60.0 if index else 0.2)
        return LocalWorker(f"reward/{index}", RewardWorker(f"reward/{index}", [hangs], tokenizer))

    policy = PoolPolicy(2, 2, 60.0, 30.0, 3, kill_on_timeout=True, ping_every_s=0.05)
    pool = Pool(
        "reward",
        1,
        policy,
        start=start,
        stop=lambda worker: worker.kill(),
        event=lambda kind, detail: events.append((kind, detail)),
        watchdog=Watchdog(),
    )
    await pool.open()
    try:
        result = await pool.call("prompt 0", scored)  # pyright: ignore[reportArgumentType]
        assert result.total.tolist() == [1.0, 1.0]
        evicted = [detail["why"] for kind, detail in events if kind == "evicted"]
        assert evicted == ["reward hangs: no answer within 0.2 s"]
    finally:
        await pool.close()


async def test_a_function_that_fails_is_tried_again_as_often_as_it_says_and_what_failed_leaves_no_log(
    file: Path, tokenizer: str
) -> None:
    result = await scored(await worker_of(tokenizer, spec(file, "recovers", retries=2)))
    assert result.total.tolist() == [1.0, 1.0]
    assert result.calls[0].failures == {"raised": 2} and result.calls[0].stood_in is None
    assert result.metrics == {"call": 3.0}


async def test_a_function_that_fails_more_often_than_it_is_tried_fails_with_its_last_error(
    file: Path, tokenizer: str
) -> None:
    with pytest.raises(DataFailure, match=r"recovers raised ConnectionError: the index .* \(attempt 2 of 2\)"):
        await scored(await worker_of(tokenizer, spec(file, "recovers", retries=1)))


async def test_a_function_without_retries_is_called_once(file: Path, tokenizer: str) -> None:
    with pytest.raises(DataFailure, match=r"the index is being loaded$"):
        await scored(await worker_of(tokenizer, spec(file, "recovers")))
    assert (await scored(await worker_of(tokenizer, spec(file, "seen")))).total.tolist() == [1.0, 1.0]


async def test_on_failure_of_a_function_decides_between_dropping_the_group_ending_the_run_and_a_constant(
    file: Path, tokenizer: str
) -> None:
    def failing(on_failure: Any) -> RewardSpec:
        return spec(file, "recovers", {"after": 99}, on_failure=on_failure)

    with pytest.raises(Dropped) as dropped:
        await scored(await worker_of(tokenizer, failing("drop")))
    assert dropped.value.reason == "reward recovers: raised"
    with pytest.raises(BudgetExhausted, match="of the reward recovers, on_failure=fail ends the run"):
        await scored(await worker_of(tokenizer, failing("fail")))
    result = await scored(await worker_of(tokenizer, failing(-1.0), spec(file, "two")))
    assert result.rewards.tolist() == [[-1.0, 2.0], [-1.0, 2.0]]
    assert [call.stood_in for call in result.calls] == [True, None]


async def test_a_failure_of_one_reward_is_not_held_up_by_another_and_gives_it_up(file: Path, tokenizer: str) -> None:
    worker = await worker_of(tokenizer, spec(file, "waits"), spec(file, "recovers"))
    began = time.monotonic()
    with pytest.raises(DataFailure, match="reward recovers raised"):
        await scored(worker)
    assert time.monotonic() - began < 20, "the other one waits for 30 s"
    seen = await worker_of(tokenizer, spec(file, "seen"))
    async with asyncio.timeout(60):
        while (await scored(seen)).total.tolist() != [2.0, 2.0]:  # one call, and one cancellation
            await asyncio.sleep(0.01)


async def test_a_function_that_is_given_up_for_another_one_s_failure_keeps_its_place_until_its_thread_ends(
    file: Path, tokenizer: str, tmp_path: Path
) -> None:
    until = tmp_path / "go"
    options = {"until": str(until)}
    alone = spec(file, "alone", options, concurrency=1)
    worker = await worker_of(tokenizer, alone, spec(file, "fails_beside", options))
    for _ in range(3):
        with pytest.raises(DataFailure, match="no such column"):
            await scored(worker)
    until.touch()
    assert (await scored(worker)).rewards[:, 0].tolist() == [1.0, 1.0], "more of it than one ran at the same time"
    seen = await scored(await worker_of(tokenizer, spec(file, "seen")))
    assert seen.total.tolist() == [2.0, 2.0], "those that waited for its place were given up with their samples"


async def test_a_function_that_hangs_after_it_was_given_up_is_told_of_as_any_other(
    file: Path, tokenizer: str, tmp_path: Path
) -> None:
    until = tmp_path / "go"
    options = {"until": str(until)}
    alone = spec(file, "alone", options, timeout_s=0.3, concurrency=1)
    worker = await worker_of(tokenizer, alone, spec(file, "fails_beside", options))
    health = await worker.call("ping", timeout_s=60)
    assert health["alive"]
    with pytest.raises(DataFailure, match="no such column"):
        await scored(worker)
    async with asyncio.timeout(20):
        while health["alive"]:
            await asyncio.sleep(0.05)
            health = await worker.call("ping", timeout_s=60)
    assert health["why"] == "the reward alone hangs and cannot be stopped"
    with pytest.raises(DataFailure, match="no such column"):
        await scored(worker)
    until.touch()
    assert (await scored(worker)).rewards[:, 0].tolist() == [1.0, 1.0], "it did not run beside itself"
    async with asyncio.timeout(20):
        while not (await worker.call("ping", timeout_s=60))["alive"]:
            await asyncio.sleep(0.02)


def test_pauses_grow_differ_and_end_at_a_limit_and_a_server_may_ask_for_longer_ones() -> None:
    assert all(0.125 <= pause_s(0) <= 0.25 and 1.0 <= pause_s(3) <= 2.0 for _ in range(50))
    assert len({pause_s(0) for _ in range(10)}) > 1
    assert pause_s(0, asked_for_s=3.0) == 3.0
    assert pause_s(5000) <= LONGEST_PAUSE_S and pause_s(0, asked_for_s=1e9) == LONGEST_PAUSE_S


def test_a_worker_s_call_lasts_as_long_as_the_attempts_that_it_may_make() -> None:
    plain = RewardSpec("exact_match")
    assert call_timeout_s([plain], 60.0, 4) == 60.0
    quick = RewardSpec("exact_match", handling=Handling(timeout_s=1.0))
    assert call_timeout_s([plain, quick], 60.0, 4) == 60.0
    patient = ActorSpec("ray://a/b", handling=Handling(timeout_s=50.0, retries=2, concurrency=2))
    assert call_timeout_s([plain, patient], 60.0, 4) == 2 * 3 * 50.0 + 2 * LONGEST_PAUSE_S + GRACE_S


def test_a_call_with_a_judge_lasts_as_long_as_all_questions_about_its_completions_may() -> None:
    judge = JudgeSpec((Judge(urls=("https://a/v1",), model="m"),), handling=Handling(50.0, retries=2, concurrency=10))
    (same,) = with_deadlines([judge], 7.0)
    turns = 3  # 2 calls with 4 completions each make 2 * 4 * 3 questions, which are asked ten at a time
    assert call_timeout_s([same], 60.0, 2, completions=4) == turns * 3 * 50.0 + 2 * LONGEST_PAUSE_S + GRACE_S
    by_engine = JudgeSpec((Judge(role="judge_rollout"),))
    assert with_deadlines([by_engine], 7.0) == [by_engine], "whose engines have deadlines of their own"


def test_a_function_without_a_limit_of_its_own_has_that_of_its_role() -> None:
    specs = [
        RewardSpec("exact_match"),
        RewardSpec("exact_match", handling=Handling(concurrency=2)),
        ActorSpec("ray://a/b"),
    ]
    assert [each.handling.concurrency for each in with_concurrency(specs, 7)] == [7, 2, None]


def test_an_actor_without_a_deadline_has_that_of_its_role_and_a_function_none_of_its_own() -> None:
    specs = [RewardSpec("exact_match"), ActorSpec("ray://a/b"), ActorSpec("ray://a/c", handling=Handling(timeout_s=7))]
    assert [each.handling.timeout_s for each in with_deadlines(specs, 60.0)] == [None, 60.0, 7]
