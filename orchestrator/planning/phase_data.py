"""The phases of a run, opened: their data, held-out data, schedule and episodes, and whether every row fits.

A phase whose data an earlier one makes is opened twice: before the run, as far as it is known, and when the data is
there (`with_made_data`)."""

# pyright: basic
# (tokenizers are typed in part only)

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.errors import ConfigError
from orchestrator.config.roles import EnvironmentsRole, RanksRole
from orchestrator.config.schema import DataConfig, EvaluationConfig, PhaseConfig, RunConfig
from orchestrator.data.awaited import AwaitedSource
from orchestrator.data.source import RowSource, Source, open_source
from orchestrator.losses.objective import LossObjective
from orchestrator.pipeline import DataKind, Pipeline, Prompts
from orchestrator.planning.episode_settings import FIRST_WORDS, EpisodeSettings, episode_settings
from orchestrator.planning.model_files import model_length
from orchestrator.planning.prepared import Prepared, PreparedPhase
from orchestrator.planning.schedule import Schedule
from orchestrator.planning.written_sources import in_folder, is_made, open_phase_source
from rollout.conversation import Conversation
from rollout.sampling import Sampling
from rollout.stopping import resolved_stops
from rollout.tool_calls import parser_of


def prepare_phase(
    config: RunConfig,
    name: str,
    pipeline: Pipeline,
    tokenizer: Any,
    room: int,
    vocab: int,
    before: list[PreparedPhase],
    run: Path | None,
) -> PreparedPhase:
    """A phase with its data open. `room`: tokens that the model holds; `vocab`: its vocabulary; `before`: the phases
    before it; `run`: the folder of a run that is resumed. Raises ConfigError or DataError."""
    phase = config.phases[name]
    given = f"phases.{name}.data"
    source = open_phase_source(
        phase.data, pipeline.data, tokenizer, seed=config.seed, room=room, where=given, before=before, run=run
    )
    schedule = _phase_schedule(phase, name, pipeline, source, _least_batch(config, pipeline))
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
    _phase_schedule(config, phase.name, phase.pipeline, source, _least_batch(prepared.config, phase.pipeline))
    opened = replace(phase, source=source)
    where, budget = f"phases.{phase.name}.data", f"phases.{phase.name}.train.token_budget"
    if phase.pipeline.trained:
        _refuse_too_long(source, opened.prompt_tokens(source), phase.pipeline, config, where, budget)
    return opened


def _least_batch(config: RunConfig, pipeline: Pipeline) -> int:
    """Items that a batch must have: some for each rank in each minibatch, and another one to swap with."""
    roles = (getattr(config.roles, role, None) for role in pipeline.roles)
    ranks = max((role.ranks for role in roles if isinstance(role, RanksRole)), default=1)
    minibatches = max((int(update.options.get("minibatches", 1)) for update in pipeline.updates), default=1)
    return max(ranks * minibatches, 2 if "mismatched" in pipeline.data.columns else 1)


def _phase_schedule(phase: PhaseConfig, name: str, pipeline: Pipeline, source: Source, least: int) -> Schedule:
    """`train.steps` whole batches; or `train.epochs` passes over the data, which end where the last one ends."""
    where, train = f"phases.{name}.train", phase.train
    unknown = phase.data.streaming or isinstance(source, AwaitedSource)
    items = None if unknown else len(source)
    fills = train.steps is not None or pipeline.draws_again
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


def check_lengths(prepared: Prepared) -> None:
    """Raises ConfigError if a row may be longer than a micro-batch of its phase."""
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
    """Raises ConfigError if a micro-batch cannot hold the longest row whole, or the longest item where a loss compares
    the rows of one. `prompt`: tokens of the longest prompt that is sampled from."""
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
    """A teacher reads a prompt of its own before the student's answer: both must fit in a micro-batch. Raises
    ConfigError."""
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
