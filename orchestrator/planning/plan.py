"""From configuration and pipelines to a plan: which roles, how many processes, and their resources. Pure.

    config + pipelines ──► roles ──► threads, environment, memory ──► one gang of bundles for the ranks of all roles
                                                                  └─► a bundle of its own for each elastic worker

Which roles there are follows from the pipelines; the configuration only sizes them. A plan needs neither Ray nor torch,
so `troupe plan` is fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.errors import ConfigError
from orchestrator.config.autoscale import AutoscaleConfig
from orchestrator.config.colocation import taking_turns
from orchestrator.config.roles import EngineRole, Fallback, FrozenRole, RanksRole, UserCodeRole
from orchestrator.config.schema import DEFAULT_TOKEN_BUDGET, BemaConfig, PhaseConfig, RunConfig
from orchestrator.config.validation import Role, count, refusals, warnings
from orchestrator.pipeline import Pipeline, Verb, score
from orchestrator.planning.bundles import GIB, Bundle, ClusterView, Resources, shortages
from orchestrator.planning.machine import Machine, slow_types
from orchestrator.planning.memory_estimate import BYTES, Memory, Shape, Training, estimate
from orchestrator.planning.node_selectors import Selector
from rollout.engine import CPU_KV_CACHE_GIB

# Spins of an idle OpenMP thread before it sleeps: they bridge two operations. Five times as many were not faster,
# and slowed a step down by half if another program used the core; this many, by a seventh.
SPINS = 1_000
# Of ranks on GPUs. With segments that grow, micro-batches of many sizes leave no gaps in the memory, and steps with
# several of them take a tenth less time. cuBLAS sums in the same order each time only in a work space of a fixed size.
GPU_RANK = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
HEADROOM_CPUS = 64  # of a Ray of our own, for workers that join later
SMALL_MODEL = 100_000_000  # parameters; below, an engine on the CPU is fastest with one thread


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

    def adapters_alone(self, role: str) -> bool:
        """Whether the engines of a role get adapters, and not whole weights."""
        return role in self.merged_because and self.merged_because[role] is None

    def total(self, resource: str) -> float:
        return sum(bundle.resources.get(resource, 0.0) for bundle in self.bundles)


def make_plan(
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
    that differ from it, `shapes` by role; `merged_because`, `budget_notes` and
    `engine_notes` as in `Prepared`. Raises ConfigError with
    all refusals."""
    known: dict[str, Any] = {"parameters": parameters, "own_parameters": own_parameters, "shapes": shapes}
    known |= {"merged_because": merged_because, "budget_notes": budget_notes, "engine_notes": engine_notes}
    plan = draft_plan(config, pipelines, machine=machine, **known)
    if plan.refusals:
        raise ConfigError("\n".join(plan.refusals))
    return plan


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
    """A plan that may have `refusals`, for display and not for launching."""
    stand_ins = _stand_ins(config, pipelines)
    launched = _launched(config, pipelines, stand_ins)
    merged = {role: why for role, why in (merged_because or {}).items() if role in launched}
    refused = [*refusals(config, pipelines, launched), *_of_adapters(config, merged)]
    sized = [role for role in launched if role in config.roles]
    machine = machine or Machine.here()
    threads = _threads(config, pipelines, sized, parameters, machine)
    gang, seats = _gang(config, sized)

    def parameters_of(role: str) -> int | None:
        settings, own = config.roles[role], own_parameters or {}
        has_own = isinstance(settings, RanksRole) and settings.model is not None
        return own.get(role, None if has_own else parameters)

    memory = {role: _memory(role, config, pipelines, parameters_of, (shapes or {}).get(role)) for role in sized}
    roles = {role: _role_plan(role, config, threads[role], seats.get(role, ()), memory[role]) for role in sized}
    notes = budget_notes or {}
    phases = tuple(_phase_plan(name, config, pipeline, notes.get(name)) for name, pipeline in pipelines.items())
    return Plan(
        run=config.name,
        phases=phases,
        roles=roles,
        gang=gang,
        stand_ins=stand_ins,
        turns=taking_turns(config, sized),
        overlaps=_overlaps(config, sized),
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


def _threads(
    config: RunConfig, pipelines: Mapping[str, Pipeline], roles: list[str], parameters: int | None, machine: Machine
) -> dict[str, int]:
    """Threads of one process of each role: those of the configuration; for a role with GPUs, its CPUs. The others share
    the cores such that processes that work at the same time have no more threads than there are cores: oversubscription
    makes all of them many times slower.

    Engines take one thread each, or for a large model an equal share of the cores. If trainers and engines alternate, a
    trained role has all cores while it works; if not, those that the engines do not use. Frozen roles and trained ones
    take turns (`_overlaps`), so each has all cores while it works."""
    cores = machine.cores
    small = parameters is None or parameters < SMALL_MODEL
    ahead = any(config.phases[name].train.max_staleness for name in pipelines)
    settings_of = {role: config.roles[role] for role in roles}
    ranks = sum(count(settings) for settings in settings_of.values() if isinstance(settings, RanksRole))
    fleets = [settings for settings in settings_of.values() if isinstance(settings, EngineRole)]
    workers = sum(fleet.workers for fleet in fleets)
    share = (
        1 if small else max(1, cores // max(1, workers + (ranks if ahead else 0)))
    )  # of processes that work at the same time
    taken = sum(fleet.workers * (fleet.threads or share) for fleet in fleets)
    left = cores - taken if ahead else cores
    sharing = ranks if ahead else 0

    def of(settings: Role) -> int:
        given = getattr(settings, "threads", None)
        if given is not None:
            return given
        if settings.gpus > 0:
            return max(1, int(settings.cpus))
        if isinstance(settings, RanksRole):
            return max(1, left // (sharing or count(settings)))
        return share if isinstance(settings, EngineRole) else 1

    return {role: of(settings) for role, settings in settings_of.items()}


def _overlaps(config: RunConfig, roles: list[str]) -> bool:
    """Whether frozen roles may work on the next batch while another is trained: if each has a GPU of its own, or its
    `threads` on the CPU are set. Otherwise they share a device. On a CPU each would get half of the cores, and during
    the longer training step the other half would be idle; on a GPU the peaks of their memory would add up."""
    settings = {role: each for role in roles if isinstance(each := config.roles[role], RanksRole)}
    hosts = {each.colocate for each in settings.values()}

    def has_its_own(role: str, each: RanksRole) -> bool:
        if each.gpus == 0:
            return each.threads is not None
        return each.gpus >= 1 and each.colocate is None and role not in hosts

    return all(has_its_own(role, each) for role, each in settings.items())


def _gang(config: RunConfig, roles: list[str]) -> tuple[tuple[Bundle, ...], dict[str, tuple[int, ...]]]:
    """One bundle per rank of each gang role; guests are added to the bundles of their host. Also returns each role's
    bundles."""
    bundles: list[Bundle] = []
    seats: dict[str, tuple[int, ...]] = {}
    guests = [role for role in roles if config.roles[role].colocate]
    for role in roles:
        settings = config.roles[role]
        if isinstance(settings, RanksRole) and role not in guests:
            seats[role] = tuple(range(len(bundles), len(bundles) + count(settings)))
            bundles += [Bundle((role,), _resources(settings), _selectors(settings))] * count(settings)
    for role in guests:
        settings = config.roles[role]
        host = seats.get(str(settings.colocate), ())
        # A pool may replace a dead worker in any bundle of its host; ranks of a gang take the first ones.
        seats[role] = host[: count(settings)] if isinstance(settings, RanksRole) else host
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
    """Choices of nodes in order of preference; empty if any node will do."""
    first: Selector = getattr(settings, "label_selector", {})
    others: tuple[Fallback, ...] = getattr(settings, "fallback_strategy", ())
    return (first, *(other.label_selector for other in others)) if first else ()


def _role_plan(role: str, config: RunConfig, threads: int, bundles: tuple[int, ...], memory: Memory | None) -> RolePlan:
    settings = config.roles[role]
    ahead = any(phase.train.max_staleness for phase in config.phases.values())
    env = _environment(settings, threads, alone=isinstance(settings, RanksRole) and not ahead)
    if isinstance(settings, RanksRole) and settings.gpus > 0:
        env |= GPU_RANK
    resources, selectors = _resources(settings), _selectors(settings)
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


def _environment(settings: Role, threads: int, *, alone: bool) -> dict[str, str]:
    """Environment variables that must be set before torch is imported. PASSIVE: idle OpenMP threads must not spin on
    other roles' cores. If no other role computes at that time (`alone`), idle OpenMP threads spin briefly before they
    sleep, because waking them takes a fifth of a small model's step or more. Ray hides the GPUs of others from an actor
    that has some, but shows all of them to one that has none."""
    waiting = {"GOMP_SPINCOUNT": str(SPINS)} if alone and threads > 1 else {"OMP_WAIT_POLICY": "PASSIVE"}
    env = {"OMP_NUM_THREADS": str(threads), **waiting, "TOKENIZERS_PARALLELISM": "false"}
    if settings.gpus == 0:
        env["CUDA_VISIBLE_DEVICES"] = ""
    if isinstance(settings, RanksRole) and settings.backend == "deepspeed" and settings.gpus == 0:
        env["DS_ACCELERATOR"] = "cpu"
    return env


def _memory(
    role: str,
    config: RunConfig,
    pipelines: Mapping[str, Pipeline],
    parameters_of: Callable[[str], int | None],
    shape: Shape | None,
) -> Memory | None:
    settings = config.roles[role]
    if isinstance(settings, UserCodeRole):
        return Memory()
    parameters = parameters_of(settings.follows if isinstance(settings, EngineRole) else role)
    if parameters is None:
        return None
    if isinstance(settings, EngineRole):
        second = 0 if settings.mixes is None else parameters_of(settings.mixes)
        if second is None:
            return None
        cache = settings.kv_cache_gib or (CPU_KV_CACHE_GIB if settings.gpus == 0 else 0.0)  # on a GPU, what is left
        per_gpu = parameters // settings.tensor_parallel + second
        return estimate(per_gpu, settings.dtype or config.model.dtype, kv_cache_gib=cache)
    tokens = max(phase.train.micro_batch_tokens for phase in config.phases.values())
    dtype = settings.dtype or config.model.dtype
    if not any(role in pipeline.trained for pipeline in pipelines.values()):
        return estimate(parameters, dtype, tokens=tokens, shape=shape)
    lora = config.model.lora.r if config.model.lora else None
    stage = _zero_stage(settings) if settings.backend == "deepspeed" else 0
    averaged = any(
        config.phases[name].train.bema and role == pipeline.trained[0]
        for name, pipeline in pipelines.items()
        if pipeline.trained
    )
    beside = 0.0
    for companion in {pipeline.companions[role] for pipeline in pipelines.values() if role in pipeline.companions}:
        size = parameters_of(companion)
        if size is None:
            return None
        beside = max(beside, size * float(BYTES[config.roles.ranks(companion).dtype or config.model.dtype]))
    training = Training(stage, settings.ranks, lora, config.model.gradient_checkpointing, beside, averaged)
    return estimate(parameters, dtype, tokens=tokens, training=training, shape=shape)


def _zero_stage(settings: RanksRole) -> int:
    """The stage in an inline DeepSpeed configuration, else the role's own key."""
    inline = settings.deepspeed if isinstance(settings.deepspeed, dict) else {}
    stage = inline.get("zero_optimization", {}).get("stage", settings.zero_stage)
    return stage if isinstance(stage, int) else settings.zero_stage


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
