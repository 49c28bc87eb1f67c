"""Checks everything that a run names before an actor starts: method and options, model folder, tokenizer, data sets,
rewards, batch sizes."""

# pyright: basic
# (tokenizers and model configurations are typed in part only)

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors import pretrained
from actors.columns import Head
from actors.errors import ConfigError
from actors.pretrained import check_folder
from orchestrator.collection.episodes import REWARD
from orchestrator.collection.precompute import recall
from orchestrator.config.roles import AUTO_ENGINE, EngineRole, EnvironmentsRole, RanksRole
from orchestrator.config.schema import ENVIRONMENT, DataConfig, EvaluationConfig, PhaseConfig, RewardConfig, RunConfig
from orchestrator.credit.step_rewards import Steps
from orchestrator.data.awaited import AwaitedSource
from orchestrator.data.source import RowSource, Source, open_source
from orchestrator.data.synthetic_examples import PREFIX, is_example, model_folder
from orchestrator.losses.objective import LossObjective
from orchestrator.methods import build
from orchestrator.pipeline import DataKind, Pipeline, Prompts
from orchestrator.planning.checks import check_engines, check_models, check_rewards, check_vocabularies, refuse_no_room
from orchestrator.planning.engine_choice import with_engines
from orchestrator.planning.episode_settings import FIRST_WORDS, EpisodeSettings, episode_settings
from orchestrator.planning.handover import is_handed_over, phase_of
from orchestrator.planning.memory_estimate import Shape
from orchestrator.planning.model_files import count_parameters, model_length, vocabulary_size
from orchestrator.planning.prepared import ModelReward, Prepared, PreparedPhase
from orchestrator.planning.published_adapters import merged_because
from orchestrator.planning.schedule import Schedule
from orchestrator.planning.token_budget import with_token_budgets
from orchestrator.planning.written_sources import in_folder, is_made, open_phase_source
from orchestrator.plugins import importable
from rewards.specs import check_names, check_reward
from rollout.conversation import Conversation
from rollout.sampling import Sampling
from rollout.stopping import resolved_stops
from rollout.tool_calls import parser_of

ENSEMBLE = "ensemble"  # what a reward of several models is called, unless it has a name


def prepare(config: RunConfig, *, run: Path | None = None) -> Prepared:
    """Resolve and open everything that a run names. `run`: the folder of a run that is resumed, where phases may have
    made data already. Raises ConfigError, ModelError or DataError."""
    pipelines = {name: build_pipeline(phase, config.rewards) for name, phase in config.phases.items()}
    rewards = tuple(check_reward(reward) for reward in config.rewards if reward.role is None)
    scoring = _scoring(config.rewards, None)
    given = [REWARD] if any(phase.episode is not None for phase in config.phases.values()) else []
    check_names([*(reward.label for reward in (*rewards, *scoring)), *given])
    for role, settings in config.roles:
        if isinstance(settings, EngineRole) and settings.engine != AUTO_ENGINE:
            importable(settings.engine, f"roles.{role}.engine")
    model = resolve_model(config.model.path, config.seed)
    models = {
        role: resolve_model(settings.model, config.seed, f"roles.{role}.model")
        for role, settings in config.roles
        if isinstance(settings, RanksRole) and settings.model is not None and not is_handed_over(settings.model)
    }
    handed_over = {
        role: settings.model
        for role, settings in config.roles
        if isinstance(settings, RanksRole) and settings.model is not None and is_handed_over(settings.model)
    }
    tokenizer_path = config.model.tokenizer or model
    tokenizer = load_tokenizer(tokenizer_path, config.model.chat_template, config.model.trust_remote_code)
    room = model_length(model, config.model.trust_remote_code)
    vocab = vocabulary_size(model, config.model.trust_remote_code)
    phases: list[PreparedPhase] = []
    for name, pipeline in pipelines.items():
        pipeline = _for_other_tokenizers(pipeline, models, tokenizer_path, config.model.trust_remote_code)
        phase = _prepare_phase(config, name, pipeline, tokenizer, room, vocab, phases, run)
        phases.append(phase if phase.awaits_data else recall(config, model, phase))
    prepared = Prepared(
        config=config,
        model=model,
        models=models,
        handed_over=handed_over,
        tokenizer_path=tokenizer_path,
        tokenizer=tokenizer,
        phases=tuple(phases),
        rewards=rewards,
        model_rewards=_scoring(config.rewards, tokenizer),
        parameters=count_parameters(model),
    )
    prepared = replace(prepared, own_parameters=_own_parameters(prepared), shapes=_shapes(prepared))
    prepared = with_engines(prepared)
    prepared = with_token_budgets(replace(prepared, merged_because=merged_because(prepared)))
    _check_lengths(prepared)
    check_rewards(prepared)
    check_engines(prepared)
    check_models(prepared)
    refuse_no_room(prepared, room)
    check_vocabularies(prepared)
    return prepared


