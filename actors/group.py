"""Workers and groups over Ray: plain classes become actors, and Ray's exceptions become ours.

    driver (asyncio) ── RayWorker.call("update", chunk) ──► main group: one call at a time (sync targets),
                                                            or all of them on one event loop (async targets)
                     ── RayWorker.call("ping") ───────────► health group: a thread of its own, so that it
                                                            answers while the main group works or hangs

Every wait has a deadline. Whatever keeps a call from being carried out (a dead process, a lost node, an out-of-memory
kill, a deadline) is a `NoAnswer`, an `InfraFailure`; an exception of the method itself arrives as itself.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorClass
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from actors.errors import InfraFailure, NoAnswer, WorkerDied
from actors.worker import Ref, WorkerInfo

NAMESPACE = "troupe"
ASYNC_CONCURRENCY = 1000  # calls on one event loop: Ray's own limit must never be what queues them
GRACE_S = 2.0  # how long a failed rank's peers get to say whether one of them died


class RayWorker:
    """A handle on one actor of the cluster. Safe to use from one event loop."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self.handle = handle
        self.info: WorkerInfo | None = None  # once `ready` has answered
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
        self, method: str, *args: Any, timeout_s: float, task_name: str | None = None
    ) -> tuple[Any, Ref]:
        first, second = self._submit(method, args, {}, task_name, num_returns=2)
        return await self._result(first, method, timeout_s), Ref(second)

    async def kill(self) -> None:
        ray.kill(self.handle, no_restart=True)

    def _submit(self, method: str, args: tuple, kwargs: dict[str, Any], task_name: str | None, **options: Any) -> Any:
        """Start the call. `Ref` arguments go as top-level references, which Ray resolves on the worker's node."""
        label = task_name or f"{_label(self.name)}.{method}"
        bound = getattr(self.handle, method).options(name=label, enable_task_events=method != "ping", **options)
        return bound.remote(*map(_target, args), **{name: _target(value) for name, value in kwargs.items()})

    async def _result(self, ref: ObjectRef, method: str, timeout_s: float) -> Any:
        """The value of `ref`. If nobody waits for it any longer (deadline, cancellation), the call is cancelled: an
        async method at once, a sync one if it has not begun."""
        started = time.monotonic()
        future = asyncio.wrap_future(ref.future())
        future.add_done_callback(_retrieve)
        try:
            await asyncio.wait({future}, timeout=timeout_s)
        finally:
            if not future.done():
                ray.cancel(ref)
        if not future.done():
            raise NoAnswer(self._failure(method, started, f"no answer within {timeout_s:g} s"))
        try:
            return future.result()
        except RayTaskError as error:
            raise error.cause from error
        except ActorDiedError as error:
            raise WorkerDied(self._failure(method, started, _death(error))) from error
        except RayError as error:
            raise NoAnswer(self._failure(method, started, f"{type(error).__name__}: {_first_lines(error)}")) from error

    @property
    def where(self) -> str:
        return f"pid {self.info.pid} on node {self.info.node}" if self.info else "not ready yet"

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

    async def call(
        self,
        method: str,
        *shared: Any,
        per_rank: Sequence[Any] | None = None,
        timeout_s: float,
        task_name: str | None = None,
    ) -> list[Any]:
        if per_rank is not None and len(per_rank) != len(self.workers):
            raise ValueError(f"{self.name}.{method}: {len(per_rank)} arguments for {len(self.workers)} ranks")
        own = [()] * len(self.workers) if per_rank is None else [(value,) for value in per_rank]
        calls = [
            asyncio.ensure_future(worker.call(method, *first, *shared, timeout_s=timeout_s, task_name=task_name))
            for worker, first in zip(self.workers, own, strict=True)
        ]
        return await _all_or_first_cause(calls)

    async def kill(self) -> None:
        await asyncio.gather(*(worker.kill() for worker in self.workers))


class RayObjects:
    """References into Ray's object store. What the driver puts, it owns: it lives as long as its `Ref`."""

    async def put(self, value: Any) -> Ref:
        return Ref(await asyncio.to_thread(ray.put, value))

    async def get(self, ref: Ref, *, timeout_s: float) -> Any:
        future = asyncio.wrap_future(ref.target.future())
        future.add_done_callback(_retrieve)
        await asyncio.wait({future}, timeout=timeout_s)
        if not future.done():
            raise InfraFailure(f"object {ref.target.hex()[:16]} did not arrive within {timeout_s:g} s")
        try:
            return future.result()
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise InfraFailure(f"object {ref.target.hex()[:16]} is lost: {_first_lines(error)}") from error


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
    A gang of one meets nobody: its `master` is None.
    """
    size = len(kwargs_per_rank)
    store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False) if size > 1 else None
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


@cache
def actor_class(target: type) -> ActorClass:
    """`target` as a Ray actor class: never restarted behind our back (a restart would silently lose weights), calls
    never repeated, `ping` on a thread of its own, and a repr that names role and index."""

    class Actor(target):  # pyright: ignore[reportUntypedBaseClass]
        def __init__(self, label: str, /, **kwargs: Any) -> None:
            self._actor_label = label
            super().__init__(**kwargs)

        def __repr__(self) -> str:
            return self._actor_label

    if not inspect.iscoroutinefunction(target.ping):
        Actor.ping = ray.method(concurrency_group="health")(_inherited(target.ping))
    Actor.__name__ = Actor.__qualname__ = target.__name__
    remote: Callable[[type], ActorClass] = ray.remote(  # pyright: ignore[reportCallIssue]: overloads lack these options
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=ASYNC_CONCURRENCY if _is_async(target) else 1,
        concurrency_groups={"health": 1},
    )
    return remote(Actor)


def _inherited(ping: Any) -> Any:
    """A function of its own for `ray.method` to mark: marking the target's would change the target for everybody."""

    def health(self: Any) -> Any:
        return ping(self)

    health.__name__ = "ping"
    return health


def _is_async(target: type) -> bool:
    return any(inspect.iscoroutinefunction(member) for _, member in inspect.getmembers(target))


def _label(name: str) -> str:
    """`troupe/<run>/rollout/3` -> `rollout/3`."""
    return "/".join(name.split("/")[-2:])


def _target(value: Any) -> Any:
    return value.target if isinstance(value, Ref) else value


def _retrieve(future: asyncio.Future) -> None:
    """Mark the outcome as seen: a call that was given up may still fail, and that is no news."""
    if not future.cancelled():
        future.exception()


def _death(error: ActorDiedError) -> str:
    """Why an actor died, without the paragraphs in which Ray guesses."""
    text = str(error)
    if "exits with a connection error code" in text:
        return "the worker died: its process was killed (by hand, or for want of memory) or crashed"
    known = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("\t")]
    return f"the worker died: {' '.join(known[1:3]) or text}"


def _first_lines(error: BaseException, count: int = 3) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:count] if line.strip())


async def _all_or_first_cause(calls: list[asyncio.Task[Any]]) -> list[Any]:
    """All results, or one error. A rank that dies makes its peers fail inside their collective, often before Ray sees
    the death: so an `InfraFailure` that follows within `GRACE_S` is preferred to the error that came first."""
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
