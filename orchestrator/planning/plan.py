"""From configuration and pipelines to a plan: which roles, how many processes, and their resources. Pure.

    config + pipelines ──► roles ──► their processes (`role_processes`) ──► a gang of bundles for the ranks of all roles
                                                                        └─► a bundle of its own for each elastic worker

Which roles there are follows from the pipelines; the configuration only sizes them. A plan needs neither Ray nor torch,
so `troupe plan` is fast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from actors.errors import ConfigError
from orchestrator.config.autoscale import AutoscaleConfig
from orchestrator.config.colocation import taking_turns
from orchestrator.config.roles import EngineRole, FrozenRole, RanksRole, count
from orchestrator.config.schema import DEFAULT_TOKEN_BUDGET, BemaConfig, PhaseConfig, RunConfig
from orchestrator.config.validation import refusals, warnings
from orchestrator.pipeline import Pipeline, Verb, score
from orchestrator.planning.bundles import Bundle, ClusterView, Resources, shortages
from orchestrator.planning.machine import Machine, slow_types
from orchestrator.planning.memory_estimate import Memory, Shape
from orchestrator.planning.node_selectors import Selector
from orchestrator.planning.role_processes import (
    environment_of,
    frozen_roles_overlap,
    memory_of,
    resources_of,
    selectors_of,
    threads_by_role,
)

HEADROOM_CPUS = 64  # of a Ray of our own, for workers that join later


@dataclass(frozen=True)
class RolePlan:
    """A role's processes, which are all equal: ranks of a gang, or the first workers of an elastic pool."""

    name: str
    count: int
    resources: Resources  # of one process, in Ray's names
    threads: int
    env: Mapping[str, str]  # set before the process imports anything
    memory: Memory | None  # an estimate of one process; None if the model's size is not known
    host: str | None  # the role whose bundles it shares
    bundles: tuple[int, ...]  # in the gang, one per rank; of an elastic role only if it shares them
    pool: bool = False  # elastic workers, not ranks of a gang
    selectors: tuple[Selector, ...] = ()  # of nodes, in the order of preference
    autoscale: AutoscaleConfig | None = None  # bounds within which a pool follows its load

    @property
    def elastic(self) -> bool:
        return self.pool

    @property
    def own_bundle(self) -> Bundle:
        """The bundle of an elastic worker."""
        return Bundle((self.name,), self.resources, self.selectors)


@dataclass(frozen=True)
class PhasePlan:
    """The batch arithmetic of a phase. Micro-batches are per rank of the trained role, at most."""

    name: str
    method: str
    pipeline: Pipeline
    items_per_step: int
    rows_per_item: int
    optimizer_steps_per_batch: int
    longest_row: int | None  # tokens; None if the configuration sets no limit
    micro_batches: int | None
    groups_in_flight: int  # prompt groups that may be collected ahead of training
    bema: BemaConfig | None = None  # how the policy's weights are averaged
    micro_batch_tokens: int = DEFAULT_TOKEN_BUDGET
    budget_note: str | None = None  # why so many, if the configuration does not say

    @property
    def rows_per_step(self) -> int:
        return self.items_per_step * self.rows_per_item


@dataclass(frozen=True)
class Plan:
    """What a run launches. The bundles of `gang` are reserved together or not at all."""

    run: str
    phases: tuple[PhasePlan, ...]
    roles: Mapping[str, RolePlan]
    gang: tuple[Bundle, ...]
    stand_ins: Mapping[str, str]  # a role that is not launched -> the one that, without its adapters, has its weights
    turns: tuple[tuple[str, ...], ...]  # sets of roles that share devices, one of which is awake at a time
    overlaps: bool  # frozen roles work on the next batch while another role is trained
    # Of engine roles that follow a role with adapters: why they get merged weights; None: they get the adapters alone.
    merged_because: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    # Of engine roles whose engine was chosen: which, and why.
    engine_notes: Mapping[str, str] = field(default_factory=dict[str, str])
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def elastic(self) -> tuple[RolePlan, ...]:
        return tuple(role for role in self.roles.values() if role.elastic)

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """Everything that is reserved at the start: the gang, and a bundle for each elastic worker of its own."""
        alone = [role.own_bundle for role in self.elastic if role.host is None for _ in range(role.count)]
        return (*self.gang, *alone)

    @property
    def precompute_only(self) -> tuple[str, ...]:
        """Roles that no step uses: all of their stages run before the first step of a phase."""
        stages = [stage for phase in self.phases for stage in phase.pipeline]
        lasting = {stage.role for stage in stages if not stage.precomputed}
        return tuple(role for role in self.roles if role in {stage.role for stage in stages} - lasting)

    def accepted(self) -> Plan:
        """This plan, to be launched. Raises ConfigError with all of its refusals."""
        if self.refusals:
            raise ConfigError("\n".join(self.refusals))
        return self

    def adapters_alone(self, role: str) -> bool:
        """Whether the engines of a role get adapters, and not whole weights."""
        return role in self.merged_because and self.merged_because[role] is None

    def total(self, resource: str) -> float:
        return sum(bundle.resources.get(resource, 0.0) for bundle in self.bundles)


