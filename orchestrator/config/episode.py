"""The `episode:` section of a phase: with whom the model talks, and how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from orchestrator.config.section import Positive, Seconds, Section


class EpisodeConfig(Section):
    """Samples that talk to tools or to an environment, in several turns. The three ways to say with whom, and what
    users' code looks like: docs/episodes.md."""

    tools: tuple[str, ...] = ()
    """Functions that the model may call: shipped names, `package.module:function` or `path/to/file.py:function`."""
    environment: str | None = None
    """A class with `reset(row)` and `step(message)`, named in the same ways."""
    environment_factory: str | dict[str, str] | None = None
    """A class whose public methods are tools, as in TRL; or several, chosen by the column `environment` of the data."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""
    split: Literal["none", "turns"] = "none"
    """turns: each turn is a row of its own, for templates that rewrite earlier turns. none: an episode is a row."""
    max_turns: Positive = 10
    """Turns of the model. What the last one calls is carried out, and its answer not read."""
    max_turn_tokens: Positive | None = None
    """Tokens of one turn of the model. None: as many as `sampling.max_tokens` leaves, which holds for the episode."""
    max_prompt_tokens: Positive | None = None
    """Tokens before the first turn, tools and first words of the environment included. None: as the data suggests."""
    timeout_s: Seconds = 600.0
    """Seconds of one episode; then the turn under way is given up, and the episode ends."""
    max_answer_chars: Positive = 8192
    """Characters of one message of a tool or the environment; longer ones are cut."""
    tool_parser: Literal["auto", "hermes", "response_template"] = "auto"
    """How calls are written. auto: by the tokenizer's `response_template`, else hermes: <tool_call>JSON</tool_call>."""
    reward_weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of what the environment itself rewards, beside the rewards of `rewards:`."""

    @model_validator(mode="after")
    def _somebody_to_talk_to(self) -> EpisodeConfig:
        if self.environment is not None and (self.environment_factory is not None or self.tools):
            other = "environment_factory" if self.environment_factory is not None else "tools"
            raise ValueError(
                f"environment and {other}: an environment answers every turn itself; give one of the two (an "
                "environment may have an attribute `tools`)"
            )
        if not self.tools and self.environment is None and not self.environment_factory:
            raise ValueError("it names nobody to talk to; give tools, environment or environment_factory")
        if self.options and self.environment is None and self.environment_factory is None:
            raise ValueError("options are those of a class, and tools are functions; leave them out")
        return self

    @property
    def factories(self) -> dict[str, str]:
        """By the value of the column `environment`; under "" the one for all rows."""
        given = self.environment_factory
        return {"": given} if isinstance(given, str) else dict(given or {})
