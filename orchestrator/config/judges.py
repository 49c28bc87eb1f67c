"""The `judge:` section of a reward: which language model is asked, what it is asked, and how its answers are read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.config.section import Positive, Section
from rewards.judge import Judge
from rewards.judging import Kind

OF_ENDPOINTS = ("model", "api_key_env", "request")


def one_or_several(value: Any) -> Any:
    """A single value, or mapping, as a list of one."""
    return (value,) if isinstance(value, str | dict) else value


Texts = Annotated[tuple[str, ...], Field(min_length=1)]
OneOrSeveralTexts = Annotated[Texts, BeforeValidator(one_or_several, json_schema_input_type=str | Texts)]


class JudgeConfig(Section):
    """A language model that is asked about completions: behind an endpoint (`url`), or an engine role of the run
    (`role`). What it is asked and how its answers are read: docs/rewards.md."""

    kind: Kind = Judge.kind
    """What it decides: the better of two completions (its win rate), a score within `score_range`, or yes or no."""
    url: OneOrSeveralTexts | None = None
    """Base address of an OpenAI-compatible server, as https://HOST/v1, or a list of the addresses of its replicas."""
    model: str | None = None
    """The name by which the server knows the model."""
    api_key_env: str | None = None
    """Environment variable with the server's key, read where the run starts. None: no key is sent."""
    request: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request to the server, as they are; none takes one out (max_tokens: none)."""
    role: str | None = None
    """Instead of `url`: the engine role that is asked."""
    template: str | None = None
    """Its prompt with fields in braces, or the file that has it. None: the one of its kind that comes with Troupe."""
    pattern: str | None = None
    """Regular expression that reads an answer by its named groups; the last match counts. None: that of `kind`."""
    score_range: tuple[float, float] = Judge.score_range
    """Lowest and highest score of a rubric; others are no opinion."""
    judgements: Positive = Judge.judgements
    """Answers to each question, of which the mean is taken."""
    against: str | None = None
    """Pairwise: the column with a text that each completion is compared with. None: its siblings."""
    temperature: Annotated[float, Field(ge=0)] = Judge.temperature
    """Sampling temperature of its answers."""
    max_tokens: Positive = Judge.max_tokens
    """Tokens of its longest answer."""

    @model_validator(mode="after")
    def _fits(self) -> JudgeConfig:
        if (self.url is None) == (self.role is None):
            raise ValueError("a judge is an endpoint (url: ADDRESS, model: NAME) or an engine role (role: NAME)")
        if self.url is not None and self.model is None:
            raise ValueError("a judge with a url needs the name of its model there (model: NAME)")
        set_keys = [key for key in OF_ENDPOINTS if getattr(self, key)]
        if self.role is not None and set_keys:
            raise ValueError(f"{set_keys[0]} is for a judge with a url; the model of an engine role is its role's")
        if self.judgements > 1 and self.temperature == 0:
            raise ValueError(f"judgements={self.judgements} at temperature=0 are all the same; set temperature above 0")
        return self._of_kind()

    def _of_kind(self) -> JudgeConfig:
        if self.kind != "pairwise" and self.against is not None:
            raise ValueError(
                f"against is for kind=pairwise; this judge is {self.kind}, and its prompt may name columns"
            )
        if self.kind != "rubric" and self.score_range != Judge.score_range:
            raise ValueError(f"score_range is for kind=rubric; this judge is {self.kind}")
        if self.score_range[0] >= self.score_range[1]:
            raise ValueError(f"score_range={list(self.score_range)} must rise")
        return self

    def built(self) -> Judge:
        """As the workers are given it, nothing looked for yet."""
        same = {name: getattr(self, name) for name in type(self).model_fields if name != "url"}
        return Judge(urls=self.url or (), **same)
