"""Settings of roles that cannot work, whatever the cluster is: kinds, sizes, places, and where their weights come from.
Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from actors.columns import Head
from orchestrator.config.colocation import take_turns, taking_turns, transport_between
from orchestrator.config.roles import (
    EngineRole,
    EnvironmentsRole,
    FrozenRole,
    RanksRole,
    Role,
    RolesConfig,
    ScorersRole,
    TrainerRole,
    count,
    most,
)
from orchestrator.config.schema import RunConfig
from orchestrator.config.section import Section
from orchestrator.pipeline import Pipeline, Verb
from orchestrator.planning.bundles import together
from orchestrator.planning.handover import is_handed_over, phase_of


def of_roles(config: RunConfig, pipelines: Mapping[str, Pipeline], launched: Sequence[str]) -> Iterator[str]:
    """One line per reason to refuse the roles that are launched."""
    for role in launched:
        if role not in config.roles:
            yield (
                f"role {role}: a method or a reward names it, but there is no roles.{role}; describe it there with its "
                "kind: trainer, frozen, engine, scorers or environments"
            )
        else:
            yield from _of_role(f"roles.{role}", role, config.roles[role], config.roles, launched)
    yield from _of_kinds(config, pipelines)
    yield from _of_handovers(config, pipelines)
    yield from _of_weights(config, launched)


def _of_role(where: str, role: str, settings: Role, roles: RolesConfig, launched: Sequence[str]) -> Iterator[str]:
    yield from _of_autoscale(where, settings)
    if isinstance(settings, RanksRole) and settings.backend == "single" and settings.ranks > 1:
        yield f"{where}.ranks={settings.ranks}: the backend `single` is one process; set {where}.backend=deepspeed"
    if (
        isinstance(settings, EngineRole)
        and settings.tensor_parallel > 1
        and settings.gpus not in (0, settings.tensor_parallel)
    ):
        yield (
            f"{where}.gpus={settings.gpus:g} with tensor_parallel={settings.tensor_parallel}: a worker holds "
            f"all of its engine's GPUs; set {where}.gpus={settings.tensor_parallel}"
        )
    if isinstance(settings, EngineRole) and settings.tensor_parallel > 1 and settings.engine == "hf":
        yield f"{where}.tensor_parallel={settings.tensor_parallel}: the hf engine runs on one device; use vllm, or 1"
    if isinstance(settings, EngineRole) and settings.tensor_parallel > 1 and settings.mixes is not None:
        yield (
            f"{where}.tensor_parallel={settings.tensor_parallel}: an engine that mixes in a second model "
            f"({where}.mixes={settings.mixes}) holds both in one process; set it to 1"
        )
    if isinstance(settings, EngineRole) and settings.fallback_strategy and not settings.label_selector:
        yield f"{where}.fallback_strategy needs a {where}.label_selector to fall back from, and none is set; set one"
    if settings.colocate is not None and getattr(settings, "label_selector", None):
        yield (
            f"{where}.label_selector: a colocated role runs where {settings.colocate} runs; set "
            f"roles.{settings.colocate}.label_selector instead"
        )
    if settings.colocate is not None:
        yield from _of_colocation(where, role, settings, roles, launched)
    elif not any(roles[other].colocate == role for other in launched if other in roles):
        yield from _of_gpus(where, settings.gpus, most(settings))


def _of_autoscale(where: str, settings: Role) -> Iterator[str]:
    limits = None if isinstance(settings, RanksRole) else settings.autoscale
    if limits is None:
        return
    if limits.min > limits.max:
        yield f"{where}.autoscale.min={limits.min} is more than {where}.autoscale.max={limits.max}"
    elif not limits.min <= count(settings) <= limits.max:
        yield (
            f"{where}.workers={count(settings)} is the number to begin with, and {where}.autoscale allows "
            f"{limits.min} to {limits.max}; set it to one of these"
        )


def _of_colocation(where: str, role: str, settings: Role, roles: RolesConfig, launched: Sequence[str]) -> Iterator[str]:
    host = settings.colocate
    hosts = [name for name in launched if name in roles and isinstance(roles[name], RanksRole) and name != role]
    if host not in hosts:
        yield f"{where}.colocate={host}: it can share the bundles of {' or '.join(hosts) or 'no role of this run'}"
        return
    beside = roles[host]
    if beside.colocate is not None:
        yield f"{where}.colocate={host}: {host} itself is colocated with {beside.colocate}; name that one"
    if (wanted := most(settings)) > count(beside):
        key = where if wanted == count(settings) else f"{where}.autoscale.max"
        yield f"{key}: {wanted} processes cannot share the {count(beside)} bundle(s) of {host}, one in each"
    guests = [name for name in launched if name in roles and roles[name].colocate == host]
    if role == guests[0]:  # the sum is the same for all guests: report it once
        total = together(beside.gpus, *(roles[name].gpus for name in guests))
        yield from _of_gpus(f"roles.{host} with {', '.join(guests)} beside it", total, count(beside))


def _of_gpus(where: str, gpus: float, processes: int) -> Iterator[str]:
    if gpus > 1 and gpus % 1:
        yield f"{where}: {gpus:g} GPUs per bundle; a bundle has a share of one GPU, or whole ones"
    elif 0 < gpus < 1 and processes > 1:
        yield (
            f"{where}: {gpus:g} GPU for each of {processes} processes would put several of them on one GPU; give each "
            "a whole one, or fill it with colocated roles"
        )


def _of_kinds(config: RunConfig, pipelines: Mapping[str, Pipeline]) -> Iterator[str]:
    """A role must have a kind that its stages and rewards need: a trainer for an update, scorers for functions ..."""
    wanted: dict[Verb, tuple[type[Section], str, str]] = {
        Verb.GENERATE: (EngineRole, "samples from it", "engine"),
        Verb.SCORE: (ScorersRole, "scores with it", "scorers"),
        Verb.INFER: (RanksRole, "asks its model", "trainer or frozen"),
        Verb.UPDATE: (TrainerRole, "trains it", "trainer"),
        Verb.MIX: (FrozenRole, "moves its weights", "frozen"),
    }
    for name, pipeline in pipelines.items():
        says_top_k = {stage.role for stage in pipeline if stage.top_k is not None and not stage.other_prompts}
        for role, verb in dict.fromkeys((stage.role, stage.verb) for stage in pipeline if stage.verb in wanted):
            kind, does, kinds = wanted[verb]
            if verb is Verb.INFER and role in says_top_k and isinstance(config.roles.get(role), EngineRole):
                continue  # an engine can say the likeliest tokens of rows, and nothing else
            if role in config.roles and not isinstance(config.roles[role], kind):
                yield (
                    f"roles.{role}.kind={config.roles[role].kind}: phase {name} ({config.phases[name].method}) {does}, "
                    f"so it must be {kinds}"
                )
    for name in pipelines:
        role = config.phases[name].environments
        if role is not None and role in config.roles and not isinstance(config.roles[role], EnvironmentsRole):
            yield f"roles.{role}.kind={config.roles[role].kind}: phase {name} talks to it, so it must be environments"
    asked: dict[str, Head] = {
        role: Head.ROW_SCALAR if reward.steps is None else Head.STEP_SCALAR
        for reward in config.rewards
        for role in reward.role or ()
    }
    for pipeline in pipelines.values():
        for role, head in pipeline.heads.items():
            if asked.setdefault(role, head) is not head:
                yield (
                    f"roles.{role}: one stage or reward asks for a model with a {asked[role]} head, another for a "
                    f"{head} head; a role's model has one: use two roles"
                )


def _of_handovers(config: RunConfig, pipelines: Mapping[str, Pipeline]) -> Iterator[str]:
    """A phase's model can be handed to later phases only."""
    earlier = [name for name in list(pipelines)[:-1] if pipelines[name].trained]
    nothing = "there is one phase" if len(pipelines) == 1 else "no phase before the last one trains anything"
    for role, settings in config.roles:
        if isinstance(settings, RanksRole) and settings.model is not None and is_handed_over(settings.model):
            phase = phase_of(settings.model)
            if phase not in earlier:
                yield (
                    f"roles.{role}.model={settings.model}: it may be a folder, a hub name, or ${{phases.NAME.model}} "
                    f"with NAME one of {', '.join(earlier) or f'none: {nothing}'}"
                )


