"""An elastic pool of workers: it carries out the decisions of `fleet` and sends calls to serving workers.

            decide                start / stop
    Fleet ───────► _reconcile ─────────────────► cluster
      ▲                 ▲ wakes: every tick, a death, a resize
      │ lost            │
    _monitor ── ping ── workers ◄── call(work) ── callers, each with a deadline and bounded attempts

Scaling, death and restart are one path: the desired number of members differs from the actual one. A worker joins only
after `admit` returned (for rollout workers: after it acknowledged the current weights).

Deadlines count work: a worker's start has one, and so has a call that a worker carries. Queueing for a free worker
(`pool_slots`) has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from actors.errors import BlockLost, InfraFailure, NoAnswer, WorkerDied
from actors.worker import Worker, WorkerInfo
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.fleet import Fleet, Member, Start, State, Stop
from orchestrator.cluster.pool_load import PoolLoad
from orchestrator.cluster.pool_policy import PoolPolicy
from orchestrator.cluster.pool_slots import Slots

SAID = {"version": 1, "tokens_per_s": 1, "kv_cache_use": 3}  # of members that say so when they are pinged: digits
T = TypeVar("T")
Event = Callable[[str, dict[str, Any]], None]


@dataclass(eq=False)
class _Call:
    """A call on a member, and whether that member died during it. `with_others`: it carried other calls at that time,
    any of which may be the cause."""

    worker_died: bool = False
    with_others: bool = False


class Pool:
    """Members of one elastic role. Used from one event loop."""

    def __init__(
        self,
        role: str,
        desired: int,
        policy: PoolPolicy,
        *,
        start: Callable[[int], Awaitable[Worker]],
        stop: Callable[[Worker], Awaitable[None]],
        event: Event,
        watchdog: Watchdog,
    ) -> None:
        self.role = role
        self.policy = policy
        self.fleet = Fleet(role, desired, policy.max_restarts, start_timeout_s=policy.start_timeout_s)
        self.workers: dict[int, Worker] = {}
        self.infos: dict[int, WorkerInfo] = {}
        self.health: dict[int, dict[str, Any]] = {}
        self.addresses: dict[int, str] = {}  # of members that were started elsewhere
        self.load = PoolLoad()
        self.wakes = False  # it is resized by itself when it has no worker and is called
        self._untried: dict[int, float] = {}  # member that returned nothing yet -> when its start began
        self.turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext  # held by calls and starts
        self.admit: Callable[[int], Awaitable[None]] = _at_once  # what a member that is up waits for before it serves
        self._start, self._stop = start, stop
        self.start_attached: Callable[..., Awaitable[Worker]] | None = None  # (index, address, token); None: cannot
        self._event, self._watchdog = event, watchdog
        self._slots = Slots(self.fleet, policy.slots, freed=self._stop_if_drained)
        self._wake = asyncio.Event()
        self._carried: dict[int, set[_Call]] = {}  # member -> what it works on
        self._tasks: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Start the desired members; returns when all of them are up (joining or serving)."""
        self._spawn(self._keep_reconciling())
        self._spawn(self._keep_pinging())
        await self.grow(self.fleet.desired)

    async def grow(self, count: int) -> None:
        """Start more members than there are; returns when `count` of them are up, or as many as are still desired."""
        self.fleet.desired = max(count, self.fleet.desired)
        self._wake.set()
        await self._until(
            lambda: self.count(State.JOINING, State.SERVING) >= min(count, self.fleet.desired),
            f"{count} {self.role} worker(s) to start",
            self.policy.start_timeout_s,
        )

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        workers, self.workers = list(self.workers.values()), {}
        await asyncio.gather(*(self._stop(worker) for worker in workers), return_exceptions=True)

    def resize(self, desired: int, *, why: str | None = None) -> None:
        """Change the desired number of members; takes effect at once, surplus members drain. With none, calls wait for
        the next resize. `why`: if nobody asked for it."""
        if desired != self.fleet.desired:
            waits = desired == 0 and not self.wakes
            paused = {"paused": f"whatever needs a {self.role} worker, until there is one again"} if waits else {}
            reason = {} if why is None else {"why": why}
            self._event("resized", {"role": self.role, "from": self.fleet.desired, "to": desired, **reason, **paused})
            self.fleet.desired = desired
            self._wake.set()

    @property
    def _places(self) -> int:
        """Calls that the members which serve can work on at a time."""
        return self.count(State.SERVING) * self.policy.places

    @property
    def paused(self) -> bool:
        """Whether it has no member because none is wanted, and calls do not change that."""
        return self.fleet.desired == 0 and not self.wakes and not self.addresses

    def attach(self, address: str, token: str, ticket: str) -> None:
        """Take in a worker that was started elsewhere. It is a member beyond the desired number: it joins like any
        other, and nothing takes its place when it is lost. One that is attached already stays as it is."""
        index = self._attached_as(address)
        if index is not None and self.fleet.members[index].state is State.DRAINING:
            why = f"the engine at {address} is leaving; attach it again when it has left"
            self._answer(ticket, "refused", address, why=why)
            return
        if index is None:
            assert self.start_attached is not None, f"{self.role} takes in no workers from elsewhere"
            index = self.fleet.attach(time.monotonic())
            self.addresses[index] = address
            self._spawn(self._bring_up(index, partial(self.start_attached, address=address, token=token)))
        self._answer(ticket, "attached", address, worker=index)

    def detach(self, address: str, ticket: str) -> None:
        """Let go of what was attached by that address, once it has finished what it has."""
        index = self._attached_as(address)
        if index is None:
            there = ", ".join(sorted(self.addresses.values())) or "none"
            why = f"no engine at {address} is attached to {self.role}; there is {there}"
            self._answer(ticket, "refused", address, why=why)
        else:
            self._answer(ticket, "detached", address, worker=index)
            self.fleet.detach(index, time.monotonic())
            self._wake.set()

    def _attached_as(self, address: str) -> int | None:
        members = self.fleet.members
        return next((i for i, each in self.addresses.items() if each == address and i in members), None)

    def _answer(self, ticket: str, event: str, address: str, **more: Any) -> None:
        self._event(event, {"role": self.role, "address": address, **more, "asked": [ticket]})

    def is_attached(self, index: int) -> bool:
        """Whether that member was started elsewhere."""
        return index in self.addresses

    def described(self) -> dict[str, Any]:
        """For those who look from outside: how many members are wanted and serve, without those that were started
        elsewhere, and each of all."""
        own = [member for member in self.fleet.members.values() if not member.attached]
        return {
            "desired": self.fleet.desired,
            "serving": sum(member.state is State.SERVING for member in own),
            "members": [self._described(member) for member in self.fleet.members.values()],
        }

    def _described(self, member: Member) -> dict[str, Any]:
        info, health = self.infos.get(member.index), self.health.get(member.index, {})
        where = {"node": info.node, "pid": info.pid} if info is not None else {}
        if member.index in self.addresses:
            where["address"] = self.addresses[member.index]
        said = {name: round(health[name], digits) for name, digits in SAID.items() if health.get(name) is not None}
        return {"index": member.index, "state": str(member.state), "calls": member.load, **where, **said}

    def count(self, *states: State) -> int:
        return sum(member.state in states for member in self.fleet.members.values())

    def indices(self, *states: State) -> list[int]:
        """Members in any of the states whose process is up, in order."""
        return sorted(i for i, m in self.fleet.members.items() if m.state in states and i in self.workers)

    async def call(
        self, key: str, work: Callable[[Worker], Awaitable[T]], *, items: int = 1, max_attempts: int | None = None
    ) -> T:
        """Run `work` on a serving member; on an InfraFailure on another one, up to `max_attempts` times, or as often as
        the policy says. The death of a worker counts as an attempt of a call that was alone with it, or that lost a
        worker before; of the others it does not. Other errors are the caller's. Raises InfraFailure when the attempts
        are used up, BlockLost at once if what the call needs is gone. `items`: as so many calls it counts in the
        pool's load, because so many would be made if they did not share one."""
        self.load.note(items, self._places)
        try:
            return await self._attempts(key, work, self.policy.max_attempts if max_attempts is None else max_attempts)
        finally:
            self.load.note(-items, self._places)

    async def _attempts(self, key: str, work: Callable[[Worker], Awaitable[T]], most: int) -> T:
        tried: frozenset[int] = frozenset()
        attempts = deaths = 0
        while True:
            alone = deaths >= self.policy.alone_after
            index = await (self._slots.take_alone(tried) if alone else self._slots.take(tried))
            call = _Call()
            self._carried.setdefault(index, set()).add(call)
            try:
                async with self.turn():
                    if index not in self.workers:  # lost while this waited for its turn
                        raise WorkerDied(f"{self.role}: worker {index} was lost before it began")
                    result = await work(self.workers[index])
                self._returned(index)
                return result
            except BlockLost:  # no worker would find it
                raise
            except InfraFailure as error:
                tried |= {index}
                await self._suspect(index, error)
                deaths += call.worker_died
                attempts += not (call.with_others and deaths == 1)
                detail = {"role": self.role, "worker": index, "key": key, "attempt": attempts, "why": str(error)}
                self._event("retry", detail)
                if attempts >= most:
                    raise InfraFailure(
                        f"{self.role}: {key} failed on {len(tried)} worker(s), the last time: {error}"
                    ) from error
            finally:
                self._carried.get(index, set()).discard(call)
                self._slots.give_back(index, alone)

    def _stop_if_drained(self, index: int) -> None:
        member = self.fleet.members.get(index)
        if member is not None and member.state is State.DRAINING and member.load == 0:
            self._wake.set()

    def _returned(self, index: int) -> None:
        """A call succeeded: if it is the member's first, how long that took since its start began is an event."""
        began = self._untried.pop(index, None)
        if began is not None:
            seconds = round(time.monotonic() - began, 3)
            self._event("first_result", {"role": self.role, "worker": index, "seconds": seconds})

    async def _suspect(self, index: int, error: InfraFailure) -> None:
        """After a failed call: evict the worker if it does not answer a ping, or if the call timed out and the policy
        kills on timeout."""
        if not (self.policy.kill_on_timeout and isinstance(error, NoAnswer)) and await self.answers(index):
            return
        await self.evict(index, str(error))

    async def evict(self, index: int, why: str, *, placed: bool = True) -> None:
        """Kill a member and forget it; a replacement is started by the reconciler. `placed`: a process of it ran."""
        if not self.fleet.lost(index, time.monotonic(), why, placed=placed):
            return
        self._event("evicted", {"role": self.role, "worker": index, "why": why})
        calls = self._carried.pop(index, set())
        for call in calls:
            call.worker_died, call.with_others = True, len(calls) > 1
        worker = self.workers.pop(index, None)
        self.infos.pop(index, None)
        self.addresses.pop(index, None)
        self._untried.pop(index, None)
        self._wake.set()
        if worker is not None:
            with contextlib.suppress(InfraFailure):
                await self._stop(worker)

    async def _keep_reconciling(self) -> None:
        while True:
            for action in self.fleet.decide(time.monotonic()):
                self._spawn(self._bring_up(action.index) if isinstance(action, Start) else self._take_down(action))
            self._notify()
            with contextlib.suppress(TimeoutError):  # the tick: waits for backoffs and late starts need no event
                async with asyncio.timeout(self.policy.ping_every_s):  # `wait_for` of 3.11 may lose a cancellation
                    await self._wake.wait()
            self._wake.clear()

    async def _bring_up(self, index: int, start: Callable[[int], Awaitable[Worker]] | None = None) -> None:
        self.fleet.waits(index)
        try:
            async with nullcontext() if start else self.turn():
                began = self._untried[index] = time.monotonic()
                self.fleet.begins(index, began)
                worker = await (start or self._start)(index)
                if index not in self.fleet.members:  # scaled down while it started
                    await self._stop(worker)
                    return
                self.workers[index] = worker
                self.infos[index] = await worker.call("ready", timeout_s=self.policy.start_timeout_s)
                self.fleet.ready(index, time.monotonic())
            seconds = round(time.monotonic() - began, 3)
            self._event("up", {"role": self.role, "worker": index, "seconds": seconds})
            self._notify()
            await self.admit(index)
            if index not in self.workers:  # evicted meanwhile
                return
            self.fleet.joined(index, time.monotonic())
        except InfraFailure as error:
            await self.evict(index, f"start failed: {error}", placed=index in self.workers)
            return
        seconds = round(time.monotonic() - began, 3)
        self._event("joined", {"role": self.role, "worker": index, "seconds": seconds, "pid": self.infos[index].pid})
        self._notify()

    async def _take_down(self, action: Stop) -> None:
        member = self.fleet.members.get(action.index)
        if member is not None and member.state is State.STARTING:  # too slow: a failure, unlike being scaled down
            await self.evict(action.index, action.why, placed=action.index in self.workers)
            return
        self.fleet.stopped(action.index)
        self._event("stopped", {"role": self.role, "worker": action.index, "why": action.why})
        self._untried.pop(action.index, None)
        self.addresses.pop(action.index, None)
        worker = self.workers.pop(action.index, None)
        if worker is not None:
            await self._stop(worker)

    async def _keep_pinging(self) -> None:
        while True:
            await asyncio.sleep(self.policy.ping_every_s)
            await asyncio.gather(
                *(self._check(index) for index in self.indices(State.JOINING, State.SERVING, State.DRAINING))
            )
            uses = [self.health.get(index, {}).get("kv_cache_use") for index in self.indices(State.SERVING)]
            if known := [use for use in uses if use is not None]:
                self.load.fills(sum(known) / len(known))

    async def _check(self, index: int) -> None:
        if not await self.answers(index):
            gone = f"did not answer a ping within {self.policy.ping_timeout_s:g} s, or its process is gone"
            health = self.health.get(index, {})
            await self.evict(index, gone if health.get("alive", True) else str(health.get("why", gone)))

    async def answers(self, index: int) -> bool:
        """Whether that worker answers a ping within the policy's time, and says that it is alive."""
        worker = self.workers.get(index)
        if worker is None:
            return False
        try:
            self.health[index] = await worker.call("ping", timeout_s=self.policy.ping_timeout_s)
        except InfraFailure:
            return False
        return bool(self.health[index].get("alive", True))

    async def _until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Ended by `_notify`; raises InfraFailure at the deadline, or whatever ended the reconciler. The deadline
        begins again when a process begins or ends, so that each start has its own, unless starts fail again and again.
        It is two ticks longer than that of a start, so that the fleet replaces a late worker first."""
        deadline, running = 0.0, None
        with self._watchdog.waiting(what, timeout_s):
            while not condition():
                if running is None or (running != set(self.workers) and not self.fleet.fails_to_start):
                    running = set(self.workers)
                    deadline = time.monotonic() + timeout_s + 2 * self.policy.ping_every_s
                try:
                    async with asyncio.timeout(deadline - time.monotonic()):
                        await self._slots.change()
                except TimeoutError:
                    states = {m.index: str(m.state) for m in self.fleet.members.values()}
                    raise InfraFailure(f"waited {timeout_s:g} s for {what}; members: {states or 'none'}") from None
        if self._slots.failure is not None:
            raise self._slots.failure

    def _notify(self) -> None:
        """The members have changed: what is free now is handed out, and the load is measured against other places."""
        self.load.note(0, self._places)
        self._slots.notify()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and self._slots.failure is None:
            self._slots.fail(error)


async def _at_once(index: int) -> None:
    """Admission without a condition."""