def _scoring(rewards: Iterable[RewardConfig], tokenizer: Any) -> tuple[ModelReward, ...]:
    """Rewards that models give. The separators of steps are looked for in the tokenizer, if there is one."""

    def steps_of(reward: RewardConfig) -> Steps | None:
        steps = None if reward.steps is None else Steps(reward.steps, reward.step_separator)
        return steps if steps is None or tokenizer is None else steps.found_in(tokenizer)

    return tuple(
        ModelReward(
            reward.role,
            reward.weight,
            reward.name or (reward.role[0] if len(reward.role) == 1 else ENSEMBLE),
            reward.on_failure,
            steps_of(reward),
            reward.combine,
            reward.deviations,
        )
        for reward in rewards
        if reward.role is not None
    )


def build_pipeline(phase: PhaseConfig, rewards: Iterable[RewardConfig] = ()) -> Pipeline:
    """The phase's method under its options, with the roles that the phase gives it and the rewards of the run."""
    pipeline = build(phase.method, phase.options, {"max_completion_length": phase.sampling.max_tokens})
    if phase.episode is not None:
        pipeline = pipeline.with_episodes(ENVIRONMENT, split=phase.episode.split == "turns")
    if any(reward.steps == "each" for reward in rewards):
        pipeline = pipeline.with_step_rewards()
    if phase.sampling.replay_truncation and pipeline.generates:
        pipeline = pipeline.with_admitted_tokens()
    if phase.sampling.replay_routing and pipeline.generates:
        pipeline = pipeline.with_routes()
    return pipeline.with_roles(phase.rename_roles) if phase.rename_roles else pipeline


def resolve_model(path: str, seed: int, key: str = "model.path") -> str:
    """`example:NAME` becomes the folder of a model made here; what looks like a path must be one. `key` is where the
    path was set."""
    if is_example(path):
        return str(model_folder(path.removeprefix(PREFIX), seed))
    folder = Path(path).expanduser()
    if not path.startswith((".", "/", "~")) and not folder.exists():
        return path
    check_folder(str(folder.absolute()), key)
    return str(folder)


def load_tokenizer(path: str, chat_template: str | None, trust_remote_code: bool) -> Any:
    """`chat_template` is a file."""
    try:
        text = None if chat_template is None else Path(chat_template).read_text()
    except OSError as error:
        raise ConfigError(f"model.chat_template={chat_template!r} cannot be read: {error.strerror}") from None
    return pretrained.load_tokenizer(path, trust_remote_code, text)


def _own_parameters(prepared: Prepared) -> dict[str, int | None]:
    """Of roles whose model is another one than the run's, or has another head."""
    first_of = {phase.name: phase.pipeline.trained[0] for phase in prepared.phases if phase.pipeline.trained}
    differing = [role for role, head in prepared.heads.items() if head is not Head.VOCABULARY]
    found: dict[str, int | None] = {}
    for role in (*prepared.models, *prepared.handed_over, *differing):
        left = phase_of(prepared.handed_over.get(role, ""))  # whose first trained role's model it becomes
        path = prepared.models.get(first_of.get(left or "", role)) or prepared.model
        found[role] = count_parameters(path, prepared.heads.get(role, Head.VOCABULARY))
    return found


