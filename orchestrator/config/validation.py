"""Invalid combinations of settings, all of them at once, whatever the cluster is. Pure.

Each error names the key and its value, why that cannot work, and what to set instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from orchestrator.config.ineffective_keys import ineffective_keys
from orchestrator.config.reward_validation import of_learning, of_scoring_roles, of_split_episodes
from orchestrator.config.role_validation import of_roles
from orchestrator.config.roles import (
    EngineRole,
    FrozenRole,
    RanksRole,
)
from orchestrator.config.schema import PhaseConfig, RunConfig
from orchestrator.config.section import Section
from orchestrator.pipeline import Pipeline, Verb

COMPANION_KEYS = frozenset({"kind", "model", "dtype"})  # of a role whose model lives in another's ranks


def refusals(config: RunConfig, pipelines: Mapping[str, Pipeline], launched: Sequence[str]) -> list[str]:
    """One line per reason to refuse the configuration; empty if it can be planned."""
    found: list[str] = []
    for name, pipeline in pipelines.items():
        found += _of_phase(f"phases.{name}", config, config.phases[name], pipeline, launched)
    return [*found, *of_roles(config, pipelines, launched), *of_scoring_roles(config)]


def warnings(config: RunConfig, pipelines: Mapping[str, Pipeline], launched: Sequence[str]) -> list[str]:
    """Valid settings with surprising effects."""
    forgetful = [
        f"phases.{name}: with model.lora the reference is the model without adapters, which knows nothing of what "
        "earlier phases taught; if it should, run those phases first and start from the model that they leave"
        for name, pipeline in list(pipelines.items())[1:]
        if any("ref_logps" in stage.reads for stage in pipeline)
        and config.model.lora is not None
        and any(_is_copy(config, role) for role in pipeline.roles)
    ]
    biased = [
        f"phases.{name}.sampling: top_p, top_k or min_p cut the distribution that is sampled from, while the policy's "
        "log-probabilities are of the whole: ratios between the two are biased; set replay_truncation=true"
        for name, pipeline in pipelines.items()
        if pipeline.generates
        and pipeline.trained
        and _truncates(config.phases[name])
        and not config.phases[name].sampling.replay_truncation
    ]
    lost = [
        f"phases.{name}.train.bema: the average is in the checkpoints of that phase, of which later ones leave "
        f"checkpoint.keep={config.checkpoint.keep}; the phases after it go on from the model itself"
        for name in list(pipelines)[:-1]
        if config.phases[name].train.bema is not None
    ]
    of_methods = [f"phases.{name}: {said}" for name, pipeline in pipelines.items() for said in pipeline.warnings]
    return [*forgetful, *biased, *lost, *of_methods, *ineffective_keys(config, pipelines, launched)]


def _is_copy(config: RunConfig, role: str) -> bool:
    """Whether a role has the weights of a trained one."""
    settings = config.roles.get(role)
    return isinstance(settings, FrozenRole) and settings.model is None


def _of_phase(
    where: str, config: RunConfig, phase: PhaseConfig, pipeline: Pipeline, launched: Sequence[str]
) -> Iterator[str]:
    train = phase.train
    reads = frozenset[str]().union(*(stage.reads for stage in pipeline.updates))
    if train.max_staleness and not pipeline.generates:
        yield (
            f"{where}.train.max_staleness={train.max_staleness}: {phase.method} samples nothing, so nothing can be "
            "stale; set it to 0"
        )
    elif train.max_staleness and "sample_logps" not in reads and _samples_get_stale(config, pipeline):
        yield (
            f"{where}.train.max_staleness={train.max_staleness} trains on tokens of older weights, and {phase.method} "
            "as configured does not correct for that; set an option of it that reads sample_logps, or max_staleness=0"
        )
    if pipeline.precomputed and phase.data.streaming:
        yield (
            f"{where}.options.precompute_ref_log_probs: a stream has no end to compute to before the first step; leave "
            f"it out, or set {where}.data.streaming=false"
        )
    if pipeline.samples_per_prompt > 1 and phase.sampling.temperature == 0:
        yield (
            f"{where}.sampling.temperature=0: the {pipeline.samples_per_prompt} samples of a prompt are the same, and "
            "nothing is learned from comparing them; set it above 0"
        )
    scored = bool(config.rewards) and any(stage.verb is Verb.SCORE for stage in pipeline)
    if scored and not any(reward.weight for reward in config.rewards):
        yield f"rewards: all weights are 0, so {phase.method} has nothing to learn; give one reward a weight"
    if phase.episode is not None and any(stage.verb is Verb.TAKE for stage in pipeline):
        yield (
            f"{where}.episode: {phase.method} as configured learns from completions of the data, too, which are no "
            "episodes; choose options with which it samples all of them, or leave the section out"
        )
    if phase.episode is not None and pipeline.written_columns and not pipeline.needs_turns:
        yield (
            f"{where}.episode: {phase.method} as configured writes completions of one turn; leave the section out, and "
            "see the turns of episodes in the tables of completions (logging.completions_every), or choose an option "
            "that writes turns (keep=last_turn)"
        )
    if pipeline.needs_turns and (phase.episode is None or phase.episode.split != "turns"):
        yield (
            f"{where}: {phase.method} as configured takes turns of episodes; say with whom the model talks, and that "
            f"each turn is a row: {where}.episode.environment=NAME {where}.episode.split=turns"
        )
    if phase.data.path is not None and phase.data.mixture:
        yield f"{where}.data.path={phase.data.path} beside {where}.data.mixture, which has paths of its own; keep one"
    if "mismatched" in pipeline.data.columns and train.batch_size < 2:
        yield f"{where}.train.batch_size=1: {phase.method} swaps completions between a batch's examples; use 2 or more"
    if phase.evaluation and phase.evaluation.data and not config.roles.engine_of(pipeline.trained, pipeline.roles):
        asked = pipeline.trained[0] if pipeline.trained else "nothing"
        yield (
            f"{where}.evaluation.data: {phase.method} trains {asked}, and no engine samples from it; add "
            f"a role with kind engine and follows {asked}, or evaluate on rows (evaluation.rows)"
        )
    if phase.episode is not None and pipeline.data.teacher_template is not None:
        yield (
            f"{where}.episode: {phase.method} gives its teacher another prompt, and the prompt of an episode is its "
            "environment's; leave the section out"
        )
    yield from _of_truncation(where, phase, pipeline)
    for stage in pipeline.generates:
        engine = config.roles.get(stage.role)
        if "mixture" in stage.options and isinstance(engine, EngineRole) and engine.mixes is None:
            yield (
                f"roles.{stage.role}.mixes is not set, and {phase.method} samples there from a mixture of two models; "
                "set it to the role whose model is mixed in (reference, say)"
            )
    yield from of_learning(where, config, phase, pipeline)
    yield from of_split_episodes(where, config, phase, pipeline)
    for role in pipeline.other_teachers:
        yield from _of_teacher(where, config, phase, role)
    for role, companion in pipeline.companions.items():
        yield from _of_companion(where, config, role, companion, launched)
    for role in pipeline.mixed:
        yield from _of_mixed(where, config, phase, pipeline, role)
    for update in pipeline.updates:
        yield from _of_update(where, config, phase, update.role, int(update.options.get("minibatches", 1)))


def _of_truncation(where: str, phase: PhaseConfig, pipeline: Pipeline) -> Iterator[str]:
    """What is recorded of truncated sampling must be bounded, and be read."""
    if not (phase.sampling.replay_truncation and pipeline.generates):
        return
    said = f"{where}.sampling.replay_truncation"
    if not _truncates(phase):
        yield f"{said}: nothing cuts the distribution that is sampled from; set top_k beside it, or leave it out"
    elif phase.sampling.top_k <= 0:
        yield (
            f"{said} records the tokens that each sampled one could have been, and nothing bounds their number; set "
            f"{where}.sampling.top_k (128, say) beside top_p or min_p"
        )
    if pipeline.teachers or len(pipeline.row_sources) > len(pipeline.generates):
        yield f"{said}: {phase.method} learns from whole distributions, or from rows of the data; leave it out"


def _samples_get_stale(config: RunConfig, pipeline: Pipeline) -> bool:
    """Whether an engine of the pipeline follows a role whose weights change in the phase."""
    engines = (config.roles.get(stage.role) for stage in pipeline.generates)
    followed = {engine.follows for engine in engines if isinstance(engine, EngineRole)}
    return bool(followed & {*pipeline.trained, *pipeline.mixed})


def _of_teacher(where: str, config: RunConfig, phase: PhaseConfig, role: str) -> Iterator[str]:
    """A model to learn from is another model."""
    said, settings = f"{where}: {phase.method} learns from the distributions of {role}", config.roles.get(role)
    if isinstance(settings, EngineRole):
        role, settings = settings.follows, config.roles.get(settings.follows)
    if not isinstance(settings, RanksRole):
        yield f"{said}; describe it as roles.{role} with kind frozen and its model"
    elif settings.model is None:
        yield (
            f"{said}, and roles.{role}.model is not set: it would be the model that is trained; set it to a folder, a "
            "hub name or ${phases.NAME.model}"
        )


def _of_companion(where: str, config: RunConfig, role: str, companion: str, launched: Sequence[str]) -> Iterator[str]:
    """A model that lives in another role's ranks has no processes to be sized."""
    settings = config.roles.get(companion)
    if not isinstance(settings, RanksRole) or companion in launched:
        return
    fields = type(settings).model_fields
    idle = [name for name in fields if name not in COMPANION_KEYS and _is_set(settings, name)]
    if idle:
        yield (
            f"roles.{companion}.{idle[0]}: in {where} the model of {companion} lives in the processes of {role}, whole "
            "on each rank, and none are launched for it; leave it out"
        )


