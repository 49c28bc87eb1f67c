"""Roles that share a device take turns: one of them works, the others have given their memory back.

    at_work(role) ──► its turn? ──► yes: it joins those of its role that are at work
                          │
                          └─ no: waits ──► nobody is at work any more ──► the others sleep, it wakes ──► its turn

A turn lasts as long as calls of its role come in, so that the samples of a batch are drawn in one, but not longer than
`JOIN_S` if another role waits; then new calls queue behind that one. Who waits is let in when the calls before it end:
those have deadlines of their own, which do not run while they wait here.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from actors.errors import InfraFailure
from actors.worker import Group, Ref, Worker
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Pool

JOIN_S = 60.0  # for which a turn may go on when another role waits
SLEEP_TIMEOUT_S = 600.0  # to copy what a device holds to the host, or back
NEEDS_NO_DEVICE = frozenset({"finish_save", "hold", "ping"})  # verbs that a sleeping rank answers

Order = Callable[[str], Awaitable[None]]  # carries out `sleep` or `wake` on every process of a role


@dataclass(eq=False)
class _Waiting:
    role: str
    since: float
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Turns:
    """Of the roles on one device (or on the devices of one gang's bundles). Used from one event loop."""

    def __init__(self, join_s: float = JOIN_S) -> None:
        self._orders: dict[str, Order] = {}  # of the roles that have processes
        self._awake: set[str] = set()  # roles of which all processes are
        self._asleep: set[str] = set()  # likewise; a role that failed to fall asleep or to wake is neither
        self._turn: str | None = None
        self._at_work = 0  # calls of the role whose turn it is
        self._queue: deque[_Waiting] = deque()
        self._switching: asyncio.Task[None] | None = None
        self._join_s = join_s

    def joins(self, role: str, order: Order) -> None:
        """A role has processes now, which are awake; called in its turn."""
        self._orders[role] = order
        self._awake.add(role)

    def leaves(self, role: str) -> None:
        """Its processes have ended, and hold nothing."""
        self._orders.pop(role, None)
        self._awake.discard(role)
        self._asleep.discard(role)

    @asynccontextmanager
    async def at_work(self, role: str) -> AsyncIterator[None]:
        """Inside this context the role is awake, and every other one asleep. Raises what putting these to sleep, or
        waking it, raised. Must not be entered by who is inside it for another role."""
        if self._may_join(role):
            self._at_work += 1
        else:
            await self._wait(role)
        try:
            yield
        finally:
            self._at_work -= 1
            self._advance()

    def _may_join(self, role: str) -> bool:
        if self._switching is not None or self._turn != role:
            return False
        return not self._queue or time.monotonic() - self._queue[0].since < self._join_s

    async def _wait(self, role: str) -> None:
        waiting = _Waiting(role, time.monotonic())
        self._queue.append(waiting)
        self._advance()
        try:
            await waiting.admitted
        except asyncio.CancelledError:
            if waiting.admitted.done() and not waiting.admitted.cancelled() and not waiting.admitted.exception():
                self._at_work -= 1  # it was let in, and is not there any more
                self._advance()
            raise

    def _advance(self) -> None:
        """If nobody is at work, begin the turn of the role that has waited longest."""
        while self._queue and self._queue[0].admitted.done():  # cancelled
            self._queue.popleft()
        if self._at_work == 0 and self._queue and self._switching is None:
            self._switching = asyncio.ensure_future(self._switch(self._queue[0].role))

    async def _switch(self, role: str) -> None:
        failure: Exception | None = None
        try:
            if self._turn != role:
                self._turn = None
                for other in [each for each in self._orders if each != role and each not in self._asleep]:
                    await self._change(other, "sleep", self._awake, self._asleep)
            if role not in self._awake:
                await self._change(role, "wake", self._asleep, self._awake)
            self._turn = role
        except Exception as error:
            failure = error
        finally:
            self._switching = None
        let_in = [each for each in self._queue if each.role == role and not each.admitted.done()]
        self._queue = deque(each for each in self._queue if each.role != role)
        for each in let_in:
            if failure is None:
                self._at_work += 1
                each.admitted.set_result(None)
            else:
                each.admitted.set_exception(failure)
        self._advance()

    async def _change(self, role: str, verb: str, before: set[str], after: set[str]) -> None:
        """Some processes of a role may carry the verb out and others fail: it is in neither set then, and is given
        whichever verb comes next as a whole, also to those that have nothing left to do for it."""
        before.discard(role)
        if role in self._orders:
            await self._orders[role](verb)
        if role in self._orders:  # it may have ended meanwhile
            after.add(role)


class TurnGroup:
    """A role's ranks, whose calls wait for its turn."""

    def __init__(self, group: Group, turns: Turns) -> None:
        self.name = group.name
        self._group, self._turns = group, turns

        async def order(verb: str) -> None:
            await group.call(verb, timeout_s=SLEEP_TIMEOUT_S, task_name=f"{group.name}.{verb}")

        turns.joins(group.name, order)

    @property
    def workers(self) -> Sequence[Worker]:
        return self._group.workers

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Group]:
        async with self._turns.at_work(self.name):
            yield self._group

    async def call(
        self,
        method: str,
        *shared: Any,
        per_rank: Sequence[Any] | None = None,
        blocks: Sequence[Sequence[Ref]] | None = None,
        timeout_s: float,
        task_name: str | None = None,
    ) -> list[Any]:
        options: dict[str, Any] = {"per_rank": per_rank, "blocks": blocks, "task_name": task_name}
        if method in NEEDS_NO_DEVICE:
            return await self._group.call(method, *shared, **options, timeout_s=timeout_s)
        async with self.turn() as awake:
            return await awake.call(method, *shared, **options, timeout_s=timeout_s)

    async def call_split(
        self,
        method: str,
        *shared: Any,
        per_rank: Sequence[Any],
        blocks: Sequence[Sequence[Ref]],
        timeout_s: float,
        task_name: str | None = None,
    ) -> list[tuple[Any, Ref]]:
        options: dict[str, Any] = {"per_rank": per_rank, "blocks": blocks, "task_name": task_name}
        async with self.turn() as awake:
            return await awake.call_split(method, *shared, **options, timeout_s=timeout_s)

    async def kill(self) -> None:
        await self._group.kill()
        self._turns.leaves(self.name)


def takes_turns(pool: Pool, turns: Turns) -> None:
    """From now on the calls of a pool of engines, and the starts of its workers, wait for the turn of its role. A
    worker that does not fall asleep or wake is replaced."""

    async def order(verb: str) -> None:
        async def one(index: int) -> None:
            worker = pool.workers.get(index)
            if worker is None:  # lost meanwhile
                return
            try:
                await worker.call(verb, timeout_s=SLEEP_TIMEOUT_S, task_name=f"{pool.role}.{verb}")
            except InfraFailure as error:
                await pool.evict(index, f"{verb}: {error}")

        await asyncio.gather(*map(one, pool.indices(State.JOINING, State.SERVING, State.DRAINING)))

    turns.joins(pool.role, order)
    pool.turn = lambda: turns.at_work(pool.role)


def turns_of(shared: Collection[Collection[str]]) -> dict[str, Turns]:
    """By role, of each set of roles that share devices."""
    return {role: turns for roles in shared for turns in [Turns()] for role in roles}
