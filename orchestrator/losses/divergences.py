"""f-divergences for preference losses: `x(u) = f'(π/ref)`, u the log-ratio, up to a constant that cancels in a pair.

Source: arXiv:2309.16240.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from actors.imports import F, torch

if TYPE_CHECKING:
    from torch import Tensor


Divergence = Callable[["Tensor"], "Tensor"]
DivergenceName = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

LARGEST_EXPONENT = 40.0  # e^40 and its square, which `ipo` takes, are finite in float32; nothing here is float16


def reverse_kl(log_ratio: Tensor) -> Tensor:
    """`u`: plain DPO."""
    return log_ratio


def forward_kl(log_ratio: Tensor) -> Tensor:
    """`1 - e^{-u}`."""
    return -torch.expm1((-log_ratio).clamp(max=LARGEST_EXPONENT))


def js_divergence(log_ratio: Tensor) -> Tensor:
    """`log 2 + log σ(u)`."""
    return 0.6931471805599453 + F.logsigmoid(log_ratio)


def alpha_divergence(log_ratio: Tensor, *, coefficient: float) -> Tensor:
    """`(e^{(α-1)u} - 1) / (α-1)`, which tends to `u` as α tends to 1."""
    power = coefficient - 1
    if abs(power) < 1e-6:
        return log_ratio
    return torch.expm1((power * log_ratio).clamp(max=LARGEST_EXPONENT)) / power


def divergence(name: DivergenceName, coefficient: float) -> Divergence:
    """A divergence by name; `coefficient` is alpha's."""
    return {
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "js_divergence": js_divergence,
        "alpha_divergence": partial(alpha_divergence, coefficient=coefficient),
    }[name]