def _of_weights(config: RunConfig, launched: Sequence[str]) -> Iterator[str]:
    for role in launched:
        engine = config.roles.get(role)
        if not isinstance(engine, EngineRole):
            continue
        for key, name in (("follows", engine.follows), ("mixes", engine.mixes)):
            if name is not None:
                yield from _of_source(config, role, engine, key, name, launched)


def _of_source(
    config: RunConfig, role: str, engine: EngineRole, key: str, name: str, launched: Sequence[str]
) -> Iterator[str]:
    """A role whose weights engines get must have weights that can reach them."""
    source = config.roles.get(name)
    if not isinstance(source, RanksRole):
        yield f"roles.{role}.{key}={name} is no role with a model to sample from"
    elif key == "mixes" and name == engine.follows:
        yield f"roles.{role}.mixes={name} is the role that it follows: a mixture of a model with itself; name another"
    elif source.model is not None and is_handed_over(source.model):
        yield (
            f"roles.{role}.{key}={name}: its model is there only when an earlier phase has ended, and engines start "
            f"with the run; set roles.{name}.model to a folder or hub name"
        )
    elif name not in launched:  # another role without its adapters stands in for it
        yield (
            f"roles.{role}.{key}={name}: with model.lora {name} is a trained role without its adapters, and those "
            f"weights are not published; set roles.{name}.model to the folder or hub name that training starts from, "
            "or train without model.lora"
        )
    elif config.weights.transport == "collective" and take_turns(taking_turns(config, launched), name, role):
        yield (
            f"weights.transport=collective needs {name} and the workers of {role} awake at the same time, and they "
            "take turns (roles.*.colocate); leave it out, or set weights.transport=object_store"
        )
    elif transport_between(config, taking_turns(config, launched), name, role) == "collective" and (
        (source.gpus > 0) != (engine.gpus > 0)
    ):
        on_gpu, on_cpu = (name, role) if source.gpus > 0 else (role, name)
        yield (
            f"weights.transport=collective joins {name} and the workers of {role} in one process group, "
            f"but roles.{on_gpu} has GPUs and roles.{on_cpu} has none; set weights.transport=object_store"
        )
