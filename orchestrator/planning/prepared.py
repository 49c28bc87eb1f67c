"""A run whose configuration, model, tokenizer, data and rewards are resolved: what is planned, placed and trained."""

# pyright: basic
# (tokenizers are typed in part only)

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from actors.columns import Head
from actors.other_prompts import OtherPrompts
from actors.specs import LoraSpec
from orchestrator.config.roles import EngineRole
from orchestrator.config.schema import PhaseConfig, RunConfig
from orchestrator.credit.step_rewards import Steps
from orchestrator.data.awaited import AwaitedSource
from orchestrator.data.source import RowSource, Source
from orchestrator.pipeline import Pipeline, Stage, Verb, items_of
from orchestrator.planning.episode_settings import EpisodeSettings
from orchestrator.planning.memory_estimate import Shape
from orchestrator.planning.plan import Plan, draft_plan
from orchestrator.planning.schedule import Schedule
from rewards.combine import Combine
from rewards.judge import JudgeSpec
from rewards.reward import OnFailure
from rewards.specs import AnySpec
from rollout.sampling import Sampling


@dataclass(frozen=True)
class PreparedPhase:
    """A phase whose pipeline closes and whose data is open."""

    name: str
    index: int
    config: PhaseConfig
    pipeline: Pipeline
    source: Source
    evaluation: Source | None  # held-out prompts
    held_out: Source | None  # held-out rows
    schedule: Schedule
    sampling: Sampling
    first_version: int  # of the policy's weights when the phase begins
    kept: tuple[Path, ...] = ()  # folders of columns that were computed for the whole data set
    episode: EpisodeSettings | None = None  # how its samples talk to an environment, if they do

    @property
    def steps(self) -> int:
        return self.schedule.steps

    @property
    def drawn(self) -> str:
        """One line: how much of the data the phase learns from."""
        length = None if self.config.data.streaming or self.awaits_data else len(self.source)
        return self.schedule.describe(items_of(self.pipeline.data), length)

    @property
    def awaits_data(self) -> bool:
        """Whether an earlier phase is still to make the data."""
        return isinstance(self.source, AwaitedSource)

    @property
    def scores(self) -> bool:
        """Whether the rewards are asked in this phase."""
        return self.evaluation is not None or any(stage.verb is Verb.SCORE for stage in self.pipeline)

    @property
    def temperature(self) -> float:
        """The temperature at which log-probabilities are taken: the method's, else the sampling temperature; 1 if
        nothing is sampled or sampling is greedy."""
        if self.pipeline.temperature is not None:
            return self.pipeline.temperature
        return (self.sampling.temperature or 1.0) if self.pipeline.generates else 1.0

    def prompt_tokens(self, source: Source) -> int:
        """Of the longest prompt of a data set, as the engine may see it."""
        return source.longest.prompt if self.episode is None else self.episode.limits.prompt_tokens

    @property
    def row_sources(self) -> dict[str, RowSource]:
        """By field: the training data and the held-out rows, which pass the same stages."""
        fields = {"source": self.source, "held_out": self.held_out}
        return {name: source for name, source in fields.items() if isinstance(source, RowSource)}

    def with_precomputed(
        self, stage: Stage, values: Mapping[str, NDArray[Any]], folders: Iterable[Path]
    ) -> PreparedPhase:
        """The phase with what a stage would write, so that it need not run: for each of `row_sources` its values, one
        for each token."""
        (column,) = stage.writes
        note = f"{column} of every row from the cache"
        sources: dict[str, Any] = {
            name: source.with_column(column, values[name], note) for name, source in self.row_sources.items()
        }
        return replace(self, pipeline=self.pipeline.without_stage(stage), kept=(*self.kept, *folders), **sources)


