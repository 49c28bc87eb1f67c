"""Short requests that are asked at the same time share calls of rollout workers: engines are scripted ones, and the
workers are in this process and write down which calls they get."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.errors import DataFailure, InfraFailure
from actors.worker import LocalWorker
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.pool import Pool, PoolPolicy
from orchestrator.collection.joined_calls import MOST
from orchestrator.collection.joined_requests import SHORT, Requests
from rollout.engine import EngineSpec
from rollout.sampling import GroupMeta, Request, Sampling
from rollout.worker import RolloutWorker

POLICY = PoolPolicy(
    slots=64, max_attempts=2, call_timeout_s=60.0, start_timeout_s=60.0, max_restarts=9, ping_timeout_s=60.0
)


class Noting(LocalWorker):
    """`fatal`: the first call with several requests that arrives ends the worker."""

    def __init__(self, index: int, calls: list[str], *, fatal: bool, **options: Any) -> None:
        spec = EngineSpec("scripted", "no model", max_model_len=200_000, options=options)
        super().__init__(f"rollout/{index}", RolloutWorker(f"rollout/{index}", spec, initial_version=0))
        self.calls, self.fatal = calls, fatal

    async def call(self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, **kwargs: Any) -> Any:
        if method.startswith("generate") or method == "abort":
            asked = args[0] if isinstance(args[0], list) else [args[0]]
            self.calls.append(f"{method} {' '.join(each if method == 'abort' else each.id for each in asked)}")
            if self.fatal and method == "generate_all":
                await self.kill()
        return await super().call(method, *args, timeout_s=timeout_s, task_name=task_name, **kwargs)


@asynccontextmanager
async def requests_to(
    workers: int, *, fatal: tuple[int, ...] = (), **options: Any
) -> AsyncIterator[tuple[Requests, list[str]]]:
    calls: list[str] = []

    async def start(index: int) -> LocalWorker:
        return Noting(index, calls, fatal=index in fatal, **options)

    pool = Pool(
        "rollout",
        workers,
        POLICY,
        start=start,
        stop=lambda worker: worker.kill(),
        event=lambda kind, detail: None,
        watchdog=Watchdog(),
    )
    await pool.open()
    try:
        yield Requests(pool), calls
    finally:
        await pool.close()


def request(name: str, max_tokens: int = SHORT, prompt: tuple[int, ...] = (5, 6, 7)) -> Request:
    return Request(name, prompt, 2, Sampling(max_tokens), seed=sum(map(ord, name)))


async def sampled(requests: Requests, *asked: Request) -> list[tuple[GroupMeta, Batch] | BaseException]:
    found = await asyncio.gather(*map(requests.sample, asked), return_exceptions=True)
    return [each if isinstance(each, BaseException) else (each[0], each[1].target) for each in found]


def tokens(found: Any) -> list[int]:
    _, batch = found
    return batch["tokens"].tolist()


async def test_short_requests_share_calls_and_each_gets_the_samples_that_it_gets_alone() -> None:
    asked = [request(f"r{number}") for number in range(8)]
    async with requests_to(2) as (requests, calls):
        together = await sampled(requests, *asked)
        assert calls == ["generate_all r0 r1", "generate_all r2 r3", "generate_all r4 r5", "generate_all r6 r7"]
        assert requests._pool.load.take().peak == len(asked), "who scales the pool sees as much work as there is"
        alone = [(await sampled(requests, each))[0] for each in asked]
    assert calls[4:] == [f"generate r{number}" for number in range(8)]
    assert [tokens(each) for each in together] == [tokens(each) for each in alone]
    assert len({tuple(tokens(each)) for each in together}) == len(asked)
    assert [each[0].request_id for each in together if not isinstance(each, BaseException)] == [r.id for r in asked]


async def test_a_call_has_no_more_requests_than_it_may() -> None:
    async with requests_to(1) as (requests, calls):
        await sampled(requests, *(request(f"r{number}") for number in range(3 * MOST)))
    assert [call.count(" ") for call in calls] == [MOST] * 3


async def test_a_request_for_long_samples_has_a_call_of_its_own() -> None:
    async with requests_to(1) as (requests, calls):
        await sampled(requests, *(request(f"r{number}", max_tokens=SHORT + 1) for number in range(4)))
    assert calls == [f"generate r{number}" for number in range(4)]


async def test_a_request_that_can_never_run_fails_and_those_of_its_call_do_not() -> None:
    async with requests_to(1, data_failures="bad") as (requests, calls):
        bad, *others = await sampled(requests, *map(request, ("bad", "r1", "r2", "r3")))
    assert calls == ["generate_all bad r1", "generate_all r2 r3"]
    assert isinstance(bad, DataFailure)
    assert all(tokens(each) for each in others)


async def test_a_request_that_fails_in_a_joined_call_is_tried_again_alone() -> None:
    async with requests_to(1, infra_failures="unlucky") as (requests, calls):
        unlucky, *others = await sampled(requests, *map(request, ("unlucky", "r1", "r2", "r3")))
    assert calls[2:] == ["generate unlucky"] * POLICY.max_attempts
    assert isinstance(unlucky, InfraFailure)
    assert all(tokens(each) for each in others)


async def test_requests_of_a_worker_that_dies_are_asked_for_again_with_the_same_samples() -> None:
    asked = [request(f"r{number}") for number in range(4)]
    async with requests_to(1, fatal=(0,)) as (requests, calls):
        found = await sampled(requests, *asked)
        again = await sampled(requests, *asked)
    assert calls[0] == "generate_all r0 r1"
    assert len(calls) > 4, "the calls that the worker took with it, and those in their place"
    assert [tokens(each) for each in found] == [tokens(each) for each in again]


async def test_a_request_that_nobody_waits_for_is_aborted_and_those_of_its_call_are_not() -> None:
    script = {"5 6 7": [[8, 1]], "9": [[8] * SHORT]}
    async with requests_to(1, completions=script, seconds_per_step=0.001) as (requests, calls):
        given_up, *kept = (
            asyncio.ensure_future(requests.sample(each))
            for each in (request("a", prompt=(9,)), request("b"), request("c"), request("d"))
        )
        while len(calls) < 2:
            await asyncio.sleep(0)
        given_up.cancel()
        found = await asyncio.gather(*kept)
        with pytest.raises(asyncio.CancelledError):
            await given_up
    assert calls[2:] == ["abort a"]
    assert [meta.lengths for meta, _ in found] == [(2, 2)] * 3
    assert np.array_equal(found[0][1].target["tokens"], found[1][1].target["tokens"])


async def test_a_call_for_which_nobody_waits_leaves_nothing_in_the_engine() -> None:
    async with requests_to(1) as (requests, _):
        worker = next(iter(requests._pool.workers.values()))
        await worker.call("pause", timeout_s=60)  # so that no request ends by itself
        asked = [asyncio.ensure_future(requests.sample(request(name))) for name in "abcd"]
        async with asyncio.timeout(60):
            while (await worker.call("ping", timeout_s=60))["requests"] < len(asked):
                await asyncio.sleep(0.001)
            for each in asked:
                each.cancel()
            await asyncio.wait(asked)
            while (await worker.call("ping", timeout_s=60))["requests"]:
                await asyncio.sleep(0.001)
        assert all(each.cancelled() for each in asked)
