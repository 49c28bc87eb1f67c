"""Chat with the policy while it trains: answers are sampled by the workers that sample for the run.

    messages ── chat template ──► tokens ── pool ──► a rollout worker ──► tokens ──► text
                                    ▲                                       │
                                    └──── a stream: the next few tokens ◄───┘

A stream asks for STREAM_TOKENS tokens at a time and goes on behind those that it got, so that any engine can stream.
Weights may be published between two parts of an answer. What is sampled here is not trained on and is not counted; it
takes slots of the pool, which the run's own samples share.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.errors import ConfigError, DataFailure, InfraFailure
from orchestrator.executor import Executor
from rewards.environments.openai_protocol import ONLY, Body, Message, Refused, checked, for_client, for_template
from rollout.conversation import Conversation
from rollout.sampling import Finish, Request, Sampling, sample_seed
from rollout.tool_calls import parser_of

STREAM_TOKENS = 16
AT_ONCE = 64  # chats; more are refused with 429
CUT_OFF = "\ufffd"  # how a decoder shows the first bytes of a character
# What a request may have: what is done as it says, and what says nothing of the answer (who asks, and how a provider is
# to cache, bill and label it).
TAKEN = ("model", "messages", "tools", "stream", "stream_options", "temperature", "top_p", "max_tokens",
         "max_completion_tokens", "stop", "seed")  # fmt: skip
LABELS = ("user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")
# Of the other keys of the protocol, and of what vLLM adds to it, the values that change nothing.
ONLY_HERE: dict[str, tuple[Any, ...]] = {
    **{key: allowed for key, allowed in ONLY.items() if key not in TAKEN},
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "best_of": (1,),
    "stop_token_ids": ([],),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "service_tier": ("auto", "default"),
    "store": (False,),
}


@dataclass(frozen=True)
class Part:
    """A part of an answer. `ended`: why nothing more comes; with the last part only."""

    message: Message
    ended: str | None = None
    usage: Mapping[str, int] | None = None


@dataclass(frozen=True)
class _Asked:
    """A request as it was understood."""

    role: str
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    tools: bool


class LiveChat:
    """Of one run. `models`: what a request may name -> the engine role that answers; `tokenizer`: the run's."""

    def __init__(self, models: Mapping[str, str], tokenizer: Any, roles: Executor) -> None:
        self.models, self._tokenizer, self._roles = dict(models), tokenizer, roles
        self._conversation: Conversation | None = None
        self._running = 0

    async def answer(self, body: Any, *, stream: bool) -> AsyncGenerator[Part, None]:
        """The answer in one part, or in several. Raises Refused."""
        asked = await asyncio.to_thread(self._understood, body)
        if self._running >= AT_ONCE:
            raise Refused(f"{AT_ONCE} chats with this run are going on", 429)
        self._running += 1
        try:
            whole = not stream or asked.tools or bool(asked.sampling.stop)
            async with contextlib.aclosing(self._whole(asked) if whole else self._parts(asked)) as parts:
                async for part in parts:
                    yield part
        except DataFailure as error:
            raise Refused(str(error)) from None
        except InfraFailure as error:
            raise Refused(f"the run's engines failed: {error}", 503) from None
        finally:
            self._running -= 1

    def _understood(self, body: Any) -> _Asked:
        body = checked(body, "by a live policy", ONLY_HERE, (*TAKEN, *LABELS))
        role = self.models.get(str(body.get("model")))
        if role is None:
            raise Refused(f"there is no model {body.get('model')!r}; there is {', '.join(self.models)}", 404)
        if self._roles.engines[role].paused:
            raise Refused(f"the role {role} has no workers now", 503)
        names = {
            str(call.get("id")): str(call.get("function", {}).get("name"))
            for message in body["messages"]
            for call in message.get("tool_calls") or []
        }
        try:
            self._conversation = self._conversation or Conversation(self._tokenizer)
            messages = [for_template(message, names) for message in body["messages"]]
            prompt = self._conversation.prompt(messages, body.get("tools") or [], {})
        except (ConfigError, DataFailure, ValueError, KeyError, TypeError) as error:
            raise Refused(f"these messages cannot be rendered: {error}") from None
        seed = _number("seed", _given(body, "seed", secrets.randbits(62)), 0, 2**63)
        return _Asked(role, tuple(prompt), self._sampling(body), int(seed), bool(body.get("tools")))

    def _sampling(self, body: Body) -> Sampling:
        """Of the request; what it does not say is the protocol's default, and the longest answer the recipe's."""
        recipe = self._roles.phase.sampling
        longest = _given(body, "max_completion_tokens", body.get("max_tokens"))
        given: Any = body.get("stop") or []
        stops: list[Any] = given if isinstance(given, list) else [given]
        if not all(isinstance(each, str) and each for each in stops) or len(stops) > 4:
            raise Refused("stop: a text, or up to four")
        return replace(
            recipe,
            max_tokens=recipe.max_tokens if longest is None else int(_number("max_tokens", longest, 1, 2**20)),
            temperature=_number("temperature", _given(body, "temperature", 1.0), 0.0, 2.0),
            top_p=_number("top_p", _given(body, "top_p", 1.0), 1e-6, 1.0),
            top_k=-1,
            min_p=0.0,
            stop=tuple(stops),
            replay_routing=False,
            replay_truncation=False,
        )

    async def _whole(self, asked: _Asked) -> AsyncGenerator[Part, None]:
        tokens, ended = await self._sampled(asked, (), asked.sampling.max_tokens, 0)
        text = self._text(tokens)
        for stop in asked.sampling.stop:
            text = text.partition(stop)[0]
        message: Message = {"role": "assistant", "content": text}
        if asked.tools:
            parse = parser_of("auto", self._tokenizer)
            message = for_client(await asyncio.to_thread(parse, tokens, asked.prompt), _numbered)
        why = "tool_calls" if message.get("tool_calls") else ended
        yield Part(message, why, _usage(asked.prompt, tokens))

    async def _parts(self, asked: _Asked) -> AsyncGenerator[Part, None]:
        yield Part({"role": "assistant", "content": ""})
        tokens: list[int] = []
        said = ""
        for number in range(asked.sampling.max_tokens):
            left = asked.sampling.max_tokens - len(tokens)
            more, ended = await self._sampled(asked, tokens, min(STREAM_TOKENS, left), number)
            tokens += more
            text = self._text(tokens)
            last = ended == "stop" or len(tokens) >= asked.sampling.max_tokens or not more
            if not last and text.endswith(CUT_OFF):
                continue
            delta, said = text[len(said) :], text
            if delta:
                yield Part({"content": delta})
            if last:
                yield Part({}, ended, _usage(asked.prompt, tokens))
                return

    async def _sampled(self, asked: _Asked, so_far: Sequence[int], count: int, number: int) -> tuple[list[int], str]:
        """(up to `count` tokens behind those, `stop` or `length`)."""
        prompt, sampling = (*asked.prompt, *so_far), replace(asked.sampling, max_tokens=count)
        name = f"chat-{secrets.token_hex(8)}"
        request = Request(name, prompt, 1, sampling, sample_seed(asked.seed, number))
        meta, rows = await self._roles.group_stages.sample(asked.role, request)
        tokens = await self._roles.column("tokens", rows)
        ended = "length" if meta.finishes[0] is Finish.LENGTH else "stop"
        return [int(token) for token in tokens[len(prompt) :]], ended

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def models_of(run: str, followed: Mapping[str, str], trained: Sequence[str]) -> dict[str, str]:
    """What a chat may name: `RUN/ROLE` for each engine role, and `RUN` for the one that follows the first trained role,
    else the first. `followed`: engine role -> the role whose weights it has."""
    if not followed:
        return {}
    own = [role for role, source in followed.items() if source in trained[:1]] or list(followed)
    return {run: own[0], **{f"{run}/{role}": role for role in followed}}


def _given(body: Body, name: str, default: Any) -> Any:
    return default if body.get(name) is None else body[name]


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refused(f"{name}={value!r} is no number from {low:g} to {high:g}")
    return value


def _numbered(name: str, arguments: str) -> Message:
    index = f"call_{secrets.token_hex(8)}"
    return {"id": index, "type": "function", "function": {"name": name, "arguments": arguments}}


def _usage(prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, int]:
    counted = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
    return {**counted, "total_tokens": len(prompt) + len(tokens)}
