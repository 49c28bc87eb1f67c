"""Environments: what answers the model between its turns. One interface for the three things that a user may write.

    tools: [file.py:add]                 plain functions         ToolEnvironment: answers each call of a message
    environment_factory: file.py:Game    a class with methods    the same, with the methods of an instance (TRL's way)
    environment: file.py:Game            a class with `reset` and `step`

The interface is the third: `reset(row) -> messages` begins an episode, `step(message) -> messages, reward, done`
answers one of the model's turns. A message is a dictionary with `role` and `content`; those of the model have its calls
in `tool_calls`, as chat templates read them, and in `invalid_tool_calls` what was meant to be a call and is none:
[{"name": ..., "arguments": its text, "error": why}].

Methods may be sync or async. Tools that raise answer with their error. Everything else that raises fails the sample.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rewards.user_calls import Raised, UserCalls

Message = dict[str, Any]
Step = tuple[Any, float | None, bool]  # messages, reward of the turn (None: it has none), whether the episode is over
NOT_TOOLS = frozenset({"reset", "get_reward"})  # of the methods of an `environment_factory`'s instance


@runtime_checkable
class Environment(Protocol):
    """What an environment worker runs; one instance is in one episode at a time, and in many after one another.

    It may have `tools`: functions, or JSON schemas, that the chat template shows to the model. `step` carries out their
    calls. It may have `get_reward() -> float | None`: what the whole episode earned, asked once at its end; and
    `abandon()`, called where an episode ends without that, if need be beside a sync call that was given up and still
    runs in its thread; after such a call the instance is in no other episode. With `owns_prompt = True` the messages of
    its `reset` are the whole conversation so far, and the row's prompt is none."""

    def reset(self, row: dict[str, Any]) -> Any:
        """Begin an episode. `row`: the data set's columns, `prompt` among them. Returns the messages that follow the
        prompt: a list of them, one, a text (of the user's), or None."""
        ...

    def step(self, message: Message) -> Any:
        """Answer one of the model's turns: `messages, reward, done`. Messages are as those of `reset`; `reward` is what
        this turn earned, None if nothing is said of it; after `done` the model has no further turn."""
        ...


@dataclass
class Counts:
    """Of one episode so far."""

    calls: int = 0
    failures: int = 0  # calls that were answered with an error


class ToolEnvironment:
    """Functions that the model may call. `instance`: an object of a user's `environment_factory`, whose public methods
    are tools, too, and which is reset with the row. `call`: carries out a user's function."""

    def __init__(self, functions: Sequence[Callable[..., Any]], instance: Any, call: UserCalls) -> None:
        self.tools = [*functions, *tool_methods(instance)]
        self.counts = Counts()
        self.instance, self._call = instance, call
        self._by_name = {function.__name__: function for function in self.tools}

    async def reset(self, row: dict[str, Any]) -> Any:
        self.counts = Counts()
        return None if self.instance is None else await self._call(self.instance.reset, **row)

    async def step(self, message: Message) -> Step:
        """A message without calls ends the episode."""
        calls, invalid = message.get("tool_calls") or [], message.get("invalid_tool_calls") or []
        answers = [await self._answer(call["function"]) for call in calls]
        answers += [self._failed(str(call.get("name") or "unknown"), str(call["error"])) for call in invalid]
        return answers, None, not answers

    async def get_reward(self) -> float | None:
        score = getattr(self.instance, "get_reward", None)
        return None if score is None else await self._call(score)

    async def _answer(self, call: Mapping[str, Any]) -> Message:
        name, arguments = str(call["name"]), call.get("arguments")
        arguments = {} if arguments is None else arguments
        function = self._by_name.get(name)
        if function is None:
            return self._failed(name, f"there is no tool {name!r}; there are {', '.join(self._by_name) or 'none'}")
        if not isinstance(arguments, dict):
            return self._failed(name, f"the arguments must be an object, not {json.dumps(arguments, default=str)}")
        try:
            result = await self._call(function, **arguments)
        except Raised as error:
            return self._failed(name, error.text)
        self.counts.calls += 1
        return {"role": "tool", "name": name, "content": text_of_result(result)}

    def _failed(self, name: str, why: str) -> Message:
        self.counts.calls += 1
        self.counts.failures += 1
        return {"role": "tool", "name": name, "content": json.dumps({"error": why}, ensure_ascii=False)}


def tool_methods(instance: Any) -> list[Callable[..., Any]]:
    """The public methods of an `environment_factory`'s instance that the model may call."""
    if instance is None:
        return []
    members = inspect.getmembers(instance, predicate=inspect.ismethod)
    return [method for name, method in members if not name.startswith("_") and name not in NOT_TOOLS]


def text_of_result(result: Any) -> str:
    """What the model reads of a tool's result: a text as it is, numbers and words as Python prints them, and lists and
    mappings as JSON."""
    if isinstance(result, Mapping | list | tuple):
        return json.dumps(result, default=str, ensure_ascii=False)
    return str(result)
