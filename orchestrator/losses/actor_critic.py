"""Losses of an actor and its critic: sampled tokens with the advantages and returns of a value role.

The two are terms of different roles, each with its own model and optimizer, so no coefficient weighs one against the
other: the value role's learning rate is its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.imports import torch
from orchestrator.losses.declare import Loss, is_on, reads
from orchestrator.losses.surrogates import LARGEST_LOG, clipped
from orchestrator.losses.views import PolicyTokens, Scalars, require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Values(Scalars):
    """Trained tokens with the current and the old value of their state, and its return."""

    values: Tensor  # [T], before this batch's updates
    returns: Tensor  # [T]


@reads("old_logps")
@reads("entropy", token_metrics=is_on)
def clipped_policy(tokens: PolicyTokens, *, cliprange: float = 0.2, token_metrics: bool = False) -> Loss:
    """[T]: `max(-A ρ, -A clip(ρ, 1±ε))`, ρ the token's ratio to the policy before this batch's updates.

    Source: arXiv:1707.06347, eq. 7."""
    difference = (tokens.logps - require(tokens.old_logps)).clamp(-LARGEST_LOG, LARGEST_LOG)
    log_ratio = torch.where(tokens.mask, difference, 0)
    values, clips = clipped(tokens, log_ratio, epsilon=cliprange)
    metrics = {
        "policy/clipfrac_avg": tokens.token_stat(clips["region"]),
        "policy/approxkl_avg": tokens.token_stat(log_ratio.square() / 2),
        "policy/ratio_avg": tokens.token_stat(log_ratio.exp()),
    }
    if token_metrics:
        metrics["policy/entropy_avg"] = tokens.token_stat(require(tokens.entropy))
    return values, metrics


def clipped_value(tokens: Values, *, cliprange_value: float | None = 0.2) -> Loss:
    """[T]: `½ max((v - R)², (clip(v, V±ε) - R)²)`, V the value before this batch's updates; without ε `½ (v - R)²`.

    Source: arXiv:2005.12729, section 3 (value function clipping), after OpenAI Baselines."""
    free = (tokens.scalars - tokens.returns).square()
    metrics = {"val/error": tokens.token_stat(free)}
    if cliprange_value is None:
        return free / 2, metrics
    near = tokens.values + (tokens.scalars - tokens.values).clamp(-cliprange_value, cliprange_value)
    held = (near - tokens.returns).square()
    return torch.maximum(free, held) / 2, {**metrics, "val/clipfrac_avg": tokens.token_stat(held > free)}
