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
Tokens are only ever appended; or, with `split`, each turn begins a row of its own. A turn that a limit cut is the last
one, and what it calls is not carried out. Nothing follows the model's last token in a row: an answer that the model did
not get to read is left out.

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
from rollout.sampling import Completion, EpisodeFacts, Finish, Request, Sampling, TurnRow, sample_seed
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
    split: bool = False  # each turn is a row of its own


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


@dataclass
class _Row:
    """A row that grows: tokens, what is known of each, and what was earned, by the place of a turn's last token."""

    tokens: list[int]
    whole: list[int]  # what a token could have been that nothing was cut for
    mask: list[bool] = field(default_factory=list[bool])
    logps: list[float] = field(default_factory=list[float])
    versions: list[int] = field(default_factory=list[int])
    admitted: list[list[int]] = field(default_factory=list[list[int]])
    routes: np.ndarray | None = None
    rewards: dict[int, float] = field(default_factory=dict[int, float])

    def __post_init__(self) -> None:
        tokens, self.tokens = self.tokens, []
        self.read(tokens)

    @property
    def written(self) -> int:
        return sum(self.mask)

    @property
    def last(self) -> int:
        """The place of the last token that the model wrote."""
        return max(place for place, wrote in enumerate(self.mask) if wrote)

    @property
    def reward(self) -> float:
        return sum(self.rewards.values())

    def read(self, tokens: Sequence[int]) -> None:
        """Tokens that the model did not write."""
        count = len(tokens)
        self.tokens += tokens
        self.mask += [False] * count
        self.logps += [0.0] * count
        self.versions += [-1] * count
        self.admitted += [self.whole] * count

    def wrote(self, completion: Completion) -> None:
        count = len(completion.tokens)
        self.tokens += completion.tokens.tolist()
        self.mask += [True] * count
        self.logps += completion.logps.tolist()
        self.versions += completion.versions.tolist()
        self.routes = completion.routes  # of all tokens up to here
        self.admitted += completion.admitted.tolist() if completion.admitted is not None else [self.whole] * count


