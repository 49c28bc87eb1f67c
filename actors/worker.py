"""How the driver speaks to an actor, whichever way it runs: `Worker` is one process, `Group` the ranks of a role.

`LocalWorker` and `LocalGroup` run everything in the driver's own process (`--local`, unit tests); `actors/group.py` has
the same two over Ray. A worker wraps a *plain object*: its public methods are the verbs, sync or async. Every call has
a deadline. A call that could not be carried out because the worker is dead, unreachable or too slow raises `NoAnswer`,
an `InfraFailure`; an exception of the method itself is raised as it is.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import platform
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from actors.errors import NoAnswer, WorkerDied

T = TypeVar("T")

NAMESPACE = "troupe"  # of all our actors, in Ray
BESIDE = {"ping": "health", "finish_save": "saving"}  # verbs that are answered while another runs -> their thread


@dataclass(frozen=True)
class WorkerInfo:
    """Who a worker is, as it reports itself once it is ready: `packages` is where it imported `actors` from."""

    name: str
    pid: int
    node: str
    packages: str
    detail: dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    node: str
    pid: int


@dataclass(frozen=True, eq=False)
class Ref:
    """A value that stays where it is: in the object store, or (locally) in this process. As an argument of `call` it
    reaches the method as the value."""

    target: Any


class Worker(Protocol):
    """A handle on one actor."""

    name: str

    @property
    def where(self) -> str:
        """Node and process, for messages."""
        ...

    @property
    def place(self) -> Place | None:
        """The same for programs; None before it is ready, and of what is no process of the run."""
        ...

    async def call(self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, **kwargs: Any) -> Any:
        """The method's result. `Ref` arguments arrive as values. `task_name` is what a dashboard shows."""
        ...

    async def call_split(
        self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, refs: int = 1
    ) -> tuple[Any, *tuple[Ref, ...]]:
        """For a method that returns a tuple: the first as a value, the `refs` others each as a `Ref`."""
        ...

    async def kill(self) -> None:
        """End the process now. Calls in flight raise InfraFailure. Killing twice is fine."""
        ...


class Group(Protocol):
    """The ranks of one role."""

    name: str

    @property
    def workers(self) -> Sequence[Worker]: ...

    def turn(self) -> AbstractAsyncContextManager[Group]:
        """The role's turn on a device that it shares: hold it around calls of single `workers`, and of the group that
        it gives. The calls below wait for it by themselves, so they are not for who holds it."""
        ...

    async def call(
        self,
        method: str,
        *shared: Any,
        per_rank: Sequence[Any] | None = None,
        blocks: Sequence[Sequence[Ref]] | None = None,
        timeout_s: float,
        task_name: str | None = None,
    ) -> list[Any]:
        """Call every rank at once; results in rank order. With `per_rank`, rank r's first argument is `per_rank[r]`;
        with `blocks`, its last arguments are `blocks[r]`. If one rank fails, its error is raised and the others are
        not waited for beyond the deadline."""
        ...

    async def call_split(
        self,
        method: str,
        *shared: Any,
        per_rank: Sequence[Any],
        blocks: Sequence[Sequence[Ref]],
        timeout_s: float,
        task_name: str | None = None,
    ) -> list[tuple[Any, Ref]]:
        """`call` of a method that returns a pair: of each rank the first as a value, the second as a `Ref`."""
        ...

    async def kill(self) -> None: ...


class Objects(Protocol):
    """Where `Ref`s come from and go to."""

    async def put(self, value: Any) -> Ref: ...

    async def get(self, ref: Ref, *, timeout_s: float) -> Any: ...


