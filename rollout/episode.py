"""An episode: a sample that talks to an environment, as one row whose mask skips what the model did not write.

    rollout worker                                              environment worker
    ──────────────                                              ──────────────────
    run_episode ── open(row) ─────────────────────────────────► reset
      Episode ◄── tokens of the prompt ◄── Conversation ◄────── messages, tools
      │ turn() ──► engine ──► wrote(completion)
      │               └──► parser ──► message ── step ────────► step, or the tools that it calls
      │ answered(tokens, reward, done) ◄── Conversation ◄────── messages, reward, done
      └ until it is over ── end ──────────────────────────────► get_reward

`Episode` is an automaton without clock, engine or environment: it knows the tokens, the limits, and what comes next.
Tokens are only ever appended. A turn that a limit cut is the last one, and what it calls is not carried out. Nothing
follows the model's last token in a row: an answer that the model did not get to read is left out.

Waits: each call of the environment ends at its deadline, each turn when the episode's time is up; the engine's own
stall is the worker's to notice.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.batch import Batch
from actors.columns import ADMITTED, ROUTES
from actors.errors import DataFailure, InfraFailure, NoAnswer
from actors.worker import Worker
from rollout.conversation import Conversation
from rollout.sampling import Completion, EpisodeFacts, Finish, Request, Sampling, sample_seed
from rollout.tool_calls import Message, Parser

TEMPLATE_VARIABLES = "chat_template_kwargs"  # the column with a row's own variables of the chat template


@dataclass(frozen=True)
class Limits:
    """Of one episode."""

    turns: int  # of the model
    tokens: int  # after the prompt, those of the environment included
    prompt_tokens: int  # before the model's first turn
    timeout_s: float  # checked between calls of the environment; a turn of the model's ends there
    call_timeout_s: float  # of one call of the environment; its process counts as hung after that
    turn_tokens: int | None = None  # of one turn of the model


@dataclass(frozen=True)
class EpisodeRequest:
    """One episode. `id` is unique in a run; `seed` fixes every token of the model's, given what it is answered.
    `columns`: the data set's, beside the prompt. `reward_weight`: of the environment's rewards."""

    id: str
    phase: str  # by which the environment worker knows what to run
    prompt: str | list[Message]
    columns: Mapping[str, Any]
    sampling: Sampling
    seed: int
    limits: Limits
    parser: str = "auto"
    reward_weight: float = 1.0
    group: int = 0
    mixture: float = 0.0  # of every turn: see `Request`


@dataclass(frozen=True)
class EnvironmentLost:
    """An environment did not do its part, so that the episode is to be generated again elsewhere. `no_answer`: its
    process is dead, or hangs."""

    why: str
    no_answer: bool

    @property
    def error(self) -> InfraFailure:
        return NoAnswer(self.why) if self.no_answer else InfraFailure(self.why)


@dataclass(frozen=True)
class Transcript:
    """What was said: the messages before the model's first turn, and from it on."""

    prompt: list[Message]
    messages: list[Message]


class Episode:
    """Tokens, mask, limits and what comes next. A method that does not fit the state is a bug: AssertionError."""

    def __init__(self, request: EpisodeRequest, prompt: Sequence[int]) -> None:
        """Raises DataFailure for a prompt that is too long."""
        if len(prompt) > request.limits.prompt_tokens:
            raise DataFailure(
                f"episode {request.id}: its prompt, with the tools and what the environment says first, has "
                f"{len(prompt)} tokens; episode.max_prompt_tokens={request.limits.prompt_tokens}"
            )
        self._request, self._limits = request, request.limits
        self.prompt_tokens = len(prompt)
        self.tokens: list[int] = list(prompt)
        self._mask: list[bool] = [False] * len(prompt)
        self._logps: list[float] = [0.0] * len(prompt)
        self._versions: list[int] = [-1] * len(prompt)
        self._whole = [-1] * max(request.sampling.top_k, 0)  # of a token that nothing was cut for
        self._admitted: list[list[int]] = [self._whole] * len(prompt)
        self._routes: np.ndarray | None = None
        self._rewards: dict[int, float] = {}  # by the place of a turn's last token
        self.turns = 0
        self.over = self.truncated = False
        self._awaits_answer = False

    @property
    def written(self) -> int:
        """Tokens that the model wrote."""
        return sum(self._mask)

    @property
    def reward(self) -> float | None:
        """What the environment gave, over all turns; None if it gave nothing."""
        return sum(self._rewards.values()) if self._rewards else None

    def turn(self) -> Request:
        """The model's next turn."""
        assert not self.over and not self._awaits_answer
        request, left = self._request, self._left
        longest = left if self._limits.turn_tokens is None else min(left, self._limits.turn_tokens)
        sampling = replace(request.sampling, max_tokens=longest)
        seed = sample_seed(request.seed, self.turns)
        name, prompt = f"{request.id}.{self.turns}", tuple(self.tokens)
        return Request(name, prompt, 1, sampling, seed, request.group, mixture=request.mixture)

    def wrote(self, completion: Completion) -> None:
        """The turn that was asked for. Cut by a limit, it is the last one."""
        assert not self.over and not self._awaits_answer
        count = len(completion.tokens)
        self.tokens += completion.tokens.tolist()
        self._mask += [True] * count
        self._logps += completion.logps.tolist()
        self._versions += completion.versions.tolist()
        self._routes = completion.routes  # of all tokens up to here
        self._admitted += completion.admitted.tolist() if completion.admitted is not None else [self._whole] * count
        self.turns += 1
        self._awaits_answer = True
        if completion.finish is Finish.LENGTH:
            self.cut()

    def answered(self, tokens: Sequence[int], reward: float | None, *, done: bool) -> None:
        """The answer to the last turn, as tokens up to the opening of the next one; what the turn earned; and whether
        the episode has ended by itself."""
        assert not self.over and self._awaits_answer
        self._awaits_answer = False
        self.earned(reward)
        if done:
            self.over = True
        elif self.turns >= self._limits.turns or len(tokens) >= self._left:
            self.cut()
        else:
            self.tokens += tokens
            self._mask += [False] * len(tokens)
            self._logps += [0.0] * len(tokens)
            self._versions += [-1] * len(tokens)
            self._admitted += [self._whole] * len(tokens)

    def earned(self, reward: float | None) -> None:
        """A reward for the last turn, at its last token."""
        if reward is not None:
            last = self._last
            self._rewards[last] = self._rewards.get(last, 0.0) + reward

    def cut(self) -> None:
        """A limit ends it."""
        self.over = self.truncated = True

    def row(self) -> Batch:
        """One row, up to the last token that the model wrote. Raises DataFailure if it wrote none."""
        if not self.written:
            raise DataFailure(f"episode {self._request.id}: its time was up before the model had written anything")
        length = self._last + 1
        reward = np.zeros(length, np.float32)
        for place, earned in self._rewards.items():
            reward[place] = self._request.reward_weight * earned
        return Batch.build(
            [length],
            tokens=np.asarray(self.tokens[:length], np.int32),
            mask=np.asarray(self._mask[:length], np.bool_),
            sample_logps=np.asarray(self._logps[:length], np.float32),
            version=np.asarray(self._versions[:length], np.int32),
            turn_reward=reward,
            group=np.asarray([self._request.group], np.int64),
            truncated=[self.truncated],
            **self._recorded(length),
        )

    def _recorded(self, length: int) -> dict[str, np.ndarray]:
        """What each of the model's tokens could have been, and the experts that tokens were sent to, if asked for."""
        found: dict[str, np.ndarray] = {} if self._routes is None else {ROUTES: self._routes[:length]}
        if self._request.sampling.records_admitted:
            found[ADMITTED] = np.asarray(self._admitted[:length], np.int32)
        return found

    @property
    def _left(self) -> int:
        return self._limits.tokens - (len(self.tokens) - self.prompt_tokens)

    @property
    def _last(self) -> int:
        return max(place for place, wrote in enumerate(self._mask) if wrote)


