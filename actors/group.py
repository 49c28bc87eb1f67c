"""Workers and groups over Ray: plain classes become actors, and Ray's exceptions become ours.

    driver (asyncio) ── RayWorker.call("update", shard) ──► main group: one call at a time (sync targets),
                                                            or all of them on one event loop (async targets)
                     ── RayWorker.call("ping") ───────────► health group: a thread of its own, so that it
                                                            answers while the main group works or hangs
                     ── RayWorker.call("finish_save") ────► saving group: likewise

Every wait has a deadline. A call that cannot be carried out (dead process, lost node, out-of-memory kill, deadline)
raises `NoAnswer`, an `InfraFailure`; an exception of the method itself is raised as it is.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorClass
from ray.exceptions import ActorDiedError, ObjectLostError, RayError, RayTaskError

from actors.errors import BlockLost, InfraFailure, NoAnswer, WorkerDied, first_lines
from actors.worker import BESIDE, NAMESPACE, Place, Ref, WorkerInfo, consume_exception

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")

ASYNC_CONCURRENCY = 1000  # calls on one event loop: more than ever run, so that Ray queues none
GRACE_S = 2.0  # how long to wait, after a rank failed, for the death of another rank


class RayWorker:
    """A handle on one actor of the cluster. Safe to use from one event loop."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self.handle = handle
        self.info: WorkerInfo | None = None  # once `ready` has answered
        self.is_single_rank = True  # else of a gang: a call of it may be a collective that others have begun
        self._born = time.monotonic()

    def __repr__(self) -> str:
        return f"RayWorker({self.name})"

    async def call(self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, **kwargs: Any) -> Any:
        ref = self._submit(method, args, kwargs, task_name)
        result = await self._result(ref, method, timeout_s)
        if isinstance(result, WorkerInfo):
            self.info = result
        return result

    async def call_split(
        self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, refs: int = 1
    ) -> tuple[Any, *tuple[Ref, ...]]:
        first, *others = self._submit(method, args, {}, task_name, num_returns=1 + refs)
        return await self._result(first, method, timeout_s), *map(Ref, others)

    async def kill(self) -> None:
        ray.kill(self.handle, no_restart=True)

    def _submit(self, method: str, args: tuple, kwargs: dict[str, Any], task_name: str | None, **options: Any) -> Any:
        """Start the call. `Ref` arguments are passed as top-level references, which Ray resolves on the worker's
        node."""
        label = task_name or f"{_label(self.name)}.{method}"
        bound = getattr(self.handle, method).options(name=label, enable_task_events=method != "ping", **options)
        return bound.remote(*map(_target, args), **{name: _target(value) for name, value in kwargs.items()})

    async def _result(self, ref: ObjectRef, method: str, timeout_s: float) -> Any:
        """The value of `ref`. If the wait ends earlier (deadline, cancellation), the call is cancelled: an async method
        at once, a sync one unless it is running. Calls of a gang's ranks are not: to cancel
        one that is still queued would leave the other ranks blocked in their collective."""
        started = time.monotonic()
        future = asyncio.wrap_future(ref.future())
        future.add_done_callback(consume_exception)
        try:
            await asyncio.wait({future}, timeout=timeout_s)
        finally:
            if not future.done() and self.is_single_rank:
                ray.cancel(ref)
        if not future.done():
            raise NoAnswer(self._failure(method, started, f"no answer within {timeout_s:g} s"))
        try:
            return future.result()
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                raise BlockLost(self._failure(method, started, _loss(error.cause))) from error
            raise error.cause from error
        except ObjectLostError as error:
            raise BlockLost(self._failure(method, started, _loss(error))) from error
        except ActorDiedError as error:
            raise WorkerDied(self._failure(method, started, _death(error))) from error
        except RayError as error:
            raise NoAnswer(
                self._failure(method, started, f"{type(error).__name__}: {first_lines(error, 3)}")
            ) from error

    @property
    def where(self) -> str:
        return f"pid {self.info.pid} on node {self.info.node}" if self.info else "not ready yet"

    @property
    def place(self) -> Place | None:
        return Place(self.info.node, self.info.pid) if self.info else None

    def _failure(self, method: str, started: float, why: str) -> str:
        now = time.monotonic()
        ages = f"{now - started:.1f} s into the call, worker started {now - self._born:.1f} s ago"
        return f"{self.name}.{method}: {why} ({self.where}; {ages})"


