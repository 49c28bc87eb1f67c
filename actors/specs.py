"""What a model worker is built from, apart from its model: adapters, optimizer and backend.

Their defaults are those of the configuration, too (`orchestrator/config/`), which reads them here without importing
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

BackendKind = Literal["single", "deepspeed"]
# What leaves a model: its weights with adapters merged, under the names of a saved folder or under those in memory,
# where some are fused; or the adapters alone, under the names of a PEFT folder.
WeightsForm = Literal["merged", "in_memory", "adapters"]
Scheduler = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class LoraSpec:
    """Settings of the adapters; only they are trained."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False


@dataclass(frozen=True)
class OptimSpec:
    """A phase's optimizer and schedule. `total_steps` is where a linear or cosine schedule ends."""

    learning_rate: float
    total_steps: int | None = None
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    scheduler: Scheduler = "linear"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    max_grad_norm: float | None = 1.0


@dataclass(frozen=True)
class BackendSpec:
    """Which backend, with what optimizer. `optim=None` is a frozen role; `deepspeed` is passed through to DeepSpeed."""

    kind: BackendKind = "single"
    optim: OptimSpec | None = None
    deepspeed: dict[str, Any] | None = None
    zero_stage: int = 2  # used where `deepspeed` does not say
    gpus: float = 0.0  # of this rank; 0: it computes on the CPU, whatever the machine has
    deterministic: bool = False  # the same inputs give the same bits on a GPU, too