@dataclass
class Dialogue:
    """One episode under way: the automaton, what was said, and how long whom was waited for."""

    request: EpisodeRequest
    conversation: Conversation
    parser: Parser
    sample: Callable[[Request, float], Awaitable[Completion | None]]  # None: not within so many seconds
    environment: Worker
    calls: int = 0
    failures: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"engine": 0.0, "environment": 0.0})

    async def run(self) -> tuple[Episode, Transcript, EpisodeFacts]:
        """Raises `Lost` if the environment does not do its part, InfraFailure if the engine does not, DataFailure if
        this sample fails everywhere."""
        request, deadline = self.request, time.monotonic() + self.request.limits.timeout_s
        variables: Mapping[str, Any] = request.columns.get(TEMPLATE_VARIABLES) or {}
        opened = await self._ask("open", request.id, request.phase, request.prompt, dict(request.columns))
        episode = Episode(request, self.conversation.prompt(opened.prompt, opened.tools, variables))
        said: list[Message] = []
        while not episode.over:
            turn = episode.turn()
            completion = await self._sampled(turn, deadline - time.monotonic())
            if completion is None:
                episode.cut()
                break
            episode.wrote(completion)
            sampled = completion.tokens.tolist()
            message = self.parser(sampled, turn.prompt)
            before = [*opened.prompt, *said]
            said.append(message)
            if episode.over:
                break
            reply = await self._ask("step", request.id, message)
            self.calls, self.failures = self.calls + reply.calls, self.failures + reply.failures
            done = reply.done or not reply.messages  # without an answer there is nothing to go on from
            tokens: list[int] = []
            if not done:
                tokens = self.conversation.continuation(
                    before, message, reply.messages, sampled, opened.tools, variables
                )
            said += reply.messages
            episode.answered(tokens, reply.reward, done=done)
        final = await self._ask("end", request.id, score=True)
        if episode.turns:
            episode.earned(final)
        return episode, Transcript(opened.prompt, said), self._facts(episode)

    async def _sampled(self, turn: Request, seconds: float) -> Completion | None:
        began = time.monotonic()
        completion = await self.sample(turn, seconds) if seconds > 0 else None
        self.seconds["engine"] += time.monotonic() - began
        return completion

    async def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        began, limit = time.monotonic(), self.request.limits.call_timeout_s
        name = f"environment.{method} {self.request.id}"
        try:
            return await self.environment.call(method, *args, timeout_s=limit, task_name=name, **kwargs)
        except InfraFailure as error:
            raise Lost(EnvironmentLost(str(error), isinstance(error, NoAnswer))) from error
        finally:
            self.seconds["environment"] += time.monotonic() - began

    def _facts(self, episode: Episode) -> EpisodeFacts:
        row = episode.row()
        answers = int(row.num_tokens - episode.prompt_tokens - episode.written)
        return EpisodeFacts(
            episode.turns,
            self.calls,
            self.failures,
            answers,
            self.seconds["engine"],
            self.seconds["environment"],
            episode.reward,
        )


class Lost(Exception):
    """The environment did not do its part."""

    def __init__(self, lost: EnvironmentLost) -> None:
        super().__init__(lost.why)
        self.lost = lost