def draft_plan(
    config: RunConfig,
    pipelines: Mapping[str, Pipeline],
    *,
    parameters: int | None = None,
    own_parameters: Mapping[str, int | None] | None = None,
    shapes: Mapping[str, Shape] | None = None,
    merged_because: Mapping[str, str | None] | None = None,
    budget_notes: Mapping[str, str] | None = None,
    engine_notes: Mapping[str, str] | None = None,
    machine: Machine | None = None,
) -> Plan:
    """The plan of a run, `pipelines` by phase. `parameters` of the run's model, `own_parameters` of the models of roles
    that differ from it, `shapes` by role; `merged_because`, `budget_notes` and `engine_notes` as in `Prepared`. It may
    have `refusals`: `accepted` raises them."""
    stand_ins = _stand_ins(config, pipelines)
    launched = _launched(config, pipelines, stand_ins)
    merged = {role: why for role, why in (merged_because or {}).items() if role in launched}
    refused = [*refusals(config, pipelines, launched), *_of_adapters(config, merged)]
    sized = [role for role in launched if role in config.roles]
    machine = machine or Machine.here()
    threads = threads_by_role(config, pipelines, sized, parameters, machine)
    gang, bundles_of = _gang(config, sized)

    def parameters_of(role: str) -> int | None:
        settings, own = config.roles[role], own_parameters or {}
        has_own = isinstance(settings, RanksRole) and settings.model is not None
        return own.get(role, None if has_own else parameters)

    memory = {role: memory_of(role, config, pipelines, parameters_of, (shapes or {}).get(role)) for role in sized}
    roles = {role: _role_plan(role, config, threads[role], bundles_of.get(role, ()), memory[role]) for role in sized}
    notes = budget_notes or {}
    phases = tuple(_phase_plan(name, config, pipeline, notes.get(name)) for name, pipeline in pipelines.items())
    return Plan(
        run=config.name,
        phases=phases,
        roles=roles,
        gang=gang,
        stand_ins=stand_ins,
        turns=taking_turns(config, sized),
        overlaps=frozen_roles_overlap(config, sized),
        merged_because=merged,
        engine_notes={role: why for role, why in (engine_notes or {}).items() if role in launched},
        refusals=tuple(refused),
        warnings=(*warnings(config, pipelines, launched), *slow_types(config, sized, machine)),
    )


def _of_adapters(config: RunConfig, merged_because: Mapping[str, str | None]) -> list[str]:
    """Refusals of engines that cannot have adapters alone, if that is asked for."""
    if config.weights.lora != "adapter":
        return []
    return [
        f"weights.lora=adapter: {role} cannot get the adapters alone: {why}; set weights.lora=merged, or leave it out"
        for role, why in merged_because.items()
        if why is not None
    ]


def problems(plan: Plan, cluster: ClusterView) -> list[str]:
    """Every reason why a plan cannot be launched on a cluster, one line each."""
    return [*plan.refusals, *shortages(plan.bundles, cluster)]


def _stand_ins(config: RunConfig, pipelines: Mapping[str, Pipeline]) -> dict[str, str]:
    """With adapters, a frozen copy of a trained role is that role without its adapters."""
    if config.model.lora is None:
        return {}
    named = {role for pipeline in pipelines.values() for role in pipeline.roles if role in config.roles}
    frozen = {role: settings for role in named if isinstance(settings := config.roles[role], FrozenRole)}
    return {role: settings.copies for role, settings in frozen.items() if settings.model is None}


