"""Combinations that are wrong whatever the cluster offers, all of them at once. Pure.

Each refusal says which key, what it holds, why that cannot work, and what to set instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from orchestrator.config import FrozenRole, PhaseConfig, RewardRole, RolesConfig, RolloutRole, RunConfig, TrainedRole
from orchestrator.idle_keys import idle_keys
from orchestrator.pipeline import Pipeline

ELASTIC = ("rollout", "reward")  # pools of workers that come and go; every other role is a gang of ranks
Role = TrainedRole | RewardRole | RolloutRole


def refusals(config: RunConfig, pipelines: Mapping[str, Pipeline], launched: Sequence[str]) -> list[str]:
    """Everything that would be refused, one line each; empty if the plan can be made."""
    found: list[str] = []
    for name, pipeline in pipelines.items():
        found += _of_phase(f"phases.{name}", config, config.phases[name], pipeline)
    for role in launched:
        if role not in RolesConfig.model_fields:
            found.append(f"role {role}: the pipeline needs it, but there is no roles.{role} to size it with")
        else:
            found += _of_role(f"roles.{role}", role, getattr(config.roles, role), config.roles, launched)
    return [*found, *_of_weights(config, launched)]


def warnings(config: RunConfig, pipelines: Mapping[str, Pipeline], launched: Sequence[str]) -> list[str]:
    """What works, but not as one may think."""
    forgetful = [
        f"phases.{name}: with model.lora the reference is the model without adapters, which knows nothing of what "
        "earlier phases taught; if it should, run those phases first and start from the model that they leave"
        for name, pipeline in list(pipelines.items())[1:]
        if any("ref_logps" in stage.reads for stage in pipeline)
        and config.model.lora is not None
        and config.roles.reference.model is None
    ]
    biased = [
        f"phases.{name}.sampling: top_p, top_k or min_p cut the distribution that is sampled from, while the policy's "
        "log-probabilities are of the whole: ratios between the two are biased"
        for name, pipeline in pipelines.items()
        if pipeline.generates and _truncates(config.phases[name])
    ]
    lost = [
        f"phases.{name}.train.bema: the average is in the checkpoints of that phase, of which later ones leave "
        f"checkpoint.keep={config.checkpoint.keep}; the phases after it go on from the model itself"
        for name in list(pipelines)[:-1]
        if config.phases[name].train.bema is not None
    ]
    of_methods = [f"phases.{name}: {said}" for name, pipeline in pipelines.items() for said in pipeline.warnings]
    return [*forgetful, *biased, *lost, *of_methods, *idle_keys(config, pipelines, launched)]


def _of_phase(where: str, config: RunConfig, phase: PhaseConfig, pipeline: Pipeline) -> Iterator[str]:
    train = phase.train
    reads = frozenset[str]().union(*(stage.reads for stage in pipeline.updates))
    if train.max_staleness and pipeline.generates is None:
        yield (
            f"{where}.train.max_staleness={train.max_staleness}: {phase.method} samples nothing, so nothing can be "
            "stale; set it to 0"
        )
    elif train.max_staleness and "sample_logps" not in reads:
        yield (
            f"{where}.train.max_staleness={train.max_staleness} trains on tokens of older weights, and {phase.method} "
            "as configured does not correct for that; set an option of it that reads sample_logps, or max_staleness=0"
        )
    if pipeline.precomputed and phase.data.streaming:
        yield (
            f"{where}.options.precompute_ref_log_probs: a stream has no end to compute to before the first step; leave "
            f"it out, or set {where}.data.streaming=false"
        )
    if (generated := pipeline.generates) and generated.options["n"] > 1 and phase.sampling.temperature == 0:
        yield (
            f"{where}.sampling.temperature=0: the {generated.options['n']} samples of a prompt are the same one, and "
            "nothing is learned from comparing them; set it above 0"
        )
    scored = bool(config.rewards) and any(stage.role == "reward" for stage in pipeline)
    if scored and not any(reward.weight for reward in config.rewards):
        yield f"rewards: all weights are 0, so {phase.method} learns nothing; give one reward a weight"
    if phase.data.path is not None and phase.data.mixture:
        yield f"{where}.data.path={phase.data.path} beside {where}.data.mixture, which has paths of its own; keep one"
    if "mismatched" in pipeline.data.columns and train.batch_size < 2:
        yield f"{where}.train.batch_size=1: {phase.method} swaps completions between a batch's examples; use 2 or more"
    for role in pipeline.mixed:
        yield from _of_mixed(where, config, phase, role)
    for update in pipeline.updates:
        yield from _of_update(where, config, phase, update.role, int(update.options.get("minibatches", 1)))


def _of_mixed(where: str, config: RunConfig, phase: PhaseConfig, role: str) -> Iterator[str]:
    """A role whose weights follow the policy's must have weights of its own, and begin with the policy's."""
    said = f"{where}: {phase.method} as configured moves the weights of the {role} (options.sync_ref_model)"
    settings = getattr(config.roles, role)
    if isinstance(settings, FrozenRole) and settings.model is not None:
        yield (
            f"{said}, but roles.{role}.model={settings.model} is a model of its own, which need not be the policy's; "
            f"leave roles.{role}.model unset, or set options.sync_ref_model=false"
        )
    elif config.model.lora is not None:
        yield (
            f"{said}, but with model.lora the {role} is the policy without its adapters and has no weights to move; "
            "train without model.lora, or set options.sync_ref_model=false"
        )


def _of_update(where: str, config: RunConfig, phase: PhaseConfig, role: str, minibatches: int) -> Iterator[str]:
    batch = phase.train.batch_size
    settings = getattr(config.roles, role, None)
    if settings is not None and not isinstance(settings, TrainedRole):
        yield f"{where}: {phase.method} trains the role {role}, but roles.{role} is a pool of workers, not a trainer"
        return
    if batch % minibatches:
        yield f"{where}.train.batch_size={batch} does not divide into {minibatches} minibatches; use a multiple of it"
    ranks = settings.ranks if settings is not None else 1
    if batch // minibatches < ranks:
        yield (
            f"{where}.train.batch_size={batch}"
            + (f" in {minibatches} minibatches" if minibatches > 1 else "")
            + f" leaves some of roles.{role}.ranks={ranks} without data; use a batch of at least {ranks * minibatches}"
        )


def _of_role(where: str, role: str, settings: Role, roles: RolesConfig, launched: Sequence[str]) -> Iterator[str]:
    if isinstance(settings, TrainedRole) and settings.backend == "single" and settings.ranks > 1:
        yield f"{where}.ranks={settings.ranks}: the backend `single` is one process; set {where}.backend=deepspeed"
    if (
        isinstance(settings, RolloutRole)
        and settings.tensor_parallel > 1
        and settings.gpus not in (0, settings.tensor_parallel)
    ):
        yield (
            f"{where}.gpus={settings.gpus:g} with tensor_parallel={settings.tensor_parallel}: a worker holds "
            f"all of its engine's GPUs; set {where}.gpus={settings.tensor_parallel}"
        )
    if isinstance(settings, RolloutRole) and settings.tensor_parallel > 1 and settings.engine == "hf":
        yield f"{where}.tensor_parallel={settings.tensor_parallel}: the hf engine runs on one device; use vllm, or 1"
    if isinstance(settings, RolloutRole) and settings.fallback_strategy and not settings.label_selector:
        yield f"{where}.fallback_strategy is for when {where}.label_selector finds no room, and there is none; set one"
    if settings.colocate is not None and getattr(settings, "label_selector", None):
        yield (
            f"{where}.label_selector: a colocated role runs where {settings.colocate} runs; set "
            f"roles.{settings.colocate}.label_selector instead"
        )
    if settings.colocate is not None:
        yield from _of_colocation(where, role, settings, roles, launched)
    elif not any(getattr(roles, other).colocate == role for other in launched if other in RolesConfig.model_fields):
        yield from _of_gpus(where, settings.gpus, count(settings))


def _of_colocation(where: str, role: str, settings: Role, roles: RolesConfig, launched: Sequence[str]) -> Iterator[str]:
    host = settings.colocate
    hosts = [name for name in launched if name not in ELASTIC and name != role]
    if host not in hosts:
        yield f"{where}.colocate={host}: it can share the bundles of {' or '.join(hosts) or 'no role of this run'}"
        return
    beside: Role = getattr(roles, host)
    if beside.colocate is not None:
        yield f"{where}.colocate={host}: {host} itself is colocated with {beside.colocate}; name that one"
    if count(settings) > count(beside):
        yield f"{where}: {count(settings)} processes cannot share the {count(beside)} bundle(s) of {host}, one in each"
    guests = [name for name in launched if name in RolesConfig.model_fields and getattr(roles, name).colocate == host]
    if role == guests[0]:  # the sum concerns all of them: say it once
        total = beside.gpus + sum(getattr(roles, name).gpus for name in guests)
        yield from _of_gpus(f"roles.{host} with {', '.join(guests)} beside it", total, count(beside))


def _of_gpus(where: str, gpus: float, processes: int) -> Iterator[str]:
    if gpus > 1 and gpus % 1:
        yield f"{where}: {gpus:g} GPUs per bundle; a bundle has a share of one GPU, or whole ones"
    elif 0 < gpus < 1 and processes > 1:
        yield (
            f"{where}: {gpus:g} GPU for each of {processes} processes would put several of them on one GPU; give each "
            "a whole one, or fill it with colocated roles"
        )


def _of_weights(config: RunConfig, launched: Sequence[str]) -> Iterator[str]:
    policy, rollout = config.roles.policy, config.roles.rollout
    if "rollout" in launched and config.weights.transport == "collective" and (policy.gpus > 0) != (rollout.gpus > 0):
        on_gpu, on_cpu = ("policy", "rollout") if policy.gpus > 0 else ("rollout", "policy")
        yield (
            "weights.transport=collective joins the policy and the rollout workers in one process group, but "
            f"roles.{on_gpu} has GPUs and roles.{on_cpu} has none; set weights.transport=object_store"
        )


def count(settings: Role) -> int:
    """Processes of a role at the start."""
    return settings.ranks if isinstance(settings, TrainedRole) else settings.workers


def _truncates(phase: PhaseConfig) -> bool:
    sampling = phase.sampling
    return sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0)