def _shapes(prepared: Prepared) -> dict[str, Shape]:
    """Of the models of roles that hold one."""
    trusted = prepared.config.model.trust_remote_code
    paths = {
        name: prepared.models.get(name) or prepared.model
        for name, role in prepared.config.roles
        if isinstance(role, RanksRole)
    }
    of_path = {path: Shape.of(pretrained.load_config(path, trusted)) for path in set(paths.values())}
    return {role: shape for role, path in paths.items() if (shape := of_path[path]) is not None}


def _for_other_tokenizers(
    pipeline: Pipeline, models: Mapping[str, str], tokenizer_path: str, trusted: bool
) -> Pipeline:
    """The pipeline whose data has teachers' prompts in the tokens of the teacher that has its own."""
    theirs = next((models.get(stage.role) or tokenizer_path for stage in pipeline if stage.retokenised), None)
    if theirs is None:
        return pipeline
    data = replace(pipeline.data, teacher_tokenizer=(theirs, trusted))
    return Pipeline(data, *pipeline, warnings=pipeline.warnings, temperature=pipeline.temperature)


def _prepare_phase(
    config: RunConfig,
    name: str,
    pipeline: Pipeline,
    tokenizer: Any,
    room: int,
    vocab: int,
    before: list[PreparedPhase],
    run: Path | None,
) -> PreparedPhase:
    phase = config.phases[name]
    given = f"phases.{name}.data"
    source = open_phase_source(
        phase.data, pipeline.data, tokenizer, seed=config.seed, room=room, where=given, before=before, run=run
    )
    schedule = phase_schedule(phase, name, source, _least_batch(config, pipeline))
    _check_something_happens(phase, name, pipeline, schedule.steps)
    if isinstance(source, RowSource) and schedule.items > len(source):
        pipeline = pipeline.with_passes_beforehand()
    evaluation, held_out = _open_evaluation(phase, name, pipeline, tokenizer, config.seed, room)
    first_version = sum(earlier.steps for earlier in before)
    sampling = resolved_stops(Sampling(**phase.sampling.model_dump()), tokenizer, vocab, f"phases.{name}.sampling")
    episode = _episode(config, name, [each for each in (source, evaluation) if each is not None], tokenizer, room)
    return PreparedPhase(
        name,
        len(before),
        phase,
        pipeline,
        source,
        evaluation,
        held_out,
        schedule,
        sampling,
        first_version,
        episode=episode,
    )


def with_made_data(prepared: Prepared, phase: PreparedPhase, run: Path) -> PreparedPhase:
    """The phase with the data that earlier ones have made in the folder of the run, if it takes such. Raises
    ConfigError or DataError if that cannot be used as the phase was planned."""
    config = phase.config
    if not is_made(config.data):
        return phase
    room = model_length(prepared.model, prepared.config.model.trust_remote_code)
    data, kind = in_folder(config.data, run), phase.pipeline.data
    source = open_source(data, kind, prepared.tokenizer, seed=prepared.config.seed, model_max_length=room)
    phase_schedule(config, phase.name, source, _least_batch(prepared.config, phase.pipeline))
    opened = replace(phase, source=source)
    where, budget = f"phases.{phase.name}.data", f"phases.{phase.name}.train.token_budget"
    if phase.pipeline.trained:
        _refuse_too_long(source, opened.prompt_tokens(source), phase.pipeline, config, where, budget)
    return opened


def _episode(config: RunConfig, name: str, sources: list[Source], tokenizer: Any, room: int) -> EpisodeSettings | None:
    """The episodes of a phase, with users' code found and the chat template tried. Raises ConfigError."""
    phase = config.phases[name]
    if phase.episode is None or phase.environments is None:
        return None
    role = config.roles.get(phase.environments)
    if not isinstance(role, EnvironmentsRole):
        raise ConfigError(
            f"phases.{name}.episode is hosted by the role {phase.environments}; describe it as "
            f"roles.{phase.environments} with kind environments"
        )
    settings = episode_settings(phase, name, role, prompt_tokens=0)
    spec = settings.spec.located()
    conversation, schemas = Conversation(tokenizer), spec.tool_schemas
    parser_of(settings.parser, tokenizer)
    if not settings.split:
        conversation.refuse_rewriting(["user" if phase.episode.environment is not None else "tool"], schemas)
    prompt_tokens = settings.limits.prompt_tokens
    if not prompt_tokens:
        around = len(conversation.prompt([{"role": "user", "content": ""}], schemas, {}))
        needed = max(source.longest.prompt for source in sources) + around + (FIRST_WORDS if spec.environments else 0)
        prompt_tokens = max(1, min(needed, room - phase.sampling.max_tokens))
    return replace(settings, spec=spec, limits=replace(settings.limits, prompt_tokens=prompt_tokens))