def _launched(config: RunConfig, pipelines: Mapping[str, Pipeline], stand_ins: Mapping[str, str]) -> list[str]:
    """Roles of all phases and of the rewards, gangs first; held-out prompts need an engine and scorers, and an engine
    needs the role that it follows."""
    named = dict.fromkeys(role for pipeline in pipelines.values() for role in pipeline.roles)
    for name, pipeline in pipelines.items():
        evaluation = config.phases[name].evaluation
        if evaluation is not None and evaluation.data is not None:
            engine = config.roles.engine_of(pipeline.trained, pipeline.roles)
            hosts = config.phases[name].environments
            named |= dict.fromkeys(role for role in (engine, score().role, hosts) if role is not None)
    if any(stage.verb is Verb.SCORE for pipeline in pipelines.values() for stage in pipeline) or score().role in named:
        named |= dict.fromkeys(role for reward in config.rewards for role in reward.roles)
    for role in list(named):
        settings = config.roles.get(role)
        if isinstance(settings, EngineRole):
            for source in filter(None, (settings.follows, settings.mixes)):
                named.setdefault(source)
        elif isinstance(settings, FrozenRole) and settings.model is None:
            named.setdefault(settings.copies)
    return sorted((role for role in named if role not in stand_ins), key=lambda role: _is_pool(config, role))


def _is_pool(config: RunConfig, role: str) -> bool:
    """Whether a role is an elastic pool; the others are gangs of ranks."""
    return role in config.roles and not isinstance(config.roles[role], RanksRole)


def _gang(config: RunConfig, roles: list[str]) -> tuple[tuple[Bundle, ...], dict[str, tuple[int, ...]]]:
    """One bundle per rank of each gang role; guests are added to the bundles of their host. Also returns each role's
    bundles."""
    bundles: list[Bundle] = []
    bundles_of: dict[str, tuple[int, ...]] = {}
    guests = [role for role in roles if config.roles[role].colocate]
    for role in roles:
        settings = config.roles[role]
        if isinstance(settings, RanksRole) and role not in guests:
            bundles_of[role] = tuple(range(len(bundles), len(bundles) + count(settings)))
            bundles += [Bundle((role,), resources_of(settings), selectors_of(settings))] * count(settings)
    for role in guests:
        settings = config.roles[role]
        host = bundles_of.get(str(settings.colocate), ())
        # A pool may replace a dead worker in any bundle of its host; ranks of a gang take the first ones.
        bundles_of[role] = host[: count(settings)] if isinstance(settings, RanksRole) else host
        for index in bundles_of[role]:
            bundles[index] = bundles[index].shared_with(role, resources_of(settings))
    return tuple(bundles), bundles_of


def _role_plan(role: str, config: RunConfig, threads: int, bundles: tuple[int, ...], memory: Memory | None) -> RolePlan:
    settings = config.roles[role]
    ahead = any(phase.train.max_staleness for phase in config.phases.values())
    env = environment_of(settings, threads, alone=isinstance(settings, RanksRole) and not ahead)
    resources, selectors = resources_of(settings), selectors_of(settings)
    pool = not isinstance(settings, RanksRole)
    return RolePlan(
        role,
        count(settings),
        resources,
        threads,
        env,
        memory,
        settings.colocate,
        bundles,
        pool,
        selectors,
        None if isinstance(settings, RanksRole) else settings.autoscale,
    )


def _phase_plan(name: str, config: RunConfig, pipeline: Pipeline, budget_note: str | None) -> PhasePlan:
    phase = config.phases[name]
    rows = pipeline.rows_per_item
    minibatches = max((int(update.options["minibatches"]) for update in pipeline.updates), default=1)
    longest = _longest_row(phase, sampled=bool(pipeline.generates))
    return PhasePlan(
        name=name,
        method=phase.method,
        pipeline=pipeline,
        items_per_step=phase.train.batch_size,
        rows_per_item=rows,
        optimizer_steps_per_batch=pipeline.optimizer_steps_per_batch,
        longest_row=longest,
        micro_batches=_micro_batches(config, phase, pipeline, rows, minibatches, longest),
        groups_in_flight=(phase.train.max_staleness + 1) * phase.train.batch_size if pipeline.generates else 0,
        bema=phase.train.bema,
        micro_batch_tokens=phase.train.micro_batch_tokens,
        budget_note=budget_note,
    )


def _longest_row(phase: PhaseConfig, *, sampled: bool) -> int | None:
    data = phase.data
    if not sampled:
        return data.max_length
    return None if data.max_prompt_length is None else data.max_prompt_length + phase.sampling.max_tokens


def _micro_batches(
    config: RunConfig, phase: PhaseConfig, pipeline: Pipeline, rows: int, minibatches: int, longest: int | None
) -> int | None:
    """The maximum per rank and optimizer step, if all rows had the maximum length."""
    if longest is None or not pipeline.trained:
        return None
    ranks = count(config.roles[pipeline.trained[0]]) if pipeline.trained[0] in config.roles else 1
    rows_per_rank = math.ceil(phase.train.batch_size * rows / minibatches / ranks)
    return math.ceil(rows_per_rank / max(1, phase.train.micro_batch_tokens // longest))
