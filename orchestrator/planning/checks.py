"""What must hold of a run between its parts, once all are opened: engines, models, vocabularies, rewards. Each check
raises ConfigError or ModelError before an actor starts."""

# pyright: basic
# (tokenizers and model configurations are typed in part only)

from __future__ import annotations

from collections.abc import Iterator

from actors import lora, pretrained
from actors.columns import Head
from actors.errors import ConfigError, ModelError
from actors.model import check_architecture
from actors.routing import check_routers
from orchestrator.config.roles import EngineRole
from orchestrator.pipeline import Stage, Verb
from orchestrator.planning.model_files import weight_shapes
from orchestrator.planning.prepared import Prepared, PreparedPhase
from orchestrator.plugins import importable
from rewards.specs import check_columns
from rollout.engine import ENGINES, Ability, abilities_of
from rollout.vllm_engine import cpu_refusal


def refuse_no_room(prepared: Prepared, room: int) -> None:
    """Raises ConfigError for a context of the engine that does not hold what will be sampled, or that the model does
    not reach."""
    given = prepared.config.roles.rollout.max_model_len
    if given is None or not prepared.generates:
        return
    if given > room:
        raise ConfigError(
            f"roles.rollout.max_model_len={given}, but the model holds {room} tokens; set it to {room} at most"
        )
    if given < prepared.longest:
        raise ConfigError(
            f"roles.rollout.max_model_len={given} is less than the {prepared.longest} tokens of the longest prompt "
            "with its completion; raise it or leave it out, or lower data.max_prompt_length or sampling.max_tokens"
        )


def check_rewards(prepared: Prepared) -> None:
    """Every data set that is scored has rewards, and the columns that they ask for."""
    for phase in prepared.phases:
        scored = {"its data": phase.source} if any(stage.verb is Verb.SCORE for stage in phase.pipeline) else {}
        if phase.evaluation is not None:
            scored["its evaluation data"] = phase.evaluation
        given = phase.episode is not None and phase.episode.rewards
        if scored and not (prepared.rewards or prepared.model_rewards or given):
            raise ConfigError(
                f"phase {phase.name} scores completions, but the run has no rewards; "
                "add some, for example rewards: [{fn: exact_match}]"
            )
        for what, source in scored.items():
            check_columns(prepared.rewards, source.report.columns, f"phase {phase.name}, {what}")


def check_vocabularies(prepared: Prepared) -> None:
    """A loss that compares distributions needs the same tokens in both: of the same tokenizer. Padded rows beyond it
    may differ in number; they are compared as far as both models have them."""
    trusted, known = prepared.config.model.trust_remote_code, prepared.tokenizer.get_vocab()
    teaching = {role for phase in prepared.phases for role in phase.pipeline.teachers} | _mixed_in(prepared)
    for phase in prepared.phases:
        for stage in phase.pipeline:
            if stage.retokenised:
                teaching.discard(stage.role)
                _check_retokenised(prepared, phase, stage)
                continue
            engine = prepared.config.roles.get(stage.role)
            if stage.top_k is not None and isinstance(engine, EngineRole):
                teaching.add(engine.follows)
                _check_teaching_engine(phase, stage, engine)
            if stage.top_k is not None and stage.top_k > prepared.vocabulary:
                raise ConfigError(
                    f"phase {phase.name}: {stage.role} is asked for its {stage.top_k} most likely tokens, and the "
                    f"tokenizer {prepared.tokenizer_path} has {prepared.vocabulary}; ask for as many at most"
                )
    for role in sorted(teaching & prepared.models.keys()):
        path = prepared.models[role]
        try:
            own = pretrained.load_tokenizer(path, trusted).get_vocab()
        except ModelError as error:
            raise ConfigError(
                f"roles.{role}.model={path} has no tokenizer to compare with the run's: {error}; put the tokenizer "
                "that it was trained with into that folder"
            ) from None
        if own != known:
            raise ConfigError(
                f"roles.{role}.model={path} has another tokenizer than {prepared.tokenizer_path} "
                f"({len(own.items() ^ known.items())} entries differ), so its distributions are over other tokens; use "
                "a model with the same tokenizer"
            )
        for key, model in (("model.path", prepared.model), (f"roles.{role}.model", path)):
            rows = pretrained.load_config(model, trusted).get_text_config().vocab_size
            if rows <= max(known.values()):
                raise ConfigError(
                    f"{key}={model} predicts {rows} tokens, and the tokenizer has ids up to {max(known.values())}; the "
                    "two distributions cannot be compared"
                )


def _check_retokenised(prepared: Prepared, phase: PreparedPhase, stage: Stage) -> None:
    path = prepared.models.get(stage.role) or prepared.tokenizer_path
    tokenizer = pretrained.load_tokenizer(path, prepared.config.model.trust_remote_code)
    size = len(tokenizer.get_vocab())
    if not tokenizer.is_fast:
        raise ConfigError(
            f"roles.{stage.role}.model={path} has no fast tokenizer, and only these know where in a text a token "
            "stands; use a model that has one"
        )
    if stage.top_k is not None and stage.top_k > min(size, prepared.vocabulary):
        raise ConfigError(
            f"phase {phase.name}: {stage.role} is asked for its {stage.top_k} most likely tokens, and the tokenizers "
            f"have {size} and {prepared.vocabulary}; ask for as many at most"
        )


