"""A reward that is a method of somebody else's named Ray actor: `ray://NAMESPACE/NAME`.

    reward worker ── score(prompts, completions, **columns) ──► an actor that another job started, in its own process,
                                                                with its own resources and runtime environment
                  ◄── n numbers or None ───────────────────────

The method may be sync or async, and is called by several workers; how many calls run at the same time is up to the
actor (`max_concurrency`). It is given plain values only, so that it needs none of our packages.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.errors import ConfigError, first_lines
from actors.worker import consume_exception
from rewards.calls import plain
from rewards.options import not_sent, refuse_offered, sent
from rewards.reward import AttemptFailed, FailureKind, Handling, Reward

FORM = "ray://NAMESPACE/NAME"


@dataclass(frozen=True)
class ActorSpec:
    """Which actor, and which method of it. `columns` of the data set that it is given; None: all. Picklable."""

    actor: str
    method: str = "score"
    weight: float = 1.0
    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    handling: Handling = field(default_factory=Handling)
    columns: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        """What it is called in metrics."""
        return self.name or self._place()[1]

    @property
    def needs(self) -> frozenset[str]:
        """Columns that the data set must have for it."""
        return frozenset(self.columns or ())

    def located(self) -> ActorSpec:
        """The same. That the actor is there shows when it is called: it may be started later than the run. Raises
        ConfigError for what is no name of an actor, and for options that are passed anyway."""
        self._place()
        refuse_offered(self.options, self.actor)
        return self

    def load(self) -> Reward:
        """Raises ConfigError in a process without Ray."""
        import ray

        if not ray.is_initialized():
            raise ConfigError(f"reward {self.actor} is an actor of a Ray cluster, and this run has none: leave --local")
        call = NamedActor(*self._place(), self.method, self.options)
        return Reward(self.label, self.weight, call, sent(self.columns), True, not_sent(), self.handling)

    def _place(self) -> tuple[str, str]:
        found = re.fullmatch(r"ray://([^/]+)/(.+)", self.actor)
        if found is None:
            raise ConfigError(f"reward {self.actor!r} names no actor; write {FORM}")
        return found[1], found[2]


class NamedActor:
    """The method as an async function. The actor is looked up again after it could not be reached: one that was
    restarted under its name is another one."""

    def __init__(self, namespace: str, name: str, method: str, options: Mapping[str, Any]) -> None:
        self._namespace, self._name, self._method, self._options = namespace, name, method, dict(options)
        self._handle: Any = None

    async def __call__(self, **given: Any) -> Any:
        """What the method returns. Raises AttemptFailed; cancelled, it cancels the call of an async method."""
        import ray

        arguments = {name: [plain(value) for value in values] for name, values in given.items()}
        reference = self._submit(await self._found(), {**arguments, **self._options})
        future = asyncio.wrap_future(reference.future())
        future.add_done_callback(consume_exception)
        try:
            await asyncio.wait({future})  # ended by the attempt's deadline
        finally:
            if not future.done():
                ray.cancel(reference)
        return self._result(future)

    async def _found(self) -> Any:
        import ray

        if self._handle is None:
            try:
                self._handle = await asyncio.to_thread(ray.get_actor, self._name, self._namespace)
            except ValueError:
                raise AttemptFailed(
                    FailureKind.UNREACHABLE,
                    f"there is no actor {self._name!r} in the namespace {self._namespace!r} of the Ray that this run "
                    "uses (cluster.address); was it started there, with that name, and is its job still running?",
                ) from None
        return self._handle

    def _submit(self, handle: Any, arguments: Mapping[str, Any]) -> Any:
        try:
            return getattr(handle, self._method).remote(**arguments)
        except AttributeError:
            raise AttemptFailed(FailureKind.REFUSED, f"the actor {self._name} has no method {self._method!r}") from None
        except TypeError as error:
            raise AttemptFailed(
                FailureKind.REFUSED,
                f"the actor {self._name} cannot be called as {self._method}({', '.join(arguments)}): {error}; give the "
                "method **columns, or name the columns that it is to be given: columns=[...]",
            ) from None

    def _result(self, future: asyncio.Future[Any]) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return future.result()
        except RayTaskError as error:
            cause = error.cause or error
            raise AttemptFailed(
                FailureKind.RAISED, f"{self._name}.{self._method} raised {type(cause).__name__}: {first_lines(cause)}"
            ) from None
        except RayError as error:
            self._handle = None
            raise AttemptFailed(
                FailureKind.UNREACHABLE, f"{self._name}: {type(error).__name__}: {first_lines(error, 3)}"
            ) from None