@dataclass(frozen=True)
class ModelReward:
    """A reward that is the score of a role's model: of the whole answer, or made of what it says of its steps. Several
    roles are an ensemble, whose scores become one as `combine` says."""

    roles: tuple[str, ...]
    weight: float
    label: str
    on_failure: OnFailure = "retry"
    steps: Steps | None = None
    combine: Combine = "mean"
    deviations: float = 1.0

    @property
    def head(self) -> Head:
        """The last layer that its model must have."""
        return Head.ROW_SCALAR if self.steps is None else Head.STEP_SCALAR


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to be planned and placed."""

    config: RunConfig
    model: str  # folder or hub name
    models: Mapping[str, str]  # likewise, of roles that have one of their own
    handed_over: Mapping[str, str]  # of roles whose model an earlier phase leaves, the placeholder for it
    tokenizer_path: str
    tokenizer: Any
    phases: tuple[PreparedPhase, ...]
    rewards: tuple[AnySpec, ...]  # functions, named actors, HTTP endpoints, judges
    model_rewards: tuple[ModelReward, ...]
    parameters: int | None
    own_parameters: Mapping[str, int | None] = field(default_factory=dict[str, int | None])  # of roles that differ
    # Of phases whose `train.token_budget` was chosen: why that.
    budget_notes: Mapping[str, str] = field(default_factory=dict[str, str])
    # Of engine roles whose `engine` was chosen: which, and why.
    engine_notes: Mapping[str, str] = field(default_factory=dict[str, str])
    # Of engine roles that follow a role with adapters: why they get merged weights; None: they get the adapters alone.
    merged_because: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    shapes: Mapping[str, Shape] = field(default_factory=dict[str, Shape])  # of roles' models, where they are known

    @property
    def lora(self) -> LoraSpec | None:
        """Of trained roles."""
        settings = self.config.model.lora
        return None if settings is None else LoraSpec(**settings.model_dump())

    def plan(self) -> Plan:
        """May have `refusals`."""
        return draft_plan(
            self.config,
            {phase.name: phase.pipeline for phase in self.phases},
            parameters=self.parameters,
            own_parameters=self.own_parameters,
            shapes=self.shapes,
            merged_because=self.merged_because,
            budget_notes=self.budget_notes,
            engine_notes=self.engine_notes,
        )

    @property
    def generates(self) -> bool:
        return any(phase.pipeline.generates or phase.evaluation for phase in self.phases)

    @property
    def scores(self) -> bool:
        return bool(self.rewards or self.model_rewards) and self.generates

    @property
    def engine_judges(self) -> tuple[JudgeSpec, ...]:
        """Judges whose questions an engine role answers."""
        return tuple(spec for spec in self.rewards if isinstance(spec, JudgeSpec) and spec.by_engine)

    @property
    def reward_names(self) -> tuple[str, ...]:
        """In the order in which a group's rewards stand beside one another (`collection/scoring.py`): those that
        scorers call, models, judges of an engine role."""
        called = (each.label for each in self.rewards if each not in self.engine_judges)
        return (*called, *(each.label for each in self.model_rewards), *(each.label for each in self.engine_judges))

    @property
    def judging_roles(self) -> tuple[str, ...]:
        """Engine roles that answer the questions of judges."""
        roles = (judge.role for spec in self.engine_judges for judge in spec.judges)
        return tuple(dict.fromkeys(role for role in roles if role is not None))

    @property
    def heads(self) -> dict[str, Head]:
        """The last layer that each role's model must have."""
        scoring = {role: reward.head for reward in self.model_rewards for role in reward.roles}
        return {**scoring, **{role: head for phase in self.phases for role, head in phase.pipeline.heads.items()}}

    @property
    def vocabulary(self) -> int:
        """Entries of a model's vocabulary that stand for tokens: it may be padded beyond them."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def other_tokenizers(self, pipeline: Pipeline) -> dict[str, OtherPrompts]:
        """Of the roles that read completions in their own tokens, ours and theirs."""
        roles = dict.fromkeys(stage.role for stage in pipeline if stage.retokenised)
        trusted, ours = self.config.model.trust_remote_code, self.tokenizer_path
        return {role: OtherPrompts(ours, self.models.get(role) or ours, trusted) for role in roles}

    def asked_of_engines(self, phase: PreparedPhase) -> int:
        """How many likeliest tokens the phase asks engines for in the place of each token of a row."""
        stages = (stage for stage in phase.pipeline if isinstance(self.config.roles.get(stage.role), EngineRole))
        return max((stage.top_k or 0 for stage in stages), default=0)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and completion that a rollout worker may see."""
        longest = [0]
        for phase in self.phases:
            limit = max(phase.sampling.max_tokens, _evaluation_tokens(phase))
            for source in (phase.source if phase.pipeline.generates else None, phase.evaluation):
                if source is not None:
                    longest.append(phase.prompt_tokens(source) + limit)
            if self.asked_of_engines(phase):
                longest.append(max(longest[-1], phase.source.longest.row) + 1)  # an engine always samples a token more
        return max(longest)


def _evaluation_tokens(phase: PreparedPhase) -> int:
    return (phase.config.evaluation.max_tokens or 0) if phase.config.evaluation else 0
