"""Requests for short samples, asked of a pool of engines at the same time, share calls (`joined_calls.py`).

In the worker each is a request of its own, and its samples are those of a single call, because they are drawn from the
request's seed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.worker import Ref, Worker
from orchestrator.cluster.pool import Pool
from orchestrator.collection.episodes import abort
from orchestrator.collection.joined_calls import JoinedCalls
from rollout.sampling import GroupMeta, Request

SHORT = 32  # tokens: so many steps of the engine one request may wait for another of its call

Result = tuple[GroupMeta, Ref]


class Requests:
    """The requests to one pool of engines. Used from one event loop."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._joined = JoinedCalls[Request, Result](pool, _name, self._alone, self._together, _withdraw)

    async def sample(self, request: Request) -> Result:
        """Its samples. Raises DataFailure for a request that can never run, InfraFailure when the attempts are used up;
        if it is cancelled, the request is aborted."""
        if request.sampling.max_tokens <= SHORT:
            return await self._joined.ask(request)
        return await self._alone(request)

    async def _alone(self, request: Request) -> Result:
        async def work(worker: Worker) -> Result:
            try:
                deadline, name = self._pool.policy.call_timeout_s, f"{self._pool.role}.generate {request.id}"
                meta, block = await worker.call_split("generate", request, timeout_s=deadline, task_name=name)
                return meta, block
            except asyncio.CancelledError:
                await abort(worker, request.id)
                raise

        return await self._pool.call(request.id, work)

    async def _together(self, worker: Worker, requests: Sequence[Request], name: str) -> list[Result | Exception]:
        deadline, name = self._pool.policy.call_timeout_s, f"{self._pool.role}.generate {name}"
        outcomes, *blocks = await worker.call_split(
            "generate_all", requests, timeout_s=deadline, task_name=name, refs=len(requests)
        )
        pairs = zip(outcomes, blocks, strict=True)
        return [outcome if isinstance(outcome, Exception) else (outcome, block) for outcome, block in pairs]


def _name(request: Request) -> str:
    return request.id


async def _withdraw(worker: Worker, request: Request) -> None:
    await abort(worker, request.id)