def _check_teaching_engine(phase: PreparedPhase, stage: Stage, engine: EngineRole) -> None:
    where = f"roles.{stage.role}.engine"
    if Ability.PROMPT_TOP_K not in abilities_of(importable(engine.engine, where)):
        raise ConfigError(
            f"{where}={engine.engine} does not say which tokens are likeliest in the places of given ones; use "
            f"{_engines_with(Ability.PROMPT_TOP_K)}, or a teacher in ranks (kind frozen)"
        )
    temperature = stage.options["temperature"] or phase.temperature
    if temperature != 1:
        raise ConfigError(
            f"phase {phase.name} compares distributions at temperature {temperature:g}, and the engine of {stage.role} "
            "says log-probabilities at 1, of k tokens, from which those at another cannot be made; set the temperature "
            "to 1, or use a teacher in ranks (kind frozen)"
        )


def _mixed_in(prepared: Prepared) -> set[str]:
    """Roles whose model an engine holds as a second model, to sample from a mixture."""
    return {engine.mixes for _, _, engine in _sampling_engines(prepared) if engine.mixes is not None}


def _sampling_engines(prepared: Prepared) -> Iterator[tuple[PreparedPhase, Stage, EngineRole]]:
    """Every stage that samples, with its engine. Roles of other kinds are refused by the plan."""
    for phase in prepared.phases:
        for stage in phase.pipeline.generates:
            engine = prepared.config.roles.get(stage.role)
            if isinstance(engine, EngineRole):
                yield phase, stage, engine


def check_engines(prepared: Prepared) -> None:
    """Raises ConfigError if a stage needs an ability that the engine does not have."""
    for phase, stage, settings in _sampling_engines(prepared):
        where = f"roles.{stage.role}.engine"
        found = abilities_of(importable(settings.engine, where))
        if "mixture" in stage.options and Ability.MIXES not in found:
            raise ConfigError(
                f"{where}={settings.engine} cannot sample from the mixture of two models, which {phase.config.method} "
                f"does; use {_engines_with(Ability.MIXES)}, or an engine of your own with that ability"
            )
        if phase.sampling.records_admitted and phase.sampling.top_k > prepared.vocabulary:
            raise ConfigError(
                f"phases.{phase.name}.sampling.top_k={phase.sampling.top_k}: with replay_truncation so many tokens are "
                f"recorded, and the tokenizer has {prepared.vocabulary}; lower it"
            )
        if phase.sampling.records_admitted and Ability.ADMITTED not in found:
            raise ConfigError(
                f"phases.{phase.name}.sampling.replay_truncation: {where}={settings.engine} does not say which tokens "
                f"a truncated distribution left; use {_engines_with(Ability.ADMITTED)}, or leave it out"
            )
        if phase.sampling.replay_routing and Ability.ROUTES not in found:
            raise ConfigError(
                f"phases.{phase.name}.sampling.replay_routing: {where}={settings.engine} does not say which experts a "
                f"token was sent to; use {_engines_with(Ability.ROUTES)}, or leave it out"
            )
        if prepared.config.model.lm_head_fp32 and Ability.FLOAT32_HEAD not in found:
            raise ConfigError(
                f"model.lm_head_fp32: {where}={settings.engine} computes logits in the model's dtype, so it would "
                "sample from another distribution than the one that is trained; use "
                f"{_engines_with(Ability.FLOAT32_HEAD)}, or leave it out"
            )


def _engines_with(ability: Ability) -> str:
    return " or ".join(kind for kind in ENGINES if ability in abilities_of(kind))


def check_models(prepared: Prepared) -> None:
    """Raises errors about a model's configuration that otherwise only the first step or sample would raise."""
    trusted, rollout = prepared.config.model.trust_remote_code, prepared.config.roles.rollout
    configs = {path: pretrained.load_config(path, trusted) for path in {prepared.model, *prepared.models.values()}}
    for path, found in configs.items():
        check_architecture(found, path)
    if any(phase.sampling.replay_routing for phase in prepared.phases):
        check_routers(configs[prepared.model], prepared.model)
    trained = dict.fromkeys(role for phase in prepared.phases for role in phase.pipeline.trained)
    for role in trained:
        path, head = prepared.models.get(role) or prepared.model, prepared.heads.get(role, Head.VOCABULARY)
        if prepared.lora is not None:
            lora.check(path, prepared.lora, trusted, head)
        if head is not Head.VOCABULARY:
            pretrained.padding_token(prepared.tokenizer, configs[path])
    for role, head in prepared.heads.items():
        path = prepared.models.get(role) or prepared.model
        weights = {name for name, _ in weight_shapes(path)}
        new = weights and f"{pretrained.SCORE}.weight" not in weights
        if new and head is not Head.VOCABULARY and role not in {*trained, *prepared.handed_over}:
            raise ConfigError(
                f"roles.{role}.model: {path} has no head that gives a number, and nothing trains the role; set it to "
                "the folder of a reward model, or to the phase that trains one (${phases.NAME.model})"
            )
    sampled_by_vllm = prepared.generates and ENGINES.get(rollout.engine) == ENGINES["vllm"]
    if sampled_by_vllm and rollout.gpus == 0 and (refusal := cpu_refusal(configs[prepared.model])):
        raise ConfigError(f"roles.rollout.engine={rollout.engine}: {refusal}")
