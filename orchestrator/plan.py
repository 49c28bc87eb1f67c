"""From configuration and pipelines to what is launched: which roles, how many processes, with what each. Pure.

    config + pipelines ──► roles ──► threads, environment, memory ──► one gang of bundles for the ranks of all roles
                                                                  └─► a bundle of its own for each elastic worker

The roles follow from the pipelines, never from the configuration: it only sizes them. Neither Ray nor torch is needed
to make a plan, so that `troupe plan` answers at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from actors.errors import ConfigError
from orchestrator.bundles import GIB, Bundle, ClusterView, Resources, shortages
from orchestrator.config import (
    BemaConfig,
    Fallback,
    FrozenRole,
    PhaseConfig,
    RolesConfig,
    RolloutRole,
    RunConfig,
    TrainedRole,
)
from orchestrator.labels import Selector
from orchestrator.memory import Memory, Training, estimate
from orchestrator.pipeline import Pipeline
from orchestrator.refusals import ELASTIC, Role, count, refusals, warnings

# Of an idle OpenMP thread before it sleeps: enough from one operation to the next. Five times as many gained no more,
# and made a step half as long again where another program wanted the core; these, a seventh.
SPINS = 1_000
SMALL_MODEL = 100_000_000  # parameters below which an engine on the CPU is quickest with one thread


@dataclass(frozen=True)
class Machine:
    """The machine whose cores the processes share where there are no GPUs."""

    cores: int

    @classmethod
    def here(cls) -> Machine:
        return cls(len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class RolePlan:
    """A role's processes: ranks of a gang, or workers of an elastic pool at its start. All alike."""

    name: str
    count: int
    resources: Resources  # of one process, in Ray's names
    threads: int
    env: Mapping[str, str]  # set before the process imports anything
    memory: Memory | None  # an estimate of one process; None if the model's size is not known
    host: str | None  # the role whose bundles it shares
    bundles: tuple[int, ...]  # in the gang, one per rank; of an elastic role only if it shares them
    selectors: tuple[Selector, ...] = ()  # of nodes, in the order of preference

    @property
    def elastic(self) -> bool:
        return self.name in ELASTIC

    @property
    def own_bundle(self) -> Bundle:
        """What an elastic worker reserves for itself."""
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
    longest_row: int | None  # tokens; None where the configuration sets no limit
    micro_batches: int | None
    groups_in_flight: int  # prompt groups that may be collected ahead of what was trained
    bema: BemaConfig | None = None  # how the policy's weights are averaged

    @property
    def rows_per_step(self) -> int:
        return self.items_per_step * self.rows_per_item


@dataclass(frozen=True)
class Plan:
    """What a run launches. `gang` is reserved at once, or not at all."""

    run: str
    phases: tuple[PhasePlan, ...]
    roles: Mapping[str, RolePlan]
    gang: tuple[Bundle, ...]
    implicit_reference: bool  # the policy without its adapters is the reference: no role is launched for it
    overlaps: bool  # frozen roles work on the next batch while another role is trained
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
    def passing(self) -> tuple[str, ...]:
        """Roles that do nothing in any step: all of their stages run before the first one of a phase."""
        stages = [stage for phase in self.phases for stage in phase.pipeline]
        lasting = {stage.role for stage in stages if not stage.precomputed}
        return tuple(role for role in self.roles if role in {stage.role for stage in stages} - lasting)

    def total(self, resource: str) -> float:
        return sum(bundle.resources.get(resource, 0.0) for bundle in self.bundles)


def make_plan(
    config: RunConfig,
    pipelines: Mapping[str, Pipeline],
    *,
    parameters: int | None = None,
    machine: Machine | None = None,
) -> Plan:
    """The plan of a run, `pipelines` by phase. Raises ConfigError with everything that would be refused."""
    plan = draft_plan(config, pipelines, parameters=parameters, machine=machine)
    if plan.refusals:
        raise ConfigError("\n".join(plan.refusals))
    return plan


def draft_plan(
    config: RunConfig,
    pipelines: Mapping[str, Pipeline],
    *,
    parameters: int | None = None,
    machine: Machine | None = None,
) -> Plan:
    """A plan that may have `refusals`: something to look at, not to launch."""
    implicit = _has_implicit_reference(config)
    launched = _launched(config, pipelines, implicit)
    refused = refusals(config, pipelines, launched)
    sized = [role for role in launched if role in RolesConfig.model_fields]
    threads = _threads(config, pipelines, sized, parameters, machine or Machine.here())
    gang, seats = _gang(config, sized)
    roles = {
        role: _role_plan(role, config, threads[role], seats.get(role, ()), _memory(role, config, parameters))
        for role in sized
    }
    phases = tuple(_phase_plan(name, config, pipeline) for name, pipeline in pipelines.items())
    found = tuple(refused), tuple(warnings(config, pipelines, launched))
    return Plan(config.name, phases, roles, gang, implicit, _overlaps(config, sized), *found)


