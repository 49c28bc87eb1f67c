"""The machine that processes without GPUs share, and what its processor is slow at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.roles import EngineRole, RanksRole
from orchestrator.config.schema import RunConfig

CPU_INFO = Path("/proc/cpuinfo")  # of Linux
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # of x86, and of ARM


@dataclass(frozen=True)
class Machine:
    """`bfloat16`: the processor has instructions for products in it, or nothing is known of it."""

    cores: int
    bfloat16: bool = True

    @classmethod
    def here(cls) -> Machine:
        about = CPU_INFO.read_text() if CPU_INFO.exists() else ""
        return cls(len(os.sched_getaffinity(0)), not about or not BFLOAT16_FLAGS.isdisjoint(about.split()))


def slow_types(config: RunConfig, roles: Sequence[str], machine: Machine) -> list[str]:
    """A warning if roles compute in bfloat16 on a processor that has to imitate it."""
    if machine.bfloat16:
        return []
    models = {role: each for role in roles if isinstance(each := config.roles[role], RanksRole | EngineRole)}
    slow = [role for role, each in models.items() if each.gpus == 0 and _dtype(config, each) == "bfloat16"]
    if not slow:
        return []
    return [
        f"{', '.join(slow)}: this processor has no instructions for bfloat16, and a product in it takes several times "
        "as long as in float32, one for a gradient up to 30 times; set model.dtype=float32"
    ]


def _dtype(config: RunConfig, settings: RanksRole | EngineRole) -> str:
    return settings.dtype or config.model.dtype
