"""The episodes of a prompt group: each leases an environment worker and runs in a rollout worker.

    driver ── lease ──► environment worker ◄── open, step, end ──┐
       └───── episode(request, environment worker) ──► rollout worker ──► row, transcript

Each of a group's samples is an episode of its own: whichever process dies, only the episodes in it are generated again,
each from its start. A failure of the environment counts towards the attempts of its pool, one of the engine towards
those of the engines. Who ends a wait: the episode's own limits, and behind them the deadline of the call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actors.batch import Array
from actors.errors import DataFailure, InfraFailure
from actors.worker import Ref, Worker
from orchestrator.batches.row_table import RowTable
from orchestrator.cluster.pool import Pool
from orchestrator.collection.samples import rows_of_samples, rows_of_turns
from orchestrator.planning.episode_settings import EpisodeSettings
from rollout.episode import EnvironmentLost, EpisodeRequest
from rollout.sampling import EpisodeFacts, GroupMeta, Request, sample_seed

GRACE_S = 30.0  # for which an episode may be late whose limits have all passed
FORGET_TIMEOUT_S = 10.0
REWARD = "environment"  # what the environment's own reward is called among the others


@dataclass(frozen=True)
class Played:
    """A finished episode; and where what was said in it is."""

    meta: GroupMeta
    block: Ref
    transcript: Ref


class Episodes:
    """Episodes on pools of engines and environments, by role."""

    def __init__(self, engines: Mapping[str, Pool], environments: Mapping[str, Pool]) -> None:
        self.environments = environments
        self.settings: EpisodeSettings | None = None  # of the current phase
        self._engines = engines

    async def played(self, engine: str, prompt: Any, samples: Request) -> tuple[list[Played], tuple[str, ...]]:
        """Episodes of one prompt, as many as `samples` asks for, and why others failed. Raises InfraFailure or
        DataFailure if all of them did."""
        assert self.settings is not None, "the phase has no episodes"
        settings = self.settings
        requests = [
            EpisodeRequest(
                id=f"{samples.id}#{index}",
                phase=settings.phase,
                prompt=prompt.prompt,
                columns=prompt.columns,
                sampling=samples.sampling,
                seed=sample_seed(samples.seed, index),
                limits=replace(settings.limits, tokens=samples.sampling.max_tokens),
                parser=settings.parser,
                reward_weight=settings.reward_weight,
                group=samples.group,
                mixture=samples.mixture,
                split=settings.split,
            )
            for index in range(samples.n)
        ]
        found = await _all_or_failures([self._one(engine, settings.role, request) for request in requests])
        done = [each for each in found if isinstance(each, Played)]
        failed = [each for each in found if isinstance(each, Exception)]
        if not done:
            raise failed[0]
        return done, tuple(map(str, failed))

    async def _one(self, engine: str, environment: str, request: EpisodeRequest) -> Played:
        async def in_environment(host: Worker) -> Played | InfraFailure:
            ended = False
            try:
                meta, *refs = await self._on_engine(engine, request, host)
                ended = isinstance(meta, GroupMeta)
            except InfraFailure as error:  # no engine could: that is no failure of the environment
                return error
            finally:
                if not ended:
                    await _forget(host, request.id)
            if isinstance(meta, EnvironmentLost):
                raise meta.error
            return Played(meta, *refs)

        found = await self.environments[environment].call(request.id, in_environment)
        if isinstance(found, InfraFailure):
            raise found
        return found

    async def _on_engine(self, engine: str, request: EpisodeRequest, host: Worker) -> Any:
        pool, limits = self._engines[engine], request.limits
        deadline = limits.timeout_s + 3 * limits.call_timeout_s + GRACE_S  # open, the step that was begun, end

        async def work(worker: Worker) -> Any:
            try:
                name = f"{engine}.episode {request.id}"
                return await worker.call_split("episode", request, host, timeout_s=deadline, task_name=name, refs=2)
            except asyncio.CancelledError:
                await abort(worker, request.id)
                raise

        return await pool.call(request.id, work)


def rows_of(played: Sequence[Played], group: int, sampler: int, also: frozenset[str] = frozenset()) -> RowTable:
    """What the driver knows of finished episodes, beside where their tokens are. `also`: columns of the blocks."""
    also |= {"turn_reward"}
    tables: list[RowTable] = []
    for number, each in enumerate(played):
        if each.meta.turn_rows is None:
            tables.append(rows_of_samples(each.meta, each.block, group=group, sampler=sampler, also=also))
        else:
            tables.append(rows_of_turns(each.meta, each.block, group=group, sampler=sampler, also=also, number=number))
    return RowTable.concat(tables)


def rewards_of(facts: Sequence[EpisodeFacts]) -> Array:
    """[n] float32: what the environment gave each episode; NaN where nothing."""
    return np.array([np.nan if each.reward is None else each.reward for each in facts], np.float32)


async def abort(worker: Worker, request_id: str) -> None:
    """Cancel a request or an episode on its worker; if the worker is gone, so is the request."""
    with suppress(InfraFailure):
        await asyncio.shield(worker.call("abort", [request_id], timeout_s=10.0))


async def _forget(host: Worker, episode: str) -> None:
    """An episode that ended anyhow leaves nothing in its environment worker."""
    with suppress(InfraFailure, DataFailure):
        await asyncio.shield(host.call("end", episode, score=False, timeout_s=FORGET_TIMEOUT_S))


async def _all_or_failures(work: Sequence[Any]) -> list[Played | Exception]:
    """Each result, or the failure of that sample; any other error is raised. Nothing goes on after that."""

    async def one(each: Any) -> Played | Exception:
        try:
            return await each
        except (InfraFailure, DataFailure) as error:
            return error

    tasks = [asyncio.ensure_future(one(each)) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
