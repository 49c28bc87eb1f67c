"""The `rewards:` list of a configuration: where each reward is, what it weighs, and what is done around its calls."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.config.judges import JudgeConfig, OneOrSeveralTexts, one_or_several
from orchestrator.config.section import Positive, Seconds, Section
from rewards.combine import Combine
from rewards.judge import Judge

CALLED = ("fn", "actor", "url")  # kinds of rewards that are called with texts as they are, and return numbers
KINDS = {
    "fn": "a function (fn: NAME)",
    "actor": "a named Ray actor (actor: ray://NAMESPACE/NAME)",
    "url": "an HTTP endpoint (url: ADDRESS)",
    "judge": "a judge (judge: {...})",
    "role": "a model's score (role: NAME)",
}
KINDS_WITH = {  # a key -> the kinds of rewards that it says something about; the others: all
    "options": CALLED,
    "timeout_s": (*CALLED, "judge"),
    "retries": (*CALLED, "judge"),
    "concurrency": (*CALLED, "judge"),
    "columns": ("actor", "url"),
    "combine": ("role",),
    "deviations": ("role",),
    "steps": ("role",),
    "step_separator": ("role",),
    "method": ("actor",),
    "headers_from_env": ("url",),
    "allow_private": ("url", "judge"),
}


Judges = Annotated[tuple[JudgeConfig, ...], Field(min_length=1)]
OneOrSeveralJudges = Annotated[Judges, BeforeValidator(one_or_several, json_schema_input_type=JudgeConfig | Judges)]


class RewardConfig(Section):
    """One reward: a function (`fn`), a named Ray actor (`actor`), an HTTP endpoint (`url`), a judge (`judge`), or the
    score of a role's model (`role`). What each of them is given and returns: docs/rewards.md."""

    fn: str | None = None
    """A shipped reward's name, `package.module:function` or `path/to/file.py:function`."""
    actor: str | None = None
    """Instead of `fn`: an actor of another job in the same Ray cluster, as ray://NAMESPACE/NAME."""
    url: OneOrSeveralTexts | None = None
    """Instead of `fn`: the address of an HTTP endpoint, or a list of the addresses of its replicas."""
    judge: OneOrSeveralJudges | None = None
    """Instead of `fn`: a language model that judges, or a list of binary judges that must all say yes."""
    role: OneOrSeveralTexts | None = None
    """Instead of `fn`: the role whose model scores prompt and completion with one number; or several, an ensemble."""
    combine: Combine = "mean"
    """Of an ensemble: how its scores become one. mean_minus_std: less `deviations` standard deviations over them."""
    deviations: Annotated[float, Field(gt=0)] = 1.0
    """Of an ensemble with combine=mean_minus_std: the price of disagreement, in standard deviations."""
    steps: Literal["min", "product", "last", "mean", "each"] | None = None
    """Of a process reward model: how the probabilities of its steps become one; each: they stay. None: no such."""
    step_separator: str = "\n"
    """Text at which a step ends."""
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
    """Allow an endpoint, of a judge too, whose address is not on the public Internet (localhost, 10.0.0.5)."""
    timeout_s: Seconds | None = None
    """Deadline of one attempt (of a judge: at one question). None: the role's timeout_s; a function: of the call."""
    retries: Annotated[int, Field(ge=0)] | None = None
    """Attempts after the first failure, with growing pauses between them. None: 2; for a function 0."""
    on_failure: Literal["retry", "drop", "fail"] | float = "retry"
    """If all attempts fail: try another worker, drop the group, end the run, or use this number (docs/rewards.md)."""
    concurrency: Positive | None = None
    """Concurrent calls of this reward per worker, of a judge questions. None: the role's concurrency; of a judge 16."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the run that it asks."""
        asked = (*(self.role or ()), *(judge.role for judge in self.judge or ()))
        return tuple(role for role in asked if role is not None)

    @property
    def judges(self) -> tuple[Judge, ...]:
        return tuple(judge.built() for judge in self.judge or ())

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
        if self.steps is None and self.step_separator != "\n":
            raise ValueError("step_separator is for a process reward model; set steps=min, product, last or mean, too")
        if self.steps == "each" and not isinstance(self.on_failure, str):
            raise ValueError(
                f"on_failure={self.on_failure:g} would be the reward of an answer, and with steps=each every step has "
                "one; use retry, drop or fail"
            )
        self._check_ensemble()
        return self._one_judge_or_binary_ones()

    def _check_ensemble(self) -> None:
        if self.role is None:
            return
        twice = next((role for role in self.role if self.role.count(role) > 1), None)
        if twice is not None:
            raise ValueError(f"role names {twice} twice: an ensemble is of different models; name each once")
        if len(self.role) == 1 and self.combine != "mean":
            raise ValueError(
                f"combine={self.combine} says how the scores of several models become one, and role names "
                f"{self.role[0]} alone; name several, or leave combine out"
            )
        if len(self.role) > 1 and self.steps == "each":
            raise ValueError(
                "steps=each takes the steps of one model, and role names several: an ensemble has one score per "
                "answer; use steps=min, product, last or mean, or one role"
            )
        if self.combine != "mean_minus_std" and self.deviations != 1.0:
            raise ValueError(f"deviations={self.deviations:g} is for combine=mean_minus_std; this is {self.combine}")

    def _one_judge_or_binary_ones(self) -> RewardConfig:
        judges = self.judge
        if judges is None:
            return self
        others = [judge.kind for judge in judges if judge.kind != "binary"]
        if len(judges) > 1 and others:
            raise ValueError(f"several judges are a mixture: each must be kind=binary; one is {others[0]}")
        if len({judge.role is None for judge in judges}) > 1:
            raise ValueError("the judges of a mixture are all endpoints, or all engine roles; make it two rewards")
        role = next(judge.role for judge in judges)
        idle = [key for key in ("timeout_s", "retries", "concurrency", "allow_private") if getattr(self, key)]
        if role is not None and idle:
            raise ValueError(
                f"{idle[0]} is for a judge with a url; an engine role has limits of its own: "
                f"roles.{role}.request_timeout_s, max_attempts and max_concurrency"
            )
        return self
