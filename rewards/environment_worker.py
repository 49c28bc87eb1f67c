"""An environment worker: it runs users' tools and environments for the episodes of rollout workers. A plain class, an
actor under Ray.

    driver    pool of these ── leases one for each episode ──► rollout worker
    rollout   open(episode, prompt, columns) ──► messages, tools     step(episode, message) ──► messages, reward, done
              end(episode, score=True) ──► reward
    pool      ping ──► a thread of its own: it answers while users' code works, or hangs

What hangs is ended from outside: the rollout worker gives up at its deadline, the pool kills this process and starts
another, and all episodes that were in it are generated again from their start. An error of an environment is a
`DataFailure` of the sample; one of a tool is its answer.
"""

from __future__ import annotations

import asyncio
import math
import os
import platform
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import actors
from actors.errors import DataFailure, InfraFailure
from actors.worker import WorkerInfo
from rewards.environment import Counts, Environment, Message, ToolEnvironment
from rewards.environment_specs import ROUTED_BY, EnvironmentSpec, Schema
from rewards.user_calls import Raised, UserCalls

MAX_THREADS = 256  # sync calls at the same time; the pool's own limit is the one that counts
CUT = " ... (cut: it has {length} characters)"


@dataclass(frozen=True)
class Opened:
    """`prompt`: all messages before the model's first turn. `tools`: schemas for the chat template."""

    prompt: list[Message]
    tools: list[Schema]


@dataclass(frozen=True)
class Reply:
    """What a turn of the model's is answered with. `calls`, `failures`: tools called in it, and those of them that were
    answered with an error. `seconds`: in the user's code."""

    messages: list[Message]
    reward: float | None
    done: bool
    calls: int
    failures: int
    seconds: float


@dataclass
class _Session:
    """`unfinished`: calls of the environment that did not return. A sync one that was cancelled may still run in its
    thread, and would write into the next episode: such an environment is not used again."""

    environment: Environment
    phase: str
    route: str
    unfinished: int = 0


