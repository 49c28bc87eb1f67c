"""From what a configuration says about a reward to something that is found, checked and ready to travel.

fn:    package.module:function ─► RewardSpec    (`loading`)       runs in a reward worker
actor: ray://NAMESPACE/NAME ────► ActorSpec     (`named_actor`)   runs in another job's process
url:   https://HOST/PATH ───────► EndpointSpec  (`http_endpoint`) runs in a server
judge: {kind, url or role ...} ─► JudgeSpec     (`judge`)         a language model that a server or an engine runs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from actors.errors import ConfigError
from rewards.http_endpoint import EndpointSpec
from rewards.judge import CONCURRENCY, Judge, JudgeSpec
from rewards.loading import RewardSpec
from rewards.named_actor import ActorSpec
from rewards.reward import Handling, OnFailure

Spec = RewardSpec | ActorSpec | EndpointSpec
AnySpec = Spec | JudgeSpec

REMOTE_RETRIES = 2  # of an actor, an endpoint or a judge, unless the configuration says otherwise; a function has none
GRACE_S = 5.0  # for which a worker may be late with a call all of whose attempts have ended


class Settings(Protocol):
    """What a configuration says about one reward that is no model's score."""

    @property
    def fn(self) -> str | None: ...

    @property
    def actor(self) -> str | None: ...

    @property
    def method(self) -> str: ...

    @property
    def url(self) -> tuple[str, ...] | None: ...

    @property
    def judges(self) -> tuple[Judge, ...]: ...

    @property
    def headers_from_env(self) -> Mapping[str, str]: ...

    @property
    def allow_private(self) -> bool: ...

    @property
    def columns(self) -> tuple[str, ...] | None: ...

    @property
    def weight(self) -> float: ...

    @property
    def name(self) -> str | None: ...

    @property
    def options(self) -> Mapping[str, Any]: ...

    @property
    def timeout_s(self) -> float | None: ...

    @property
    def retries(self) -> int | None: ...

    @property
    def on_failure(self) -> OnFailure: ...

    @property
    def concurrency(self) -> int | None: ...


def spec_of(settings: Settings) -> AnySpec:
    """The reward that a configuration names, not looked for yet."""
    retries = settings.retries
    if retries is None:
        retries = 0 if settings.fn is not None else REMOTE_RETRIES
    concurrency = settings.concurrency or (CONCURRENCY if settings.judges else None)
    handling = Handling(settings.timeout_s, retries, settings.on_failure, concurrency)
    if settings.judges:
        return JudgeSpec(settings.judges, settings.weight, settings.name, handling, settings.allow_private)
    named = (settings.weight, settings.name, dict(settings.options), handling)
    if settings.fn is not None:
        return RewardSpec(settings.fn, *named)
    if settings.actor is not None:
        return ActorSpec(settings.actor, settings.method, *named, settings.columns)
    assert settings.url is not None, "the score of a model is called by nobody here"
    variables, private = dict(settings.headers_from_env), settings.allow_private
    return EndpointSpec(settings.url, *named, settings.columns, variables, private)


def check_reward(settings: Settings) -> AnySpec:
    """The reward that a configuration names, found and ready to travel. Raises ConfigError: call it before a launch."""
    return spec_of(settings).located()


def with_deadlines(specs: Iterable[AnySpec], timeout_s: float) -> list[AnySpec]:
    """Each reward outside our processes that has no deadline of its own gets that one: it may be out of reach, and a
    function of ours that hangs is ended with its worker. Engines have their role's."""
    return [
        spec
        if isinstance(spec, RewardSpec) or asks_engines(spec) or spec.handling.timeout_s is not None
        else replace(spec, handling=replace(spec.handling, timeout_s=timeout_s))
        for spec in specs
    ]


def with_concurrency(specs: Iterable[AnySpec], calls: int) -> list[AnySpec]:
    """Each function that has no limit of its own gets that of its worker's calls. Without one, the thread of a function
    that was given up would run beside the worker's next call."""
    return [
        replace(spec, handling=replace(spec.handling, concurrency=calls))
        if isinstance(spec, RewardSpec) and spec.handling.concurrency is None
        else spec
        for spec in specs
    ]


def asks_engines(spec: AnySpec) -> bool:
    """Whether it is a judge that is an engine role of the run."""
    return isinstance(spec, JudgeSpec) and spec.by_engine


def call_timeout_s(specs: Sequence[AnySpec], timeout_s: float, calls: int, completions: int = 1) -> float:
    """Deadline of a worker's call, of which it carries `calls` at the same time, each with that many completions: no
    sooner than all attempts of its rewards may have ended, or else the worker would be killed for waiting as it was
    told."""
    attempts = [(spec.handling, spec.requests(completions) if isinstance(spec, JudgeSpec) else 1) for spec in specs]
    own = [handling.longest_s(calls * each) for handling, each in attempts if handling.timeout_s is not None]
    return max([timeout_s, *(each + GRACE_S for each in own)])


def check_columns(rewards: Iterable[AnySpec], columns: Collection[str], where: str) -> None:
    """Raises ConfigError if a reward needs a column that the data does not have. `where`: what to call that data."""
    for spec in rewards:
        needs = spec.needs if isinstance(spec, JudgeSpec) or spec.needs is not None else spec.located().needs
        missing = sorted((needs or frozenset()) - set(columns))
        if missing:
            raise ConfigError(
                f"reward {spec.label} needs the column {missing[0]!r}, which {where} does not have; it has "
                f"{', '.join(sorted(columns)) or 'none'}\n"
                f"rename one with data.columns.{missing[0]}=NAME, or give the reward an option of that name"
            )


def check_names(labels: Iterable[str]) -> None:
    """Raises ConfigError if two rewards share a name: metrics and tables would hold one of them."""
    twice = [name for name, count in Counter(labels).items() if count > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is the name of two rewards; give one of them another: rewards[1].name=NAME")