class LocalWorker:
    """The object itself. Sync methods run in a thread, one at a time (those of `BESIDE` excepted), also if the call of
    one is given up: as over Ray, it goes on, and the next one waits for its end. Async ones run on the loop."""

    def __init__(self, name: str, target: Any) -> None:
        self.name = name
        self.target = target
        self._one_at_a_time = asyncio.Lock()
        self._dead = asyncio.Event()

    @property
    def where(self) -> str:
        return f"pid {os.getpid()}, the driver's own"

    @property
    def place(self) -> Place | None:
        return Place(platform.node(), os.getpid())

    async def call(self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, **kwargs: Any) -> Any:
        if self._dead.is_set():
            raise WorkerDied(f"{self.name}.{method}: the worker was killed")
        args = tuple(arg.target if isinstance(arg, Ref) else arg for arg in args)
        work = asyncio.ensure_future(self._run(getattr(self.target, method), args, kwargs))
        death = asyncio.ensure_future(self._dead.wait())
        try:
            done, _ = await asyncio.wait({work, death}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                return work.result()
            if death in done:
                raise WorkerDied(f"{self.name}.{method}: the worker was killed")
            raise NoAnswer(f"{self.name}.{method}: the worker did not answer within {timeout_s:g} s")
        finally:
            work.cancel()
            death.cancel()

    async def call_split(
        self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, refs: int = 1
    ) -> tuple[Any, *tuple[Ref, ...]]:
        first, *others = await self.call(method, *args, timeout_s=timeout_s, task_name=task_name)
        assert len(others) == refs, f"{self.name}.{method} returned {1 + len(others)} values, {1 + refs} were asked for"
        return first, *map(Ref, others)

    async def kill(self) -> None:
        if not self._dead.is_set():
            self._dead.set()
            close = getattr(self.target, "close", None)
            if close is not None:
                await asyncio.to_thread(close)

    async def _run(self, bound: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(bound):
            return await bound(*args, **kwargs)
        if bound.__name__ == "ping":
            return bound(*args, **kwargs)
        if bound.__name__ in BESIDE:
            return await asyncio.to_thread(bound, *args, **kwargs)
        async with self._one_at_a_time:
            return await to_the_end(partial(bound, *args, **kwargs))


class LocalGroup:
    """A role of one rank in this process."""

    def __init__(self, name: str, worker: LocalWorker) -> None:
        self.name = name
        self.workers = (worker,)

    def turn(self) -> AbstractAsyncContextManager[Group]:
        return nullcontext(self)

    async def call(
        self,
        method: str,
        *shared: Any,
        per_rank: Sequence[Any] | None = None,
        blocks: Sequence[Sequence[Ref]] | None = None,
        timeout_s: float,
        task_name: str | None = None,
    ) -> list[Any]:
        first = () if per_rank is None else (per_rank[0],)
        last = () if blocks is None else blocks[0]
        return [await self.workers[0].call(method, *first, *shared, *last, timeout_s=timeout_s, task_name=task_name)]

    async def call_split(
        self,
        method: str,
        *shared: Any,
        per_rank: Sequence[Any],
        blocks: Sequence[Sequence[Ref]],
        timeout_s: float,
        task_name: str | None = None,
    ) -> list[tuple[Any, Ref]]:
        arguments = (per_rank[0], *shared, *blocks[0])
        value, ref = await self.workers[0].call_split(method, *arguments, timeout_s=timeout_s, task_name=task_name)
        return [(value, ref)]

    async def kill(self) -> None:
        await self.workers[0].kill()


class LocalObjects:
    """References that are the values."""

    async def put(self, value: Any) -> Ref:
        return Ref(value)

    async def get(self, ref: Ref, *, timeout_s: float) -> Any:
        return ref.target


async def to_the_end(work: Callable[[], T]) -> T:
    """In a thread. Returns or raises only when it is over: a thread cannot be cancelled, and what it works on must not
    be removed or used by others meanwhile. Whoever must not wait for so long awaits this in a task of its own."""
    working = asyncio.ensure_future(asyncio.to_thread(work))
    working.add_done_callback(consume_exception)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise


async def all_or_first_error(work: Iterable[Awaitable[T]]) -> list[T]:
    """All results, or the first error; nothing goes on after that."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def consume_exception(future: asyncio.Future[Any]) -> None:
    """A done callback: consumes the exception of an abandoned call so that asyncio does not log it."""
    if not future.cancelled():
        future.exception()
