"""The `rewards:` list of a configuration: where each reward is, what it weighs, and what is done around its calls."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.config.section import Positive, Seconds, Section

CALLED = ("fn", "actor", "url")  # kinds of rewards that are called with texts; the other is the score of a role's model
KINDS = {
    "fn": "a function (fn: NAME)",
    "actor": "a named Ray actor (actor: ray://NAMESPACE/NAME)",
    "url": "an HTTP endpoint (url: ADDRESS)",
    "role": "a model's score (role: NAME)",
}
KINDS_WITH = {  # a key -> the kinds of rewards that it says something about; the others: all
    "options": CALLED,
    "timeout_s": CALLED,
    "retries": CALLED,
    "on_failure": CALLED,
    "concurrency": CALLED,
    "columns": ("actor", "url"),
    "method": ("actor",),
    "headers_from_env": ("url",),
    "allow_private": ("url",),
}


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class RewardConfig(Section):
    """One reward: a function (`fn`), a named Ray actor (`actor`), an HTTP endpoint (`url`), or the score of a role's
    model (`role`). What each of them is given and returns: docs/rewards.md."""

    fn: str | None = None
    """A shipped reward's name, `package.module:function` or `path/to/file.py:function`."""
    actor: str | None = None
    """Instead of `fn`: an actor of another job in the same Ray cluster, as ray://NAMESPACE/NAME."""
    url: Annotated[tuple[str, ...], BeforeValidator(_one_or_several), Field(min_length=1)] | None = None
    """Instead of `fn`: the address of an HTTP endpoint, or a list of the addresses of its replicas."""
    role: str | None = None
    """Instead of `fn`: the role whose model scores prompt and completion with one number."""
    weight: float = 1.0
    """Factor of this reward in the sum."""
    name: str | None = None
    """Its name in metrics. Default: that of the function, actor, host or role."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function or the actor's method; an endpoint gets them as `options`."""
    method: str = "score"
    """The actor's method."""
    columns: tuple[str, ...] | None = None
    """Columns of the data set sent to an actor or endpoint besides prompts and completions. None: all."""
    headers_from_env: dict[str, str] = Field(default_factory=dict)
    """Headers sent to an endpoint: header name -> environment variable with its value, read where the run starts."""
    allow_private: bool = False
    """Allow an endpoint whose address is not on the public Internet (localhost, 10.0.0.5)."""
    timeout_s: Seconds | None = None
    """Deadline of one attempt. None: the role's timeout_s; for a function, that of the whole call."""
    retries: Annotated[int, Field(ge=0)] | None = None
    """Attempts after the first failure, with growing pauses between them. None: 2; for a function 0."""
    on_failure: Literal["retry", "drop", "fail"] | float = "retry"
    """If all attempts fail: try another worker, drop the group, end the run, or use this number (docs/rewards.md)."""
    concurrency: Positive | None = None
    """Concurrent calls of this reward per worker. None: the role's concurrency."""

    @model_validator(mode="after")
    def _one_kind(self) -> RewardConfig:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a reward is {', '.join(KINDS.values())}: one of them; given: {', '.join(given) or 'none'}"
            )
        for key, kinds in KINDS_WITH.items():
            default: Any = type(self).model_fields[key].get_default(call_default_factory=True)
            if given[0] not in kinds and getattr(self, key) != default:
                raise ValueError(
                    f"{key} is for {' or '.join(KINDS[kind] for kind in kinds)}; this is {KINDS[given[0]]}"
                )
        return self