class RayGroup:
    """The ranks of one role. Holds the store at which they meet, for as long as the group lives."""

    def __init__(self, name: str, workers: Sequence[RayWorker], store: TCPStore | None = None) -> None:
        self.name = name
        self.workers = tuple(workers)
        self._store = store
        for worker in workers:
            worker.is_single_rank = len(workers) == 1

    def turn(self) -> AbstractAsyncContextManager[RayGroup]:
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
        arguments = self._arguments(method, shared, per_rank, blocks)
        return await _all_or_first_cause(
            worker.call(method, *mine, timeout_s=timeout_s, task_name=task_name)
            for worker, mine in zip(self.workers, arguments, strict=True)
        )

    async def call_split(
        self,
        method: str,
        *shared: Any,
        per_rank: Sequence[Any],
        blocks: Sequence[Sequence[Ref]],
        timeout_s: float,
        task_name: str | None = None,
    ) -> list[tuple[Any, Ref]]:
        arguments = self._arguments(method, shared, per_rank, blocks)
        results = await _all_or_first_cause(
            worker.call_split(method, *mine, timeout_s=timeout_s, task_name=task_name)
            for worker, mine in zip(self.workers, arguments, strict=True)
        )
        return [(value, ref) for value, ref in results]

    def _arguments(
        self,
        method: str,
        shared: tuple[Any, ...],
        per_rank: Sequence[Any] | None,
        blocks: Sequence[Sequence[Ref]] | None,
    ) -> list[tuple[Any, ...]]:
        """Of each rank."""
        ranks = len(self.workers)
        if per_rank is not None and len(per_rank) != ranks:
            raise ValueError(f"{self.name}.{method}: {len(per_rank)} arguments for {ranks} ranks")
        first = [()] * ranks if per_rank is None else [(value,) for value in per_rank]
        last: Sequence[Sequence[Ref]] = [()] * ranks if blocks is None else blocks
        return [(*mine, *shared, *refs) for mine, refs in zip(first, last, strict=True)]

    async def kill(self) -> None:
        await asyncio.gather(*(worker.kill() for worker in self.workers))


class RayObjects:
    """References into Ray's object store. The driver owns the objects that it puts: they live as long as their
    `Ref`."""

    async def put(self, value: Any) -> Ref:
        return Ref(await asyncio.to_thread(ray.put, value))

    async def get(self, ref: Ref, *, timeout_s: float) -> Any:
        future = asyncio.wrap_future(ref.target.future())
        future.add_done_callback(consume_exception)
        await asyncio.wait({future}, timeout=timeout_s)
        if not future.done():
            raise InfraFailure(f"object {ref.target.hex()[:16]} did not arrive within {timeout_s:g} s")
        try:
            return future.result()
        except RayTaskError as error:
            raise error.cause from error
        except ObjectLostError as error:
            raise BlockLost(_loss(error)) from error
        except RayError as error:
            raise InfraFailure(f"object {ref.target.hex()[:16]} is lost: {first_lines(error, 3)}") from error


def start_worker(
    name: str,
    target: type,
    kwargs: Mapping[str, Any],
    *,
    ray_options: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> RayWorker:
    """Start `target(**kwargs)` as an actor called `name` (`troupe/<run>/<role>/<index>`); it may not be placed yet.

    `ray_options` are an actor's own: num_cpus, num_gpus, resources, scheduling_strategy, label_selector, runtime_env.
    `env` is set before the process imports anything, which is when OpenMP, torch and DeepSpeed read theirs.
    Await `call("ready", timeout_s=...)` before use.
    """
    options = dict(ray_options or {})
    runtime_env = dict(options.pop("runtime_env", None) or {})
    runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **(env or {})}
    options = {"num_cpus": 1, **options, "name": name, "namespace": NAMESPACE, "runtime_env": runtime_env}
    return RayWorker(name, actor_class(target).options(**options).remote(_label(name), **kwargs))


