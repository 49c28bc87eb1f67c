"""Roles and their devices: which take turns because they share one, and how weights get from one to another. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.config.roles import EngineRole, UserCodeRole
from orchestrator.config.schema import RunConfig

BUCKET_MIB = {"cpu": 16.0, "gpu": 256.0}  # a GPU takes as long to be given work as to move some MiB


def taking_turns(config: RunConfig, launched: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Sets of roles of which one is awake at a time: a host and those that are colocated with it. Not pools that run
    users' code, which cannot give memory back; and not engines if a phase samples ahead of training (`max_staleness`),
    which is to sample while a role is trained."""
    ahead = any(phase.train.max_staleness for phase in config.phases.values())
    able = [
        role
        for role in launched
        if role in config.roles
        and not isinstance(config.roles[role], UserCodeRole)
        and not (ahead and isinstance(config.roles[role], EngineRole))
    ]
    sets = [(host, *(role for role in able if role != host and config.roles[role].colocate == host)) for host in able]
    return tuple(roles for roles in sets if len(roles) > 1)


def take_turns(turns: Sequence[Sequence[str]], role: str, other: str) -> bool:
    """Whether one of two roles sleeps while the other works."""
    return any(role in roles and other in roles for roles in turns)


def transport_between(config: RunConfig, turns: Sequence[Sequence[str]], source: str, engine: str) -> str:
    """How weights travel. What is sent when the engine is asleep must wait for it on the host."""
    if config.weights.transport is not None:
        return config.weights.transport
    return "object_store" if take_turns(turns, source, engine) else "collective"


def bucket_bytes_between(config: RunConfig, source: str, engine: str) -> int:
    """How much is sent at a time. Each process has room for two of these."""
    both = all(getattr(config.roles[role], "gpus", 0) for role in (source, engine))
    return int((config.weights.bucket_mib or BUCKET_MIB["gpu" if both else "cpu"]) * 2**20)
