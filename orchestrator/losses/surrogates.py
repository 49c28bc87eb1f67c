"""Surrogates of policy-gradient losses: small functions of the log-ratio and the advantage of each token.

`surrogate(tokens, log_ratio, **options) -> ([T] values, {name: [T] flags})`; `policy_gradient` averages the flags into
`clip_ratio/<name>_mean`. `log_ratio` carries the gradient, is per token or per sequence as the option `level` says, and
lies within ±`LARGEST_LOG`. Letters: ρ ratio, A advantage, lp log-probability, sg stop-gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from actors.imports import torch
from orchestrator.losses.views import PolicyTokens

if TYPE_CHECKING:
    from torch import Tensor

Surrogate = Callable[[PolicyTokens, "Tensor"], tuple["Tensor", dict[str, "Tensor"]]]
Distance = Literal["binary_tv", "binary_kl"]

SMALLEST_LOG = -18.420680743952367  # log 1e-8
LARGEST_LOG = 20.0  # of a ratio: far beyond every clip, and sums of its exponential over a batch are finite


def clipped(
    tokens: PolicyTokens,
    log_ratio: Tensor,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`-min(min(ρ, δ) A, clip(ρ, 1-ε, 1+ε_high) A)`. `delta` bounds the unclipped branch, which A < 0 leaves unbounded.

    Source: arXiv:1707.06347, eq. 7; ε_high: arXiv:2503.14476, eq. 10; δ: arXiv:2505.07291.
    Departure from TRL: clip metrics use ρ before δ caps it, so that they count all clipped tokens.
    """
    ratio, advantages = log_ratio.exp(), tokens.advantages
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    free = ratio if delta is None else ratio.clamp(max=delta)
    values = -torch.minimum(free * advantages, ratio.clamp(low, high) * advantages)
    is_low = (ratio < low) & (advantages < 0)
    is_high = (ratio > high) & (advantages > 0)
    return values, {"low": is_low, "high": is_high, "region": is_low | is_high}


def capped(tokens: PolicyTokens, log_ratio: Tensor, *, cap: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`-sg(min(ρ, cap)) A lp`: clips the weight, so that every token keeps its gradient (CISPO).

    Source: arXiv:2506.13585, eq. 4 and 5, without its lower bound, as in the paper's experiments."""
    ratio = log_ratio.detach().exp()
    is_high = (ratio > cap) & (tokens.advantages > 0)
    return -ratio.clamp(max=cap) * tokens.advantages * tokens.logps, {"high": is_high}


def soft_gated(
    tokens: PolicyTokens, log_ratio: Tensor, *, temperature_pos: float = 1.0, temperature_neg: float = 1.05
) -> tuple[Tensor, dict[str, Tensor]]:
    """`-(4/τ) σ(τ(ρ-1)) A`, τ by the sign of A: a gate instead of a clip (SAPO). Source: arXiv:2511.20347."""
    temperature = torch.where(tokens.advantages > 0, temperature_pos, temperature_neg)
    gate = torch.sigmoid(temperature * (log_ratio.exp() - 1)) * 4 / temperature
    return -gate * tokens.advantages, {}


def geometric(
    tokens: PolicyTokens, log_ratio: Tensor, *, epsilon: float, epsilon_high: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`-A exp(mean over the row of log ρ)`, log ρ bounded on the side to which A pushes it (GMPO).

    Source: arXiv:2507.20673; ε bounds log ρ, not ρ."""
    high = epsilon if epsilon_high is None else epsilon_high
    upward = tokens.advantages > 0
    bounded = torch.where(upward, log_ratio.clamp(max=high), log_ratio.clamp(min=-epsilon))
    coefficient = tokens.micro.per_token(tokens.row_means(bounded)).exp()
    return -coefficient * tokens.advantages, {"region": bounded != log_ratio}


def smooth_weighted(
    tokens: PolicyTokens,
    log_ratio: Tensor,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`-φ A lp`, `φ = sg(Ω^k e^{λ(1-Ω)})` of the row's whole ratio Ω, k and λ by the sign of A (VESPO).

    The ratio should be taken against the sampler: nothing else corrects for the engine and for staleness.
    """
    summed = tokens.row_sums(log_ratio.detach().clamp(-LARGEST_LOG, LARGEST_LOG)).clamp(SMALLEST_LOG, LARGEST_LOG)
    log_omega = tokens.micro.per_token(summed)
    upward = tokens.advantages >= 0
    k, lam = torch.where(upward, k_pos, k_neg), torch.where(upward, lambda_pos, lambda_neg)
    weight = torch.nan_to_num((lam + k * log_omega - lam * log_omega.exp()).exp(), nan=0.0, posinf=0.0)
    return -weight * tokens.advantages * tokens.logps, {}


def trust_region(
    tokens: PolicyTokens, log_ratio: Tensor, *, distance: Distance, threshold: float, ratio_cap: float = 20.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """`-sg(min(ρ, cap)) A lp`, but 0 for tokens that differ from the sampler by more than `threshold` and that A would
    move further away (DPPO). `distance` is that of two Bernoulli distributions with the token's probabilities: total
    variation or KL."""
    ratio = log_ratio.detach().exp()
    logps = tokens.logps.detach()
    leaves = ((tokens.advantages > 0) & (ratio > 1)) | ((tokens.advantages < 0) & (ratio < 1))
    outside = leaves & (_coin_distance(distance, (logps - log_ratio.detach()).exp(), logps.exp()) > threshold)
    values = -ratio.clamp(max=ratio_cap) * tokens.advantages * tokens.logps
    return torch.where(outside, 0, values), {"region": outside}


def _coin_distance(distance: Distance, sampler: Tensor, policy: Tensor) -> Tensor:
    if distance == "binary_tv":
        return (sampler - policy).abs()
    tiny = torch.finfo(policy.dtype).eps
    p, q = sampler.clamp(tiny, 1 - tiny), policy.clamp(tiny, 1 - tiny)
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