class EnvironmentWorker:
    """Hosts the environments of several episodes at a time, under the names that callers give them."""

    def __init__(self, name: str, specs: Mapping[str, EnvironmentSpec], max_answer_chars: Mapping[str, int]) -> None:
        """`specs`, `max_answer_chars`: by phase. Longer messages are cut."""
        self.name = name
        self._specs, self._max_chars = dict(specs), dict(max_answer_chars)
        self._makers: dict[str, dict[str, Callable[[UserCalls], Environment]]] = {}
        self._idle: defaultdict[tuple[str, str], list[Environment]] = defaultdict(list)  # built once, reset often
        self._schemas: dict[tuple[str, str], list[Schema]] = {}  # of tools, which take a while to be made
        self._sessions: dict[str, _Session] = {}
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="environment")
        self._call = UserCalls(self._threads)
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}
        self._calls = 0

    async def ready(self) -> WorkerInfo:
        """Load the tools and the classes, and build an instance of each. Raises ConfigError."""
        for phase, spec in self._specs.items():
            self._makers[phase] = spec.makers()
            for route, make in self._makers[phase].items():
                environment = await asyncio.to_thread(make, self._call)
                self._schemas[phase, route] = await asyncio.to_thread(spec.schemas_of, environment)
                self._idle[phase, route].append(environment)
        packages = str(Path(actors.__file__).parent)
        return WorkerInfo(self.name, os.getpid(), platform.node(), packages, {"phases": list(self._specs)})

    def ping(self) -> dict[str, Any]:
        """How many calls run, and since when the oldest does (seconds)."""
        with self._lock:
            ages = [time.monotonic() - began for began in self._running.values()]
            return {"alive": True, "running": len(ages), "oldest_s": max(ages, default=0.0), "calls": self._calls}

    async def open(self, episode: str, phase: str, prompt: str | list[Message], columns: Mapping[str, Any]) -> Opened:
        """Begin an episode; one that has that name already is forgotten. Raises DataFailure if the environment raises,
        or the row names none, InfraFailure if another call ended this episode or began it again meanwhile."""
        await self._abandon(episode)
        route = str(columns.get(ROUTED_BY, "")) if self._specs[phase].routed else ""
        if route not in self._makers[phase]:
            known = ", ".join(self._makers[phase])
            raise DataFailure(f"the row's {ROUTED_BY} is {route!r}, which is none of {known}")
        idle = self._idle[phase, route]
        environment = idle.pop() if idle else await asyncio.to_thread(self._makers[phase][route], self._call)
        row = {
            "prompt": prompt,
            **{name: value for name, value in columns.items() if not (route and name == ROUTED_BY)},
        }
        session = self._sessions[episode] = _Session(environment, phase, route)
        try:
            said = await self._asked(session, f"{type(environment).__name__}.reset", environment.reset, row)
        except (Exception, asyncio.CancelledError):
            await self._abandon(episode, session)
            raise
        if self._sessions.get(episode) is not session:
            await self._stop(session)  # what it has begun since it was told to
            raise InfraFailure(f"{self.name}: episode {episode} was ended, or begun again, while it began")
        is_fixed = isinstance(environment, ToolEnvironment)  # others may have other tools in each episode
        tools = self._schemas[phase, route] if is_fixed else self._specs[phase].schemas_of(environment)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        before = [] if getattr(environment, "owns_prompt", False) else messages
        return Opened(_opened_with(before, said, self._max_chars[phase]), tools)

    async def step(self, episode: str, message: Message) -> Reply:
        """Answer a turn of the model's. Raises DataFailure if the environment raises or answers with something else
        than (messages, reward, done), InfraFailure if there is no such episode here."""
        session = self._session(episode)
        environment, max_chars = session.environment, self._max_chars[session.phase]
        counts = getattr(environment, "counts", None)
        before = (counts.calls, counts.failures) if isinstance(counts, Counts) else (0, 0)
        began = time.monotonic()
        what = f"{type(environment).__name__}.step"
        try:
            answer = await self._asked(session, what, environment.step, message)
            messages, reward, done = _checked_step(what, answer, max_chars)
        except DataFailure:
            # Who knows in which state it is: another one is built for the next episode.
            await self._abandon(episode, session)
            raise
        seconds = time.monotonic() - began
        calls, failures = len(message.get("tool_calls") or []), 0
        if isinstance(counts, Counts):
            calls, failures = counts.calls - before[0], counts.failures - before[1]
        return Reply(messages, reward, done, calls, failures, seconds)

    async def end(self, episode: str, *, score: bool) -> float | None:
        """Forget an episode. With `score`, what the environment says that all of it earned. Unknown ones are
        ignored, unless they are to be scored."""
        if not score:
            if (left := await self._abandon(episode)) is not None:
                self._put_back(left)
            return None
        session = self._session(episode)
        del self._sessions[episode]
        environment, reward = session.environment, None
        ask = getattr(environment, "get_reward", None)
        if ask is not None:
            what = f"{type(environment).__name__}.get_reward"
            reward = _number(what, await self._asked(session, what, ask))
        self._put_back(session)
        return reward

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _abandon(self, episode: str, only: _Session | None = None) -> _Session | None:
        """Forget an episode, if it is here, and tell its environment. What that raises is of no interest any more.
        `only`: unless it was begun again meanwhile, and the session of that name is another one."""
        session = self._sessions.get(episode)
        if session is None or (only is not None and only is not session):
            return None
        del self._sessions[episode]
        await self._stop(session)
        return session

    async def _stop(self, session: _Session) -> None:
        stop = getattr(session.environment, "abandon", None)
        if stop is not None:
            with suppress(DataFailure, InfraFailure):
                await self._asked(session, "abandon", stop)

    def _put_back(self, session: _Session) -> None:
        """Keep the environment of an episode that has ended for the next one, if nothing is left over in it."""
        if not session.unfinished:
            self._idle[session.phase, session.route].append(session.environment)

    def _session(self, episode: str) -> _Session:
        if episode not in self._sessions:
            raise InfraFailure(f"{self.name} has no episode {episode}: it was begun in another process")
        return self._sessions[episode]

    async def _asked(self, session: _Session, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """What a method of the session's environment returns. Raises DataFailure if it raises."""
        session.unfinished += 1
        answer = await self._run(what, function, *args)
        session.unfinished -= 1  # not in a `finally`: see `_Session`
        return answer

    async def _run(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        with self._lock:
            self._calls += 1
            token = self._calls
            self._running[token] = time.monotonic()
        try:
            return await self._call(function, *args)
        except Raised as error:
            raise DataFailure(f"environment: {what} raised {error}") from None
        finally:
            with self._lock:
                del self._running[token]


def _opened_with(prompt: list[Message], said: Any, max_chars: int) -> list[Message]:
    """The prompt, and what the environment says before the first turn. A text is added to the last message if that is
    the user's, as TRL does; messages follow the prompt."""
    if isinstance(said, str) and prompt and prompt[-1].get("role") == "user" and isinstance(prompt[-1]["content"], str):
        last = prompt[-1]
        return [*prompt[:-1], {**last, "content": last["content"] + _cut(said, max_chars)}]
    return [*prompt, *_messages("reset", said, max_chars)]


def _checked_step(what: str, answer: Any, max_chars: int) -> tuple[list[Message], float | None, bool]:
    if not isinstance(answer, tuple | list) or len(cast(list[Any], answer)) != 3:
        raise DataFailure(f"environment: {what} must return (messages, reward, done), not {_shown(answer)}")
    said, reward, done = cast(tuple[Any, Any, Any], tuple(cast(list[Any], answer)))
    return _messages(what, said, max_chars), _number(what, reward), bool(done)


def _messages(what: str, said: Any, max_chars: int) -> list[Message]:
    """A list of messages, one message, a text of the user's, or None. Raises DataFailure for anything else."""
    if said is None:
        return []
    if isinstance(said, str):
        said = {"role": "user", "content": said}
    listed: object = [said] if isinstance(said, Mapping) else said
    if not isinstance(listed, list | tuple):
        raise DataFailure(f"environment: {what} must say messages, not {_shown(said)}")
    checked: list[Message] = []
    for message in cast(list[Any], listed):
        is_message = isinstance(message, Mapping) and isinstance(cast(Message, message).get("role"), str)
        content = cast(Message, message).get("content") if is_message else None
        if not isinstance(content, str):
            raise DataFailure(
                f"environment: {what} said {_shown(message)}; a message is {{'role': ..., 'content': a text}}"
            )
        checked.append({**cast(Message, message), "content": _cut(content, max_chars)})
    return checked


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[:max_chars] + CUT.format(length=len(text))


def _number(what: str, value: Any) -> float | None:
    """Raises DataFailure for a reward that is no finite number."""
    if value is None:
        return None
    try:
        number = float(value) if not isinstance(value, str | bytes) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataFailure(f"environment: {what} gave the reward {_shown(value)}; it is a finite number, or None")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
