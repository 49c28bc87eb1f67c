"""Keys that are set but have no effect. Pure.

A recipe may size roles that one of its variants does not launch, so most of these are warnings: one line per
section, which names the keys. Settings with which a run would learn nothing are errors, in `validation.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from pydantic import BaseModel

from orchestrator.config.roles import (
    EngineRole,
    FrozenRole,
    OptimizerConfig,
    RanksRole,
    RolesConfig,
    ScorersRole,
    TrainerRole,
)
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline import Pipeline, Verb

OF_VLLM = ("kv_cache_gib",)  # keys of the rollout role that only the vllm engine reads
OF_COMPLETIONS = ("completions_every", "completions_shown")  # of `logging`: only for what is sampled
OF_TOKENS = ("token_samples", "token_length", "token_steps")
OF_OPTIMIZER = tuple(OptimizerConfig.model_fields)
OF_UNTRAINED = {"steps", "epochs", "batch_size", "max_staleness", "token_budget", "deterministic"}  # read all the same
RANDOM = ("temperature", "top_p", "top_k", "min_p", "replay_routing", "replay_truncation")


def ineffective_keys(config: RunConfig, pipelines: Mapping[str, Pipeline], launched: Sequence[str]) -> list[str]:
    """One line per section of the configuration that has such keys."""
    found = [
        f"{', '.join(f'{where}.{name}={getattr(section, name)}' for name in names)}: {why}"
        for where, section, keys, why in _ineffective(config, pipelines, launched)
        if (names := changed(section, keys))
    ]
    kinds = {type(config.roles[role]) for role in launched if role in config.roles}
    if config.rewards and ScorersRole not in kinds:
        found.append("rewards: nothing is scored in this run: no phase generates, and none has evaluation.data")
    return found


def changed(section: BaseModel, keys: Collection[str]) -> list[str]:
    """Those of the keys whose values differ from their defaults."""
    fields = type(section).model_fields
    return [key for key in keys if getattr(section, key) != fields[key].get_default(call_default_factory=True)]


Ineffective = tuple[str, BaseModel, Collection[str], str]  # path, section, keys, why they have no effect


def _ineffective(
    config: RunConfig, pipelines: Mapping[str, Pipeline], launched: Sequence[str]
) -> Iterator[Ineffective]:
    for name, pipeline in pipelines.items():
        yield from _of_phase(f"phases.{name}", config, name, pipeline)
    yield from _of_roles(config, pipelines, launched)
    if not any(isinstance(config.roles.get(role), EngineRole) for role in launched):
        keys = tuple(type(config.weights).model_fields)
        yield "weights", config.weights, keys, "no rollout worker is launched that weights could be sent to"
        yield "logging", config.logging, (*OF_COMPLETIONS, *OF_TOKENS), "nothing is sampled in this run"
    else:
        yield from _of_weights(config)
    if config.logging.completions_every is None:
        yield "logging", config.logging, OF_TOKENS, "with logging.completions_every=None no samples are kept at all"
    elif config.logging.token_samples is None:
        yield "logging", config.logging, OF_TOKENS, "with logging.token_samples=None no tokens are kept"
    if config.model.dtype == "float32" and all(_of_float32(role) for _, role in config.roles):
        yield "model", config.model, ("lm_head_fp32",), "all of the model is computed in float32"
    if not any(isinstance(config.roles.get(r), RanksRole) and config.roles[r].gpus for r in launched):
        yield "cluster", config.cluster, ("gpu_memory_gib",), "no model is trained or asked on a GPU"
    if config.cluster.address:
        keys, why = ("num_cpus", "object_store_mib", "dashboard"), f"that at {config.cluster.address} has what it has"
        yield "cluster", config.cluster, keys, f"they are for a Ray of our own; {why}"


def _of_weights(config: RunConfig) -> Iterator[Ineffective]:
    weights = config.weights
    if config.model.lora is None:
        yield "weights", weights, ("lora",), "without model.lora there are no adapters"


def _of_roles(config: RunConfig, pipelines: Mapping[str, Pipeline], launched: Sequence[str]) -> Iterator[Ineffective]:
    usual = RolesConfig()  # pyright: ignore[reportCallIssue]
    named = {role for pipeline in pipelines.values() for role in pipeline.roles}
    trained = {role for pipeline in pipelines.values() for role in pipeline.trained}
    generates = [stage for pipeline in pipelines.values() for stage in pipeline.generates]
    mixing = {stage.role for stage in generates if "mixture" in stage.options}
    kept = {role for pipeline in pipelines.values() for role in pipeline.kept_of}
    companions = {companion for pipeline in pipelines.values() for companion in pipeline.companions.values()}
    for role, settings in config.roles:
        where = f"roles.{role}"
        if role not in launched:
            if role in companions or role in kept:
                # A companion's other keys are refused (`validation.py`). What a role computed in an earlier run is kept
                # because it had these keys, and they are used again when the cache is gone.
                continue
            keys = set(type(settings).model_fields) - {"kind", "optimizer"}
            if role in named:
                keys -= {"copies"}  # it decides which role stands in for it
            if role in usual:  # its defaults may differ from those of its kind
                keys = {key for key in keys if getattr(settings, key) != getattr(usual[role], key)}
            yield where, settings, sorted(keys), f"nothing in this run launches the role {role}"
        elif isinstance(settings, RanksRole) and settings.backend == "single":
            keys, why = ("deepspeed", "zero_stage"), f"{where}.backend=single does not read them"
            yield where, settings, keys, f"{why}; set {where}.backend=deepspeed, or leave them out"
        elif isinstance(settings, EngineRole) and settings.engine in ("hf", "scripted"):
            yield where, settings, OF_VLLM, f"the engine {settings.engine} has no such cache"
        if isinstance(settings, EngineRole) and settings.mixes is not None and role in launched and role not in mixing:
            yield (
                where,
                settings,
                ("mixes",),
                "no stage samples from a mixture there; its second model is idle",
            )
        if isinstance(settings, FrozenRole) and settings.model is not None and role in launched:
            yield where, settings, ("copies",), f"{where}.model={settings.model} is what it has"
        if isinstance(settings, TrainerRole) and role not in trained:
            yield f"{where}.optimizer", settings.optimizer, OF_OPTIMIZER, f"no phase trains the role {role}"


def _of_phase(where: str, config: RunConfig, name: str, pipeline: Pipeline) -> Iterator[Ineffective]:
    phase = config.phases[name]
    evaluated = phase.evaluation is not None and phase.evaluation.data is not None
    sampling = tuple(type(phase.sampling).model_fields)
    samples = any(stage.verb is Verb.GENERATE for stage in pipeline)
    if not samples and not evaluated:
        yield f"{where}.sampling", phase.sampling, sampling, f"{phase.method} samples nothing, and nothing is evaluated"
    elif not samples:
        yield f"{where}.sampling", phase.sampling, RANDOM, "only evaluation samples in this phase, and it is greedy"
        if phase.evaluation is not None and phase.evaluation.max_tokens is not None:
            why = f"{where}.evaluation.max_tokens={phase.evaluation.max_tokens} holds instead"
            yield f"{where}.sampling", phase.sampling, ("max_tokens",), why
    if phase.episode is not None and not samples and not evaluated:
        yield f"{where}", phase, ("episode",), f"{phase.method} samples nothing, and nothing is evaluated"
    if phase.evaluation is not None and not evaluated:
        why = "held-out rows are not answered; it is for evaluation.data"
        yield f"{where}.evaluation", phase.evaluation, ("max_tokens",), why
    if not pipeline.trained:
        keys, why = set(type(phase.train).model_fields) - OF_UNTRAINED, f"{phase.method} trains nothing"
        yield f"{where}.train", phase.train, sorted(keys), why
        yield f"{where}.sampling", phase.sampling, ("replay_routing", "replay_truncation"), why
    trained = [settings for role in pipeline.trained if isinstance(settings := config.roles.get(role), TrainerRole)]
    own = [key for key in OF_OPTIMIZER if trained and all(_says(each, key) for each in trained)]
    yield f"{where}.train", phase.train, own, "every role that the phase trains has one of its own, in its optimizer"
    if {each.optimizer.scheduler or phase.train.scheduler for each in trained} == {"constant"}:
        yield f"{where}.train", phase.train, ("min_lr_ratio",), "with scheduler=constant the rate does not fall"
    if "step_label" in pipeline.data.columns:
        yield f"{where}.data", phase.data, ("append_eos",), "an answer in labelled steps ends with their separator"
    if phase.data.mixture:
        yield f"{where}.data", phase.data, ("split",), "each entry of data.mixture has a split of its own"
    total = (phase.train.steps or 0) * pipeline.optimizer_steps_per_batch if pipeline.trained else 0
    if 0 < total <= phase.train.warmup_steps:
        why = f"the phase has {total} optimizer steps, so the learning rate never reaches {phase.train.learning_rate:g}"
        yield f"{where}.train", phase.train, ("warmup_steps",), why


def _of_float32(settings: object) -> bool:
    """Whether a role has no other dtype of its own."""
    return getattr(settings, "dtype", None) in (None, "float32")


def _says(settings: TrainerRole, key: str) -> bool:
    return getattr(settings.optimizer, key) is not None
