"""A pipeline: the kind of data that a method takes, then its stages, and all that follows from them.

The roles to launch, the columns that flow and the part that may run ahead are derived from the stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from actors.columns import ADMITTED, ROUTES, SPLIT, STEP_REWARDS, Head
from actors.errors import ConfigError
from orchestrator.pipeline.checks import check, why_not_beforehand
from orchestrator.pipeline.data_kinds import Completions, DataKind
from orchestrator.pipeline.stage import DRIVER, GROUPWISE, ROW_SOURCES, Stage, Verb, roles_of, rows_by_share


@dataclass(frozen=True)
class Pipeline:
    """A data kind and its stages, checked when it is built. `warnings`: what the user may not expect of the options.
    `temperature`: at which log-probabilities are taken; None for the one that completions are sampled at. `kept_of`:
    the roles whose stages are left out because the data brings what they would compute."""

    data: DataKind
    stages: tuple[Stage, ...]
    warnings: tuple[str, ...] = field(default=(), compare=False)
    temperature: float | None = None
    kept_of: tuple[str, ...] = field(default=(), compare=False)

    def __init__(
        self,
        data: DataKind,
        *stages: Stage,
        warnings: tuple[str, ...] = (),
        temperature: float | None = None,
        kept_of: tuple[str, ...] = (),
    ) -> None:
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "warnings", warnings)
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "kept_of", kept_of)
        check(data, stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles to launch, in order of appearance; the trained ones first."""
        seen = dict.fromkeys([*self.trained, *(stage.role for stage in self.stages if stage.role != DRIVER)])
        return (*seen, *(role for role in self.environments if role not in seen))

    @property
    def environments(self) -> tuple[str, ...]:
        """The roles of environments that samples talk to."""
        return tuple(dict.fromkeys(stage.episode for stage in self.stages if stage.episode is not None))

    @property
    def trained(self) -> tuple[str, ...]:
        return roles_of(Verb.UPDATE, self.stages)

    @property
    def written_columns(self) -> tuple[str, ...]:
        """Of the data set that the phase makes, those that its `write` stage fills; empty if it makes none."""
        calls = (stage.call for stage in self.stages if stage.verb is Verb.WRITE)
        return tuple(dict.fromkeys(name for call in calls for name in getattr(call, "columns", ())))

    @property
    def draws_again(self) -> bool:
        """Whether another prompt takes the place of one that is dropped. A batch that is learned from must be full; of
        a data set that is only made, each prompt is asked once."""
        return bool(self.trained) or not self.written_columns

    @property
    def mixed(self) -> tuple[str, ...]:
        """Roles that are not trained and whose weights change all the same, by those of a trained one."""
        return roles_of(Verb.MIX, self.stages)

    @property
    def collect(self) -> tuple[Stage, ...]:
        """The longest prefix of stages that touches no role whose weights change: it may run ahead of learning."""
        changing = {*self.trained, *self.mixed}
        count = 0
        for stage in self.stages:
            if stage.role in changing or stage.verb in (Verb.CREDIT, Verb.REPLAY, Verb.WRITE):
                break
            count += 1
        return self.stages[:count]

    @property
    def learn(self) -> tuple[Stage, ...]:
        return self.stages[len(self.collect) :]

    @property
    def group_stages(self) -> tuple[Stage, ...]:
        """The stages of `collect` that run for each prompt group separately."""
        return tuple(stage for stage in self.collect if stage.verb in GROUPWISE)

    @property
    def batch_stages(self) -> tuple[Stage, ...]:
        """Of `collect`: what runs on whole batches, so that its arithmetic does not depend on arrival order."""
        return tuple(stage for stage in self.collect if stage.verb not in GROUPWISE and not stage.precomputed)

    @property
    def precomputed(self) -> tuple[Stage, ...]:
        """What runs once, before the first step (`orchestrator/collection/precompute.py`), and in no step."""
        return tuple(stage for stage in self.stages if stage.precomputed)

    def with_stages(
        self, *stages: Stage, data: DataKind | None = None, kept_of: tuple[str, ...] | None = None
    ) -> Pipeline:
        """The pipeline with these stages instead of its own, on its data or on other."""
        kept = self.kept_of if kept_of is None else kept_of
        return Pipeline(data or self.data, *stages, warnings=self.warnings, temperature=self.temperature, kept_of=kept)

    def with_passes_beforehand(self) -> Pipeline:
        """The pipeline whose stages run once, before the first step, where the method leaves that open and what they
        compute holds for the whole phase: for a phase that passes over its data more than once."""

        def beforehand(stage: Stage) -> Stage:
            is_open = "precomputed" in stage.options and stage.options["precomputed"] is None
            if not is_open or why_not_beforehand(self.data, self.stages, stage) is not None:
                return stage
            return replace(stage, options={**stage.options, "precomputed": True})

        stages = map(beforehand, self.stages)
        return self.with_stages(*stages)

    def without_stage(self, stage: Stage) -> Pipeline:
        """The pipeline for data that brings what this stage writes."""
        data = replace(self.data, columns=self.data.columns | stage.writes)
        others = (other for other in self.stages if other is not stage)
        return self.with_stages(*others, data=data, kept_of=(*self.kept_of, stage.role))

    def with_episodes(self, role: str, *, split: bool = False) -> Pipeline:
        """The pipeline whose samples are episodes with the environments of a role. What an environment gives for a turn
        reaches the credit calls that take it. `split`: each turn is a row of its own."""
        also = {"turn_reward"} | (SPLIT if split else frozenset())

        def of_episodes(stage: Stage) -> Stage:
            if stage.verb is Verb.GENERATE:
                options = {**stage.options, "episode": role}
                return replace(stage, options=options, writes=stage.writes | also)
            return replace(stage, reads=stage.reads | (_takes(stage) & also))

        if not any(stage.verb is Verb.GENERATE for stage in self.stages):
            return self
        stages = map(of_episodes, self.stages)
        return self.with_stages(*stages)

    @property
    def needs_turns(self) -> bool:
        """Whether its samples must be episodes each turn of which is a row of its own."""
        return any("episode" in stage.reads - _takes(stage) for stage in self.stages)

    def with_step_rewards(self) -> Pipeline:
        """The pipeline whose answers are rewarded step by step: that reaches the credit calls that take it."""

        def of_steps(stage: Stage) -> Stage:
            if stage.verb is Verb.SCORE:
                return replace(stage, writes=stage.writes | STEP_REWARDS)
            return replace(stage, reads=stage.reads | (_takes(stage) & STEP_REWARDS))

        if not self.takes_step_rewards:
            return self
        return self.with_stages(*map(of_steps, self.stages))

    @property
    def takes_step_rewards(self) -> bool:
        """Whether what single steps of an answer are rewarded with makes a difference to what is learned."""
        return any("process_reward" in stage.reads | _takes(stage) for stage in self.stages)

    @property
    def needs_step_rewards(self) -> bool:
        return any("process_reward" in stage.reads - _takes(stage) for stage in self.stages)

    def with_routes(self) -> Pipeline:
        """The pipeline whose samples say which experts their tokens were sent to, and whose trained roles send them to
        the same."""
        only = frozenset({ROUTES})

        def routed(stage: Stage) -> Stage:
            if stage.verb is Verb.GENERATE:
                return replace(stage, writes=stage.writes | only)
            asks = stage.head is Head.VOCABULARY and stage.role in self.trained
            return replace(stage, reads=stage.reads | only) if asks else stage

        stages = map(routed, self.stages)
        return self.with_stages(*stages)

    def with_admitted_tokens(self) -> Pipeline:
        """The pipeline whose samples say which tokens each of theirs could have been, and whose models restrict their
        distributions to these."""
        only = frozenset({ADMITTED})

        def restricted(stage: Stage) -> Stage:
            if stage.verb is Verb.GENERATE:
                return replace(stage, writes=stage.writes | only)
            return replace(stage, reads=stage.reads | only) if stage.head is Head.VOCABULARY else stage

        stages = map(restricted, self.stages)
        return self.with_stages(*stages)

    def with_roles(self, names: Mapping[str, str]) -> Pipeline:
        """The pipeline with other roles in the places of those that are named. Raises ConfigError for one that no stage
        names."""
        if unknown := names.keys() - {*self.roles, *self.companions.values()}:
            known = ", ".join(dict.fromkeys((*self.roles, *self.companions.values())))
            raise ConfigError(f"rename_roles: the method has no role {sorted(unknown)[0]!r}; it has {known}")

        def renamed(stage: Stage) -> Stage:
            options = {
                key: names.get(value, value) if key in ("source", "companion", "episode") else value
                for key, value in stage.options.items()
            }
            return replace(stage, role=names.get(stage.role, stage.role), options=options)

        stages = map(renamed, self.stages)
        return self.with_stages(*stages)

    @property
    def generates(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.verb is Verb.GENERATE)

    @property
    def row_sources(self) -> tuple[Stage, ...]:
        """The stages that bring rows into a prompt group."""
        return tuple(stage for stage in self.stages if stage.verb in ROW_SOURCES)

    @property
    def samples_per_prompt(self) -> int:
        """Completions that are drawn for a prompt, at most, by all `generate` stages together; 0 if there are none."""
        return max(rows_by_share(self.generates))

    @property
    def rows_per_item(self) -> int:
        """Rows that reach the updates from each item of the data, at most."""
        rows = max(rows_by_share(self.row_sources)) or self.data.rows_per_item
        for stage in self.stages:
            rows = int(stage.options["rows"] or rows) if stage.verb is Verb.REGROUP else rows
        return rows

    @property
    def heads(self) -> Mapping[str, Head]:
        """What each role's model must have as its last layer; roles without a model are left out."""
        return {stage.role: stage.head for stage in self.stages if stage.head is not None}

    @property
    def companions(self) -> Mapping[str, str]:
        """Of trained roles, the one whose frozen model lives in their ranks. It is no role to launch by itself."""
        named = ((stage.role, stage.options["companion"]) for stage in self.updates)
        return {role: companion for role, companion in named if companion is not None}

    @property
    def teachers(self) -> tuple[str, ...]:
        """Roles whose distributions over the vocabulary a loss compares with those of a trained role, whole, by their
        most likely tokens, or by the tokens of the rows."""
        asked = (stage.role for stage in self.stages if stage.top_k is not None or "teacher_logps" in stage.writes)
        return tuple(dict.fromkeys([*self.companions.values(), *asked]))

    @property
    def other_teachers(self) -> tuple[str, ...]:
        """Of the teachers, those that know no more than the student: another model must be in them."""
        own = {stage.role for stage in self.stages if stage.other_prompts and not stage.retokenised}
        return tuple(role for role in self.teachers if role not in own)

    @property
    def held_out(self) -> DataKind | None:
        """The kind of rows whose loss can be taken without sampling: those that the phase learns from; or completions,
        where no stage needs more of samples than a data set has. None if there is no such kind."""
        if not self.updates:
            return None
        if not self.row_sources:
            return self.data
        others = (stage for stage in self.stages if stage.verb not in GROUPWISE)
        try:
            return Pipeline(Completions.with_teachers(self.data.teachers), *others).data
        except ConfigError:
            return None

    @property
    def updates(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.verb is Verb.UPDATE)

    @property
    def optimizer_steps_per_batch(self) -> int:
        """Of the role that makes the most."""
        return max((self.optimizer_steps_of(role) for role in self.trained), default=1)

    def optimizer_steps_of(self, role: str) -> int:
        """Optimizer steps of a role on each batch."""
        mine = (stage for stage in self.updates if stage.role == role)
        return sum(int(stage.options["epochs"] * stage.options["minibatches"]) for stage in mine)

    @property
    def mixes(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.verb is Verb.MIX)


def _takes(stage: Stage) -> frozenset[str]:
    """Columns that a credit call reads where a run has them (`advantages.credits`)."""
    return getattr(stage.call, "takes", frozenset[str]())