def _check_lengths(prepared: Prepared) -> None:
    """No row is longer than a micro-batch of its phase."""
    for phase in prepared.phases:
        if not (phase.pipeline.trained or any(reward.role is not None for reward in prepared.config.rewards)):
            continue
        budget = f"phases.{phase.name}.train.token_budget"
        for where, each in (("data", phase.source), ("evaluation.rows", phase.held_out)):
            if each is not None:
                prompt = each.longest.prompt if phase.episode is None else phase.episode.limits.prompt_tokens
                where = f"phases.{phase.name}.{where}"
                _refuse_too_long(each, prompt, phase.pipeline, phase.config, where, budget)


def _refuse_too_long(
    source: Source, prompt: int, pipeline: Pipeline, phase: PhaseConfig, where: str, budget: str
) -> None:
    """A micro-batch holds whole rows, or whole items where a loss compares the rows of one. `prompt`: tokens of the
    longest one that is sampled from."""
    whole = any(LossObjective.of(update).keep_groups for update in pipeline.updates)
    longest = source.longest.item if whole else source.longest.row
    what = f"all rows of an item of {pipeline.data.name} together" if whole else "a row"
    limit = f"{where}.max_length"
    sampled = prompt + phase.sampling.max_tokens
    if pipeline.generates and sampled >= longest:
        longest, what = sampled, "a prompt with sampling.max_tokens"
        limit = f"{where}.max_prompt_length or sampling.max_tokens"
    _refuse_long_teacher_prompt(source, pipeline, phase, where, budget)
    if longest > phase.train.micro_batch_tokens:
        raise ConfigError(
            f"{budget}={phase.train.micro_batch_tokens}: {what} may have {longest} tokens, and a micro-batch takes it "
            f"whole; raise {budget}, or lower {limit}"
        )


def _refuse_long_teacher_prompt(
    source: Source, pipeline: Pipeline, phase: PhaseConfig, where: str, budget: str
) -> None:
    """What a teacher reads is longer than what the student writes behind."""
    if pipeline.data.teacher_template is None:
        return
    answers = 2 if any("demonstration" in stage.reads for stage in pipeline) else 1
    longest = source.longest.teacher_prompt + answers * phase.sampling.max_tokens
    if longest > phase.train.micro_batch_tokens:
        raise ConfigError(
            f"{budget}={phase.train.micro_batch_tokens}: what a teacher reads may have {longest} tokens, "
            f"{source.longest.teacher_prompt} of options.teacher_template and {answers} times sampling.max_tokens; "
            f"raise {budget}, or leave long rows out of {where}"
        )


def _least_batch(config: RunConfig, pipeline: Pipeline) -> int:
    """Items that a batch must have: some for each rank in each minibatch, and another one to swap with."""
    roles = (getattr(config.roles, role, None) for role in pipeline.roles)
    ranks = max((role.ranks for role in roles if isinstance(role, RanksRole)), default=1)
    minibatches = max((int(update.options.get("minibatches", 1)) for update in pipeline.updates), default=1)
    return max(ranks * minibatches, 2 if "mismatched" in pipeline.data.columns else 1)


