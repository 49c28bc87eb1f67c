"""A reward that is a judge: a language model which is asked about completions (`judging`).

    samples ─► plans of questions ─┬─► the chat completions of an OpenAI-compatible endpoint (`JudgeCaller`) ─┬─► values
                                   └─► an engine role of the run (`engine_judge`) ───────────────────────────┘

A question is asked with a deadline and retries of its own, so that one answer that is late costs one question. A
question that fails for good fails the whole call, and `on_failure` decides; an answer that cannot be read is no failure
but no opinion, and is counted.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from actors.errors import ConfigError
from rewards.attempts import Attempts, GaveUp, call_statistics, instead, within
from rewards.caller import Scored
from rewards.calls import Log, Samples
from rewards.http_client import SHOWN, HttpClient, from_environment, json_of, refuse_address
from rewards.judging import PATTERNS, Asking, Judged, Kind, Plan, all_true
from rewards.reward import AttemptFailed, FailureKind, Handling

PROMPTS = Path(__file__).parent / "judge_prompts"
CONCURRENCY = 16  # questions at the same time, of each worker, unless the configuration says otherwise


@dataclass(frozen=True)
class Judge:
    """One judge. It is an endpoint (`urls`, each a base address that ends in /v1) or an engine `role`. `template`: a
    file, or a prompt with its fields in braces; None: the prompt of its kind that comes with Troupe. `request`: further
    fields of an endpoint's request, as they are; None takes one out. Once `located`, there is `asking`, and `headers`
    has the key. Picklable."""

    kind: Kind = "pairwise"
    urls: tuple[str, ...] = ()
    model: str | None = None
    api_key_env: str | None = None
    role: str | None = None
    template: str | None = None
    pattern: str | None = None
    score_range: tuple[float, float] = (0.0, 10.0)
    judgements: int = 1
    against: str | None = None
    temperature: float = 0.0
    max_tokens: int = 512
    request: Mapping[str, Any] = field(default_factory=dict[str, Any])
    asking: Asking = field(default=Asking("pairwise", "", ""), repr=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)

    @property
    def label(self) -> str:
        return self.role or str(self.model).rsplit("/", 1)[-1]

    def located(self, *, allow_private: bool) -> Judge:
        """The same, with its prompt and its key. Raises ConfigError."""
        for url in self.urls:
            refuse_address(url, allow_private=allow_private)
        lowest, highest = self.score_range
        pattern = self.pattern or PATTERNS[self.kind]
        asking = Asking(self.kind, self._prompt(), pattern, lowest, highest, self.judgements, self.against)
        asking.check(f"reward judge {self.label}")
        variables = {} if self.api_key_env is None else {"Authorization": self.api_key_env}
        keys = from_environment(variables, self.urls[0] if self.urls else self.label)
        headers = {name: f"Bearer {key}" for name, key in keys.items()}
        return replace(self, asking=asking, headers=headers)

    def _prompt(self) -> str:
        if self.template is not None and "{" in self.template:
            return self.template
        path = Path(self.template).expanduser() if self.template else PROMPTS / f"{self.kind}.txt"
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"reward judge {self.label}: template={path} cannot be read: {error}") from None


@dataclass(frozen=True)
class JudgeSpec:
    """A reward that one judge gives, or several binary ones together: a mixture (`judging.all_true`). Picklable."""

    judges: tuple[Judge, ...]
    weight: float = 1.0
    name: str | None = None
    handling: Handling = field(default_factory=Handling)
    allow_private: bool = False

    @property
    def label(self) -> str:
        """What it is called in metrics."""
        return self.name or self.judges[0].label

    @property
    def is_preference(self) -> bool:
        """Whether its values are win rates over the siblings of a completion, and no scores."""
        return self.judges[0].kind == "pairwise" and self.judges[0].against is None

    @property
    def by_engine(self) -> bool:
        """Whether engines of the run are asked."""
        return self.judges[0].role is not None

    @property
    def needs(self) -> frozenset[str]:
        """Columns that the data set must have for it. Known once it is located."""
        return frozenset(chain.from_iterable(judge.asking.columns for judge in self.judges))

    def requests(self, completions: int) -> int:
        """The most questions that so many completions of a prompt make."""
        return sum(judge.asking.requests(completions) for judge in self.judges)

    def located(self) -> JudgeSpec:
        """The same, with prompts and keys. Raises ConfigError."""
        judges = tuple(judge.located(allow_private=self.allow_private) for judge in self.judges)
        return replace(self, judges=judges)

    def plans(self, samples: Samples) -> list[Plan]:
        """The questions of each judge."""
        return [judge.asking.plan(samples.cases) for judge in self.judges]

    def scored(self, plans: Sequence[Plan], answers: Sequence[Mapping[str, Sequence[str]]]) -> tuple[Any, Log]:
        """([n] float32, NaN for no opinion; what is logged of it) from each judge's answers to its questions."""
        each = [plan.judged(given) for plan, given in zip(plans, answers, strict=True)]
        judged = all_true(each) if len(each) > 1 else each[0]
        values = np.array([np.nan if value is None else value for value in judged.values], np.float32)
        return values, self._log(judged)

    def _log(self, judged: Judged) -> Log:
        log = Log(len(judged.values))
        if judged.answers:
            log.log_metric(f"rewards/{self.label}/frac_unparsable", judged.unparsable / judged.answers)
        if judged.comparisons:
            log.log_metric(f"rewards/{self.label}/frac_order_decides", judged.contradictory / judged.comparisons)
        log.log_extra(f"{self.label}/said", [list(texts) for texts in judged.said])
        return log


