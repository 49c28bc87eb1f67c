"""Resolves everything that a run names before an actor starts: methods and their options, models, tokenizers, rewards;
its phases with their data (`phase_data`)."""

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
from orchestrator.config.roles import AUTO_ENGINE, EngineRole, RanksRole
from orchestrator.config.schema import ENVIRONMENT, PhaseConfig, RewardConfig, RunConfig
from orchestrator.credit.step_rewards import Steps
from orchestrator.data.synthetic_examples import PREFIX, is_example, model_folder
from orchestrator.methods import build
from orchestrator.pipeline import Pipeline
from orchestrator.planning.checks import check_engines, check_models, check_rewards, check_vocabularies, refuse_no_room
from orchestrator.planning.engine_choice import with_engines
from orchestrator.planning.handover import is_handed_over, phase_of
from orchestrator.planning.memory_estimate import Shape
from orchestrator.planning.model_files import count_parameters, model_length, vocabulary_size
from orchestrator.planning.phase_data import check_lengths, prepare_phase
from orchestrator.planning.prepared import ModelReward, Prepared, PreparedPhase
from orchestrator.planning.published_adapters import merged_because
from orchestrator.planning.token_budget import with_token_budgets
from orchestrator.plugins import importable
from rewards.specs import check_names, check_reward

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
        phase = prepare_phase(config, name, pipeline, tokenizer, room, vocab, phases, run)
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
    check_lengths(prepared)
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
    return pipeline.with_stages(*pipeline, data=data)