def problems(plan: Plan, cluster: ClusterView) -> list[str]:
    """Everything that stands in the way of launching a plan on a cluster, one line each."""
    return [*plan.refusals, *shortages(plan.bundles, cluster)]


def _has_implicit_reference(config: RunConfig) -> bool:
    return config.model.lora is not None and config.roles.reference.model is None


def _launched(config: RunConfig, pipelines: Mapping[str, Pipeline], implicit_reference: bool) -> list[str]:
    """Roles of all phases, gangs first; held-out prompts need somebody who samples and somebody who scores."""
    named = dict.fromkeys(role for pipeline in pipelines.values() for role in pipeline.roles)
    if any(phase.evaluation and phase.evaluation.data for phase in config.phases.values()):
        named |= dict.fromkeys(ELASTIC)
    if implicit_reference:
        named.pop("reference", None)
    return sorted(named, key=lambda role: role in ELASTIC)


def _threads(
    config: RunConfig, pipelines: Mapping[str, Pipeline], roles: list[str], parameters: int | None, machine: Machine
) -> dict[str, int]:
    """Threads of one process of each role. What the configuration says holds; a role with GPUs has its CPUs. The rest
    share the cores so that those who work at the same time have no more threads than there are cores: oversubscribed,
    all are many times slower.

    Engines take one thread each, or for a large model an equal share of the cores. If trainers and engines alternate, a
    trained role has all cores while it works; if not, what the engines leave. Frozen roles work by turns with a trained
    one (`_overlaps`), so each has all cores while it does."""
    cores = machine.cores
    rollout = config.roles.rollout
    small = parameters is None or parameters < SMALL_MODEL
    ahead = any(config.phases[name].train.max_staleness for name in pipelines)
    ranks = sum(count(getattr(config.roles, role)) for role in roles if role not in ELASTIC)
    engines = rollout.workers + (ranks if ahead else 0)  # and who works at the same time
    engine = rollout.threads or (1 if small else max(1, cores // engines))
    left = cores - engine * rollout.workers if ahead and "rollout" in roles else cores
    sharing = ranks if ahead else 0

    def of(role: str) -> int:
        settings: Role = getattr(config.roles, role)
        given = getattr(settings, "threads", None)
        if given is not None:
            return given
        if settings.gpus > 0:
            return max(1, int(settings.cpus))
        if role in ELASTIC:
            return engine if role == "rollout" else 1
        return max(1, left // (sharing or count(settings)))

    return {role: of(role) for role in roles}


def _overlaps(config: RunConfig, roles: list[str]) -> bool:
    """Whether frozen roles may work on the next batch while another is trained: if all have a device, or threads that
    somebody gave them, of their own. On the same cores two would have half of them each, and the one that is trained,
    which has three times the work, would wait for nobody with the other half idle."""
    settings = [getattr(config.roles, role) for role in roles if role not in ELASTIC]
    return all(each.gpus > 0 or each.threads is not None for each in settings)


def _gang(config: RunConfig, roles: list[str]) -> tuple[tuple[Bundle, ...], dict[str, tuple[int, ...]]]:
    """One bundle per rank of each gang role; guests are added to the bundles of their host. Where each role sits."""
    bundles: list[Bundle] = []
    seats: dict[str, tuple[int, ...]] = {}
    guests = [role for role in roles if getattr(config.roles, role).colocate]
    for role in roles:
        if role not in ELASTIC and role not in guests:
            settings: Role = getattr(config.roles, role)
            seats[role] = tuple(range(len(bundles), len(bundles) + count(settings)))
            bundles += [Bundle((role,), _resources(settings), _selectors(settings))] * count(settings)
    for role in guests:
        settings = getattr(config.roles, role)
        host = seats.get(str(settings.colocate), ())
        # A pool may replace a dead worker in any bundle of its host; ranks of a gang take the first ones.
        seats[role] = host if role in ELASTIC else host[: count(settings)]
        for index in seats[role]:
            bundles[index] = bundles[index].shared_with(role, _resources(settings))
    return tuple(bundles), seats


def _resources(settings: Role) -> dict[str, float]:
    asked = {"CPU": settings.cpus, "GPU": settings.gpus}
    memory_gib: float | None = getattr(settings, "memory_gib", None)
    if memory_gib is not None:
        asked["memory"] = memory_gib * GIB
    custom: dict[str, float] = getattr(settings, "resources", {})
    return {name: float(value) for name, value in {**asked, **custom}.items() if value}


def _selectors(settings: Role) -> tuple[Selector, ...]:
    """Choices of nodes, the first one preferred; none if every node will do."""
    first: Selector = getattr(settings, "label_selector", {})
    others: tuple[Fallback, ...] = getattr(settings, "fallback_strategy", ())
    return (first, *(other.label_selector for other in others)) if first else ()


def _role_plan(role: str, config: RunConfig, threads: int, bundles: tuple[int, ...], memory: Memory | None) -> RolePlan:
    settings: Role = getattr(config.roles, role)
    ahead = any(phase.train.max_staleness for phase in config.phases.values())
    env = _environment(settings, threads, alone=isinstance(settings, TrainedRole) and not ahead)
    resources, selectors = _resources(settings), _selectors(settings)
    return RolePlan(role, count(settings), resources, threads, env, memory, settings.colocate, bundles, selectors)


def _environment(settings: Role, threads: int, *, alone: bool) -> dict[str, str]:
    """What must be set before torch is imported. PASSIVE: idle OpenMP threads must not spin on the others' cores; where
    nobody else computes meanwhile (`alone`), they wait for the next operation for some microseconds, since to wake them
    up costs a small model's step a fifth of its time and more. Ray hides the GPUs of others from an actor that has
    some, but shows all of them to one that has none."""
    waiting = {"GOMP_SPINCOUNT": str(SPINS)} if alone and threads > 1 else {"OMP_WAIT_POLICY": "PASSIVE"}
    env = {"OMP_NUM_THREADS": str(threads), **waiting, "TOKENIZERS_PARALLELISM": "false"}
    if settings.gpus == 0:
        env["CUDA_VISIBLE_DEVICES"] = ""
    if isinstance(settings, TrainedRole) and settings.backend == "deepspeed" and settings.gpus == 0:
        env["DS_ACCELERATOR"] = "cpu"
    return env


def _memory(role: str, config: RunConfig, parameters: int | None) -> Memory | None:
    settings: Role = getattr(config.roles, role)
    if not isinstance(settings, TrainedRole | RolloutRole):
        return Memory()
    if parameters is None or (isinstance(settings, FrozenRole) and settings.model is not None):
        return None
    if isinstance(settings, RolloutRole):
        per_gpu = parameters // settings.tensor_parallel
        return estimate(per_gpu, settings.dtype or config.model.dtype, kv_cache_gib=settings.kv_cache_gib)
    tokens = max(phase.train.token_budget for phase in config.phases.values())
    if isinstance(settings, FrozenRole):
        return estimate(parameters, settings.dtype or config.model.dtype, tokens=tokens)
    lora = config.model.lora.r if config.model.lora else None
    stage = _zero_stage(settings) if settings.backend == "deepspeed" else 0
    averaged = role == "policy" and any(phase.train.bema for phase in config.phases.values())
    training = Training(stage, settings.ranks, lora, config.model.gradient_checkpointing, averaged)
    return estimate(parameters, config.model.dtype, tokens=tokens, training=training)


def _zero_stage(settings: TrainedRole) -> int:
    """The stage in an inline DeepSpeed configuration, else the role's own key."""
    inline = settings.deepspeed if isinstance(settings.deepspeed, dict) else {}
    stage = inline.get("zero_optimization", {}).get("stage", settings.zero_stage)
    return stage if isinstance(stage, int) else settings.zero_stage


def _phase_plan(name: str, config: RunConfig, pipeline: Pipeline) -> PhasePlan:
    phase = config.phases[name]
    generates = pipeline.generates
    rows = int(generates.options["n"]) if generates else pipeline.data.rows_per_item
    minibatches = max((int(update.options["minibatches"]) for update in pipeline.updates), default=1)
    longest = _longest_row(phase, sampled=generates is not None)
    return PhasePlan(
        name=name,
        method=phase.method,
        pipeline=pipeline,
        items_per_step=phase.train.batch_size,
        rows_per_item=rows,
        optimizer_steps_per_batch=pipeline.optimizer_steps_per_batch,
        longest_row=longest,
        micro_batches=_micro_batches(config, phase, pipeline, rows, minibatches, longest),
        groups_in_flight=(phase.train.max_staleness + 1) * phase.train.batch_size if generates else 0,
        bema=phase.train.bema,
    )


def _longest_row(phase: PhaseConfig, *, sampled: bool) -> int | None:
    data = phase.data
    if not sampled:
        return data.max_length
    return None if data.max_prompt_length is None else data.max_prompt_length + phase.sampling.max_tokens


def _micro_batches(
    config: RunConfig, phase: PhaseConfig, pipeline: Pipeline, rows: int, minibatches: int, longest: int | None
) -> int | None:
    """At most, per rank and optimizer step: if every row were as long as is allowed."""
    if longest is None or not pipeline.trained:
        return None
    ranks = count(getattr(config.roles, pipeline.trained[0], config.roles.policy))
    rows_per_rank = math.ceil(phase.train.batch_size * rows / minibatches / ranks)
    return math.ceil(rows_per_rank / max(1, phase.train.token_budget // longest))