def _is_set(settings: Section, name: str) -> bool:
    field = type(settings).model_fields[name]
    return getattr(settings, name) != field.get_default(call_default_factory=True)


def _of_mixed(where: str, config: RunConfig, phase: PhaseConfig, pipeline: Pipeline, role: str) -> Iterator[str]:
    """A role whose weights are moved towards the policy's must have a copy of the policy's weights."""
    option = "options.teacher=base" if role in pipeline.teachers else "options.sync_ref_model=false"
    said = f"{where}: {phase.method} as configured moves the weights of the {role}"
    settings = config.roles[role]
    if isinstance(settings, FrozenRole) and settings.model is not None:
        yield (
            f"{said}, but roles.{role}.model={settings.model} is a model of its own, which need not be the policy's; "
            f"leave roles.{role}.model unset, or set {option}"
        )
    elif config.model.lora is not None:
        yield (
            f"{said}, but with model.lora the {role} is the policy without its adapters and has no weights to move; "
            f"train without model.lora, or set {option}"
        )


def _of_update(where: str, config: RunConfig, phase: PhaseConfig, role: str, minibatches: int) -> Iterator[str]:
    batch = phase.train.batch_size
    settings = config.roles.get(role)
    if settings is not None and not isinstance(settings, RanksRole):
        return  # refused by its kind
    if batch % minibatches:
        yield f"{where}.train.batch_size={batch} does not divide into {minibatches} minibatches; use a multiple of it"
    ranks = settings.ranks if settings is not None else 1
    if batch // minibatches < ranks:
        yield (
            f"{where}.train.batch_size={batch}"
            + (f" in {minibatches} minibatches" if minibatches > 1 else "")
            + f" leaves some of roles.{role}.ranks={ranks} without data; use a batch of at least {ranks * minibatches}"
        )


def _truncates(phase: PhaseConfig) -> bool:
    sampling = phase.sampling
    return sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0)