class Episode:
    """Tokens, mask, limits and what comes next. A method that does not fit the state is a bug: AssertionError.

    With `request.split` each turn is a row of its own, which begins with the conversation as the template writes it for
    that turn; so a template may write earlier turns otherwise than they were sampled."""

    def __init__(self, request: EpisodeRequest, prompt: Sequence[int]) -> None:
        """Raises DataFailure for a prompt that is too long."""
        if len(prompt) > request.limits.prompt_tokens:
            raise DataFailure(
                f"episode {request.id}: its prompt, with the tools and what the environment says first, has "
                f"{len(prompt)} tokens; episode.max_prompt_tokens={request.limits.prompt_tokens}"
            )
        self._request, self._limits = request, request.limits
        self.prompt_tokens = len(prompt)
        self._whole = [-1] * max(request.sampling.top_k, 0)
        self._rows = [_Row(list(prompt), self._whole)]
        self._rewarded = False
        self.turns = 0
        self.over = self.truncated = False
        self._awaits_answer = False

    @property
    def tokens(self) -> list[int]:
        """Of the row that grows."""
        return self._rows[-1].tokens

    @property
    def written(self) -> int:
        """Tokens that the model wrote."""
        return sum(row.written for row in self._rows)

    @property
    def reward(self) -> float | None:
        """What the environment gave, over all turns; None if it gave nothing."""
        return sum(row.reward for row in self._rows) if self._rewarded else None

    def turn(self) -> Request:
        """The model's next turn."""
        assert not self.over and not self._awaits_answer
        request, left = self._request, self._left(len(self.tokens))
        longest = left if self._limits.turn_tokens is None else min(left, self._limits.turn_tokens)
        sampling = replace(request.sampling, max_tokens=longest)
        seed = sample_seed(request.seed, self.turns)
        name, prompt = f"{request.id}.{self.turns}", tuple(self.tokens)
        return Request(name, prompt, 1, sampling, seed, request.group, mixture=request.mixture)

    def wrote(self, completion: Completion) -> None:
        """The turn that was asked for. Cut by a limit, it is the last one."""
        assert not self.over and not self._awaits_answer
        self._rows[-1].wrote(completion)
        self.turns += 1
        self._awaits_answer = True
        if completion.finish is Finish.LENGTH:
            self.cut()

    def answered(self, tokens: Sequence[int], reward: float | None, *, done: bool) -> None:
        """The answer to the last turn, as tokens up to the opening of the next one (with `split`: all tokens before the
        next one); what the turn earned; and whether the episode has ended by itself."""
        assert not self.over and self._awaits_answer
        self._awaits_answer = False
        self.earned(reward)
        length = len(tokens) if self._request.split else len(self.tokens) + len(tokens)
        if done:
            self.over = True
        elif self.turns >= self._limits.turns or self._left(length) <= 0:
            self.cut()
        elif self._request.split:
            self._rows.append(_Row(list(tokens), self._whole))
        else:
            self._rows[-1].read(tokens)

    def earned(self, reward: float | None) -> None:
        """A reward for the last turn, at its last token."""
        if reward is not None:
            row = next(row for row in reversed(self._rows) if row.written)
            row.rewards[row.last] = row.rewards.get(row.last, 0.0) + reward
            self._rewarded = True

    def cut(self) -> None:
        """A limit ends it."""
        self.over = self.truncated = True

    def rows(self) -> Batch:
        """One row, or with `split` one for each turn, up to the last token that the model wrote. Raises DataFailure if
        it wrote none."""
        written = [row for row in self._rows if row.written]
        if not written:
            raise DataFailure(f"episode {self._request.id}: its time was up before the model had written anything")
        return Batch.concat([self._built(row) for row in written])

    def turn_rows(self) -> tuple[TurnRow, ...] | None:
        """What the driver has to know of each row, if there are several."""
        if not self._request.split:
            return None
        found: list[TurnRow] = []
        earned = 0.0
        for row in self._rows:
            if row.written:
                found.append(TurnRow(row.last + 1, row.written, earned))
                earned += self._request.reward_weight * row.reward
        return tuple(found)

    def _built(self, row: _Row) -> Batch:
        length = row.last + 1
        reward = np.zeros(length, np.float32)
        for place, earned in row.rewards.items():
            reward[place] = self._request.reward_weight * earned
        return Batch.build(
            [length],
            tokens=np.asarray(row.tokens[:length], np.int32),
            mask=np.asarray(row.mask[:length], np.bool_),
            sample_logps=np.asarray(row.logps[:length], np.float32),
            version=np.asarray(row.versions[:length], np.int32),
            turn_reward=reward,
            group=np.asarray([self._request.group], np.int64),
            truncated=[self.truncated],
            **self._recorded(row, length),
        )

    def _recorded(self, row: _Row, length: int) -> dict[str, np.ndarray]:
        """What each of the model's tokens could have been, and the experts that tokens were sent to, if asked for."""
        found: dict[str, np.ndarray] = {} if row.routes is None else {ROUTES: row.routes[:length]}
        if self._request.sampling.records_admitted:
            found[ADMITTED] = np.asarray(row.admitted[:length], np.int32)
        return found

    def _left(self, length: int) -> int:
        """Tokens that may follow in a row of that length."""
        return self._limits.tokens - (length - self.prompt_tokens)


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
            if not done and request.split:
                tokens = self.conversation.prompt([*before, message, *reply.messages], opened.tools, variables)
            elif not done:
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
        answers = int(episode.rows().lengths[-1]) - episode.prompt_tokens - episode.written
        return EpisodeFacts(
            episode.turns,
            self.calls,
            self.failures,
            max(0, answers),  # a template may have dropped what the model wrote in earlier turns
            self.seconds["engine"],
            self.seconds["environment"],
            episode.reward,
        )


class Lost(Exception):
    """The environment did not do its part."""

    def __init__(self, lost: EnvironmentLost) -> None:
        super().__init__(lost.why)
        self.lost = lost