class JudgeCaller:
    """Asks the endpoints of a judge on behalf of one worker. Used from one event loop."""

    hanging = 0  # a question is cancelled at its deadline

    def __init__(self, spec: JudgeSpec) -> None:
        self.name, self.weight, self.is_preference, self._spec = spec.label, spec.weight, spec.is_preference, spec
        self._chats = [ChatEndpoint(judge, allow_private=spec.allow_private) for judge in spec.judges]
        self._attempts = Attempts(spec.handling.retries, spec.handling.concurrency)

    async def score(self, samples: Samples) -> Scored:
        """Raises InfraFailure, DataFailure or BudgetExhausted with the reward's name, as `on_failure` says."""
        failures, handling = Counter[str](), self._spec.handling
        began = asyncio.get_running_loop().time()
        plans = self._spec.plans(samples)
        try:
            answers = await self._answers(plans, failures)
            values, log = self._spec.scored(plans, answers)
            stood_in = False
        except GaveUp as error:
            values, log, stood_in = instead(self.name, handling, error, len(samples)), Log(len(samples)), True
        seconds = asyncio.get_running_loop().time() - began
        return Scored(values, log, call_statistics(seconds, failures, handling.on_failure, stood_in=stood_in))

    def close(self) -> None:
        for chat in self._chats:
            chat.close()

    async def _answers(self, plans: Sequence[Plan], failures: Counter[str]) -> list[dict[str, list[str]]]:
        """Of each judge: question -> answers. The first question that fails for good cancels the others."""
        questions = [
            (place, text)
            for place, plan in enumerate(plans)
            for text in plan.questions
            for _ in range(plan.asking.judgements)
        ]
        tasks = [
            asyncio.ensure_future(self._attempts.run(self._attempt(self._chats[place], text), failures))
            for place, text in questions
        ]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        answers: list[dict[str, list[str]]] = [{} for _ in plans]
        for (place, text), (answer, _) in zip(questions, found, strict=True):
            answers[place].setdefault(text, []).append(answer)
        return answers

    def _attempt(self, chat: ChatEndpoint, question: str) -> Callable[[], Any]:
        async def attempt() -> str:
            try:
                return await within(self._spec.handling.timeout_s, chat.ask(question), self.name)
            except AttemptFailed as error:
                if error.kind is FailureKind.TIMEOUT:
                    raise
                raise AttemptFailed(error.kind, f"reward {self.name}: {error}", error.retry_after_s) from None

        return attempt


class ChatEndpoint:
    """Chat completions of an OpenAI-compatible server, one question at a time."""

    def __init__(self, judge: Judge, *, allow_private: bool) -> None:
        self._judge = judge
        urls = [f"{url.rstrip('/')}/chat/completions" for url in judge.urls]
        self._client = HttpClient(urls, judge.headers, allow_private=allow_private)

    async def ask(self, question: str) -> str:
        """What it answers; empty for an answer without text. Raises AttemptFailed."""
        body = {
            "model": self._judge.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": self._judge.temperature,
            "max_tokens": self._judge.max_tokens,
            **self._judge.request,
        }
        given = {name: value for name, value in body.items() if value is not None}
        return await self._client.post(json.dumps(given).encode(), _content)

    def close(self) -> None:
        self._client.close()


def _content(text: bytes, url: str) -> str:
    """The text of the first choice. A refusal, or thoughts that were cut, leave it empty: no opinion."""
    answer = json_of(text, url)
    try:
        content = answer["choices"][0]["message"].get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        shown = text[:SHOWN].decode(errors="replace")
        raise AttemptFailed(FailureKind.INVALID, f"{url}: the answer is no chat completion: {shown}") from None
    if isinstance(content, str | None):
        return content or ""
    raise AttemptFailed(FailureKind.INVALID, f"{url}: the message's content is a {type(content).__name__}")
