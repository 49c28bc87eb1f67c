"""What of a configuration decides which samples a phase collects, and what they are worth: a run that is resumed goes
on with samples of its checkpoint only if none of that has changed.

    phases.NAME.method, options, data ... ─┐
    rewards ───────────────────────────────┼──► key -> value, of the run before and of the one now ──► what differs
    roles that sample or score ────────────┘
       └─ and the roles whose weights those have
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from orchestrator.config.roles import EngineRole, FrozenRole
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline import Pipeline

# Keys of roles that decide where their processes run, how many there are and how long they may take. A key that is not
# among them changes samples or scores: groups are rather sampled again needlessly than trained on wrongly.
PLACES = frozenset({"gpus", "cpus", "threads", "memory_gib", "resources", "label_selector", "fallback_strategy"})
NUMBERS = frozenset({"ranks", "workers", "autoscale", "backend", "zero_stage", "tensor_parallel", "colocate"})
LIMITS = frozenset(
    {"concurrency", "max_concurrency", "kv_cache_gib", "timeout_s", "call_timeout_s", "start_timeout_s"}
    | {"request_timeout_s", "ping_timeout_s", "max_attempts", "max_restarts", "on_failure"}
)
TRAINING = frozenset({"optimizer"})
OTHERWISE_THE_SAME = PLACES | NUMBERS | LIMITS | TRAINING

Values = Mapping[str, Any]  # by key, as JSON


def scored_by(config: RunConfig, phase: str) -> Values:
    """What decides the reward of a sample."""
    settings = config.phases[phase]
    roles = [role for reward in config.rewards for role in reward.roles]
    if settings.environments is not None:
        roles.append(settings.environments)
    rewards = {"rewards": [reward.model_dump(mode="json") for reward in config.rewards]}
    return {**rewards, **_of_phase(config, phase, ("episode",)), **_of_roles(config, roles)}


def collected_by(config: RunConfig, phase: str, pipeline: Pipeline) -> Values:
    """What decides which groups are collected, and what they are worth; `pipeline`: of the phase."""
    keys = ("method", "options", "rename_roles", "data", "sampling")
    roles = (stage.role for stage in pipeline.group_stages)
    sent = {"weights.dtype": config.weights.dtype, "model.lm_head_fp32": config.model.lm_head_fp32}
    return {**_of_phase(config, phase, keys), **sent, **_of_roles(config, roles), **scored_by(config, phase)}


def differing(before: Values, now: Values) -> list[str]:
    """The keys that do not have the same value in both."""
    return [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]


def _of_phase(config: RunConfig, phase: str, keys: Iterable[str]) -> Values:
    found = config.phases[phase].model_dump(mode="json", include=set(keys))
    return {f"phases.{phase}.{key}": value for key, value in found.items()}


def _of_roles(config: RunConfig, roles: Iterable[str]) -> Values:
    """Of these roles, and of those whose weights they have."""
    found: dict[str, Any] = {}
    for role in dict.fromkeys(name for asked in roles for name in _with_sources(config, asked)):
        settings = config.roles.get(role)
        values: dict[str, Any] = {} if settings is None else settings.model_dump(mode="json")
        found |= {f"roles.{role}.{key}": value for key, value in values.items() if key not in OTHERWISE_THE_SAME}
    return found


def _with_sources(config: RunConfig, role: str) -> Iterator[str]:
    yield role
    settings = config.roles.get(role)
    if isinstance(settings, EngineRole):
        for source in (settings.follows, settings.mixes):
            if source is not None:
                yield from _with_sources(config, source)
    elif isinstance(settings, FrozenRole) and settings.model is None:
        yield settings.copies