def phase_schedule(phase: PhaseConfig, name: str, source: Source, least: int) -> Schedule:
    """`train.steps` whole batches; or `train.epochs` passes over the data, which end where the last one ends."""
    where, train = f"phases.{name}.train", phase.train
    unknown = phase.data.streaming or isinstance(source, AwaitedSource)
    items = None if unknown else len(source)
    fills = train.steps is not None or build_pipeline(phase).draws_again
    if items is not None and train.batch_size > items and fills:  # what is only made needs no full batch
        raise ConfigError(
            f"{where}.batch_size={train.batch_size} is more than the {items} items of {phase.data.path!r}; "
            "lower it or give more data"
        )
    if train.steps is not None:
        if train.epochs is not None:
            raise ConfigError(f"{where} sets both steps={train.steps} and epochs={train.epochs:g}; keep one")
        return Schedule.of_steps(train.steps, train.batch_size)
    if train.epochs is None:
        raise ConfigError(f"{where} sets neither steps nor epochs; set one, e.g. {where}.steps=100")
    if items is None:
        what = "a stream" if phase.data.streaming else "data that the run makes itself"
        raise ConfigError(f"{where}.epochs={train.epochs:g} of {what} cannot be counted; set {where}.steps")
    return Schedule.of_items(round(items * train.epochs), train.batch_size, least=least)


def _check_something_happens(phase: PhaseConfig, name: str, pipeline: Pipeline, steps: int) -> None:
    """Raises ConfigError if an interval (`every: N`) is longer than the phase, so that nothing would ever happen."""
    for stage in pipeline.mixes:
        if stage.options["every"] > steps:
            raise ConfigError(
                f"phases.{name}: the weights of {stage.role} follow every {stage.options['every']} steps, but the "
                f"phase has {steps}; lower options.ref_model_sync_steps, or train for longer"
            )
    bema, optimizer_steps = phase.train.bema, steps * pipeline.optimizer_steps_per_batch
    if bema is not None and bema.update_after + bema.update_freq > optimizer_steps:
        raise ConfigError(
            f"phases.{name}.train.bema takes its first average at step {bema.update_after + bema.update_freq} "
            f"(update_after + update_freq), but the phase has {optimizer_steps} optimizer steps; lower "
            f"phases.{name}.train.bema.update_freq, or train for longer"
        )


def _open_evaluation(
    phase: PhaseConfig, name: str, pipeline: Pipeline, tokenizer: Any, seed: int, room: int
) -> tuple[Source | None, Source | None]:
    """(held-out prompts, held-out rows)."""
    if phase.evaluation is None:
        return None, None
    where = f"phases.{name}.evaluation"
    kind = pipeline.held_out
    if wrong := _wrong_with(phase.evaluation, where, phase.method, kind):
        raise ConfigError(wrong)

    def opened(data: DataConfig | None, kind: DataKind | None) -> Source | None:
        unshuffled = data.model_copy(update={"shuffle": False}) if data is not None else None
        return unshuffled and kind and open_source(unshuffled, kind, tokenizer, seed=seed, model_max_length=room)

    prompts, rows = opened(phase.evaluation.data, Prompts), opened(phase.evaluation.rows, kind)
    if rows is not None and kind is not None and "mismatched" in kind.columns and len(rows) < 2:
        raise ConfigError(f"{where}.rows has one item; {phase.method} swaps completions between items: give it more")
    return prompts, rows


def _wrong_with(evaluation: EvaluationConfig, where: str, method: str, kind: DataKind | None) -> str | None:
    if evaluation.data is None and evaluation.rows is None:
        return (
            f"{where} names nothing to evaluate on; set {where}.data (prompts, answered and scored by the rewards), "
            f"{where}.rows (rows, whose loss is taken), or both"
        )
    if evaluation.rows is not None and kind is None:
        return (
            f"{where}.rows: {method} learns from what it samples, so rows have no loss of its own; set {where}.data "
            "to held-out prompts instead"
        )
    for name, data in (("rows", evaluation.rows), ("data", evaluation.data)):
        if data is not None and is_made(data):
            return (
                f"{where}.{name}.path={data.path}: what is held out is read before the run; name a file or a hub name"
            )
        if data is not None and data.streaming:
            return (
                f"{where}.{name}.streaming=true: what is held out is evaluated all at once; leave it out, and set "
                f"{where}.{name}.limit if that is too much"
            )
    return None