def start_ranks(
    name: str,
    target: type,
    kwargs_per_rank: Sequence[Mapping[str, Any]],
    *,
    ray_options_per_rank: Sequence[Mapping[str, Any]] | None = None,
    env: Mapping[str, str] | None = None,
) -> RayGroup:
    """Start a gang called `<name>/<rank>`; every rank is also given `rank`, `world_size` and `master`.

    `master` is the address of a store that this process has bound already: no free port is guessed, so none can race.
    A single rank needs no rendezvous: its `master` is None.
    """
    size = len(kwargs_per_rank)
    store = _bound_store() if size > 1 else None
    master = (ray.util.get_node_ip_address(), store.port) if store else None
    options = ray_options_per_rank or [{}] * size
    workers = [
        start_worker(
            f"{name}/{rank}",
            target,
            {**kwargs, "rank": rank, "world_size": size, "master": master},
            ray_options=options[rank],
            env=env,
        )
        for rank, kwargs in enumerate(kwargs_per_rank)
    ]
    return RayGroup(name, workers, store)


def _bound_store() -> TCPStore:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # torch takes seconds to import

    return TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)


@cache
def actor_class(target: type) -> ActorClass:
    """`target` as a Ray actor class: never restarted by Ray (a restart would silently lose weights), calls never
    retried by Ray, the verbs of `BESIDE` on threads of their own, and a repr that names role and index."""

    class Actor(target):  # pyright: ignore[reportUntypedBaseClass]
        def __init__(self, label: str, /, **kwargs: Any) -> None:
            self._actor_label = label
            super().__init__(**kwargs)

        def __repr__(self) -> str:
            return self._actor_label

    threads: dict[str, int] = {}
    for verb, thread in BESIDE.items():
        method = getattr(target, verb, None)
        if method is not None and not inspect.iscoroutinefunction(method):
            setattr(Actor, verb, ray.method(concurrency_group=thread)(_inherited(verb, method)))
            threads[thread] = 1
    Actor.__name__ = Actor.__qualname__ = target.__name__
    remote: Callable[[type], ActorClass] = ray.remote(  # pyright: ignore[reportCallIssue]: overloads lack these options
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=ASYNC_CONCURRENCY if _is_async(target) else 1,
        concurrency_groups=threads or {"health": 1},
    )
    return remote(Actor)


def _inherited(verb: str, method: Any) -> Any:
    """A separate function for `ray.method` to mark: marking the target's own would modify the target for all users."""

    def beside(self: Any, *arguments: Any) -> Any:
        return method(self, *arguments)

    beside.__name__ = verb
    return beside


def _is_async(target: type) -> bool:
    return any(inspect.iscoroutinefunction(member) for _, member in inspect.getmembers(target))


def _label(name: str) -> str:
    """`troupe/<run>/rollout/3` -> `rollout/3`."""
    return "/".join(name.split("/")[-2:])


def _target(value: Any) -> Any:
    return value.target if isinstance(value, Ref) else value


def _loss(error: ObjectLostError) -> str:
    return f"object {error.object_ref_hex[:16]} is lost: the node that held it is gone"


def _death(error: ActorDiedError) -> str:
    """Why an actor died, without Ray's paragraphs of possible causes."""
    text = str(error)
    if "exits with a connection error code" in text:
        return "the worker died: its process was killed (by a user, or because memory ran out) or crashed"
    known = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("\t")]
    return f"the worker died: {' '.join(known[1:3]) or text}"


async def _all_or_first_cause(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, or one error. When a rank dies, its peers fail inside their collective, often before Ray detects the
    death: so an `InfraFailure` that follows within `GRACE_S` takes precedence over the first error."""
    calls = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, pending = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            done |= (await asyncio.wait(pending, timeout=GRACE_S))[0]
    finally:
        for call in calls:
            call.cancel()
    errors = [error for call in calls if call in done and (error := call.exception())]
    if errors:
        raise next((error for error in errors if isinstance(error, InfraFailure)), errors[0])
    return [call.result() for call in calls]
