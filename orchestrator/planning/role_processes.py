"""What one process of a role gets: threads, environment, resources, nodes, and an estimate of its memory. Pure.

On a CPU this decides how fast a run is: processes that work at the same time must not have more threads than there are
cores, and which processes do follows from the pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from orchestrator.config.roles import EngineRole, Fallback, RanksRole, Role, UserCodeRole, count
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline import Pipeline
from orchestrator.planning.bundles import GIB
from orchestrator.planning.machine import Machine
from orchestrator.planning.memory_estimate import BYTES, Memory, Shape, Training, estimate
from orchestrator.planning.node_selectors import Selector
from rollout.engine import CPU_KV_CACHE_GIB

# Spins of an idle OpenMP thread before it sleeps: they bridge two operations. Five times as many were not faster,
# and slowed a step down by half if another program used the core; this many, by a seventh.
SPINS = 1_000
# Of ranks on GPUs. With segments that grow, micro-batches of many sizes leave no gaps in the memory, and steps with
# several of them take a tenth less time. cuBLAS sums in the same order each time only in a work space of a fixed size.
GPU_RANK = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
SMALL_MODEL = 100_000_000  # parameters; below, an engine on the CPU is fastest with one thread


def threads_by_role(
    config: RunConfig, pipelines: Mapping[str, Pipeline], roles: list[str], parameters: int | None, machine: Machine
) -> dict[str, int]:
    """Threads of one process of each role: those of the configuration; for a role with GPUs, its CPUs. The others share
    the cores such that processes that work at the same time have no more threads than there are cores: oversubscription
    makes all of them many times slower.

    Engines take one thread each, or for a large model an equal share of the cores. If trainers and engines alternate, a
    trained role has all cores while it works; if not, those that the engines do not use. Frozen roles and trained ones
    take turns (`frozen_roles_overlap`), so each has all cores while it works."""
    cores = machine.cores
    small = parameters is None or parameters < SMALL_MODEL
    ahead = any(config.phases[name].train.max_staleness for name in pipelines)
    settings_of = {role: config.roles[role] for role in roles}
    ranks = sum(count(settings) for settings in settings_of.values() if isinstance(settings, RanksRole))
    fleets = [settings for settings in settings_of.values() if isinstance(settings, EngineRole)]
    workers = sum(fleet.workers for fleet in fleets)
    at_work = workers + (ranks if ahead else 0)  # processes that compute at the same time
    share = 1 if small else max(1, cores // max(1, at_work))
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


def frozen_roles_overlap(config: RunConfig, roles: list[str]) -> bool:
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


def resources_of(settings: Role) -> dict[str, float]:
    """What Ray reserves for one process, in Ray's names."""
    asked = {"CPU": settings.cpus, "GPU": settings.gpus}
    memory_gib: float | None = getattr(settings, "memory_gib", None)
    if memory_gib is not None:
        asked["memory"] = memory_gib * GIB
    custom: dict[str, float] = getattr(settings, "resources", {})
    return {name: float(value) for name, value in {**asked, **custom}.items() if value}


def selectors_of(settings: Role) -> tuple[Selector, ...]:
    """Choices of nodes in order of preference; empty if any node will do."""
    first: Selector = getattr(settings, "label_selector", {})
    others: tuple[Fallback, ...] = getattr(settings, "fallback_strategy", ())
    return (first, *(other.label_selector for other in others)) if first else ()


def environment_of(settings: Role, threads: int, *, alone: bool) -> dict[str, str]:
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
    if isinstance(settings, RanksRole) and settings.gpus > 0:
        env |= GPU_RANK
    return env


def memory_of(
    role: str,
    config: RunConfig,
    pipelines: Mapping[str, Pipeline],
    parameters_of: Callable[[str], int | None],
    shape: Shape | None,
) -> Memory | None:
    """An estimate of one process of the role; None if the size of a model in it is not known."""
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
    fused = settings.gpus > 0 and config.model.fused_kernels is not False
    training = Training(stage, settings.ranks, lora, config.model.gradient_checkpointing, beside, fused, averaged)
    return estimate(parameters, dtype, tokens=tokens, training=training, shape=shape)


def _zero_stage(settings: RanksRole) -> int:
    """The stage in an inline DeepSpeed configuration, else the role's own key."""
    inline = settings.deepspeed if isinstance(settings.deepspeed, dict) else {}
    stage = inline.get("zero_optimization", {}).get("stage", settings.zero_stage)
    return stage if isinstance(stage, int) else settings.zero_stage
