"""Policy-gradient losses: sampled tokens with advantages.

One loss, `policy_gradient`, in four steps: the importance ratio, a surrogate of (ratio, advantage), weights that
correct or mask tokens, and the KL term, to which these weights do not apply. Surrogates are in `surrogates.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from actors.imports import torch
from actors.objective import Stat, World
from orchestrator.losses.declare import Loss, couples, is_on, reads
from orchestrator.losses.surrogates import LARGEST_LOG, Surrogate
from orchestrator.losses.views import PolicyTokens, Tokens, joined, require

if TYPE_CHECKING:
    from torch import Tensor

Level = Literal["token", "sequence", "sequence_token"]
RatioLevel = Level | Literal["sequence_product"]
KlEstimator = Literal["k1", "k2", "k3"]
Old = Literal["current", "recorded", "sampler"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def _below_one(value: float) -> bool:
    return value < 1


def _is_set(value: float | None) -> bool:
    return value is not None


def threshold_of_entropy(
    views: list[Tokens], world: World, state: dict[str, Any], *, top_entropy_quantile: float
) -> dict[str, Tensor]:
    """`entropy_threshold`: the entropy that a fraction `top_entropy_quantile` of all masked tokens reaches, over
    micro-batches and ranks. `entropy_share`: the fraction that does, which is larger if several tokens have exactly
    that entropy."""
    local = joined([require(view.entropy)[view.mask] for view in views])
    everywhere = world.gather(local)
    if not len(everywhere):
        return {name: local.new_zeros(()) for name in ("entropy_threshold", "entropy_share")}
    threshold = _quantile(everywhere, 1 - top_entropy_quantile)
    return {"entropy_threshold": threshold, "entropy_share": (everywhere >= threshold).to(local.dtype).mean()}


@reads("old_logps", old="recorded")
@reads("sample_logps", old="sampler")
@reads("sample_logps", correction=is_on)
@reads("sample_logps", off_policy_mask_threshold=_is_set)
@reads("ref_logps", beta=is_on)
@reads("entropy", top_entropy_quantile=_below_one)
@reads("entropy", token_metrics=is_on)
@couples(threshold_of_entropy, top_entropy_quantile=_below_one)
def policy_gradient(
    tokens: PolicyTokens,
    *,
    surrogate: Surrogate,
    level: RatioLevel = "token",
    old: Old = "current",
    correction: Correction = "none",
    correction_min: float | None = None,
    correction_max: float = 3.0,
    off_policy_mask_threshold: float | None = None,
    top_entropy_quantile: float = 1.0,
    beta: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    use_bias_correction_kl: bool = True,
    token_metrics: bool = False,
) -> Loss:
    """[T]: `w_t surrogate(ρ_t, A_t) + β KL_t`, where `w` holds masks and corrections, all without gradient.

    `level`: one ratio per token, or the geometric mean over the row (arXiv:2507.18071, eq. 7), or that with each
    token's own gradient (GSPO-token), or the product over the row: the ratio of the whole completion. `old`: what the
    ratio is taken against; `current` means that the batch is used for one update, so that the ratio is 1 and carries
    only the gradient.
    Source: arXiv:2402.03300, eq. 3.
    """
    old_logps = _old_logps(tokens, old)
    log_ratio = _log_ratio(tokens, old_logps, level)
    values, clips = surrogate(tokens, log_ratio)
    metrics = {f"clip_ratio/{name}_mean": tokens.token_stat(flag) for name, flag in clips.items()}
    if off_policy_mask_threshold is not None:
        values = torch.where(_near_sampler(tokens, off_policy_mask_threshold), values, 0)
    if top_entropy_quantile < 1:
        values = torch.where(_uncertain(tokens), values, 0)
    if correction != "none":
        weight, found = engine_correction(tokens, old_logps, correction, correction_min, correction_max)
        values, metrics = values * weight, metrics | found
    if beta:
        kl = kl_of_samples(tokens.logps, require(tokens.ref_logps), kl_estimator)
        values = values + beta * (kl * log_ratio.exp() if use_bias_correction_kl else kl)
        metrics["kl"] = tokens.token_stat(kl)
    if token_metrics:
        metrics["entropy"] = tokens.token_stat(require(tokens.entropy))
    return values, metrics


@reads("entropy", "entropy_grad")
@couples(threshold_of_entropy, top_entropy_quantile=_below_one)
def entropy_bonus(tokens: Tokens, *, top_entropy_quantile: float = 1.0) -> Loss:
    """[T]: minus the entropy of each token's distribution, with gradient. Source: arXiv:2505.22312.

    With `top_entropy_quantile`, only for the tokens whose policy loss is kept, divided by their fraction of all masked
    tokens: the mean over all tokens is then the mean over these."""
    entropy = require(tokens.entropy)
    values = -entropy
    if top_entropy_quantile < 1:
        values = torch.where(_uncertain(tokens), values / tokens.shared["entropy_share"], 0)
    return values, {"entropy": tokens.token_stat(entropy)}


def adapted_entropy_coefficient(
    views: list[Tokens],
    world: World,
    state: dict[str, Any],
    *,
    top_entropy_quantile: float,
    coefficient: float,
    target: float,
    delta: float,
    lowest: float,
    highest: float,
) -> dict[str, Tensor]:
    """`entropy_coef`: c where this step's mean entropy is at most the target, else 0. Then c moves by `delta`, up from
    an entropy at or below the target and down from one above it, within its bounds; it begins at `coefficient`, and is
    kept in `state`. With `top_entropy_quantile`, entropies are those of the tokens that it leaves."""
    found: dict[str, Tensor] = {}
    if top_entropy_quantile < 1:
        found = threshold_of_entropy(views, world, state, top_entropy_quantile=top_entropy_quantile)
    entropies = joined([require(view.entropy)[view.mask] for view in views])
    if found:
        entropies = entropies[entropies >= found["entropy_threshold"]]
    total, count = world.sum(torch.stack([entropies.sum(), entropies.new_tensor(float(len(entropies)))])).tolist()
    is_low = total <= target * count
    now = float(state.get("coefficient", coefficient))
    state["coefficient"] = min(max(now + (delta if is_low else -delta), lowest), highest)
    return {**found, "entropy_coef": entropies.new_tensor(now if is_low else 0.0)}


@reads("entropy", "entropy_grad")
@couples(adapted_entropy_coefficient)
def adaptive_entropy_bonus(
    tokens: Tokens,
    *,
    coefficient: float,
    target: float,
    delta: float,
    lowest: float,
    highest: float,
    top_entropy_quantile: float = 1.0,
) -> Loss:
    """[T]: `entropy_bonus` times a coefficient that adapts, and is 0 in steps with a mean entropy above `target` nats
    (`adapted_entropy_coefficient`). Source: arXiv:2505.22312 (adaptive entropy control).

    Departure from TRL, which compares the entropy of the step before: this one's is known before its gradient."""
    values, metrics = entropy_bonus(tokens, top_entropy_quantile=top_entropy_quantile)
    now = tokens.shared["entropy_coef"]
    return values * now, {**metrics, "entropy_coef": Stat(now)}


def kl_of_samples(logps: Tensor, ref_logps: Tensor, estimator: KlEstimator = "k3") -> Tensor:
    """[T]: an estimate of KL(π‖ref) from samples of π. Differences are clamped to ±`LARGEST_LOG` nats; beyond that
    there is no gradient.

    `k1`: `lp - ref`, unbiased; its own gradient has mean 0, so it needs the ratio as a factor.
    `k2`: `(lp - ref)² / 2`, never negative; on fresh samples its own gradient is that of the divergence
    (arXiv:2510.01555).
    `k3`: `e^(ref - lp) - (ref - lp) - 1`, unbiased and never negative; multiplied by the ratio, its gradient is
    unbiased, too (arXiv:2512.02556, section 3.1).
    Source: http://joschu.net/blog/kl-approx.html; k3: arXiv:2402.03300, eq. 4.
    """
    difference = (ref_logps - logps).clamp(-LARGEST_LOG, LARGEST_LOG)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(difference) - difference


def engine_correction(
    tokens: PolicyTokens, old_logps: Tensor, mode: Correction, lowest: float | None, highest: float
) -> tuple[Tensor, dict[str, Stat]]:
    """[T]: importance weight π_old / sampler, for engines that compute other probabilities or hold older weights.

    `token_*`: per token; `sequence_*`: the row's product at each of its tokens. `*_truncate` clamps to
    [lowest, highest], `*_mask` sets weights outside to 0. Where the sampler's log-probability is not finite, it is 1.
    """
    known = tokens.mask & require(tokens.sample_logps).isfinite()
    difference = torch.where(known, old_logps.detach() - require(tokens.sample_logps), 0)
    per_row = tokens.micro.per_token(tokens.row_sums(difference))
    ratio = (difference if mode.startswith("token") else per_row).clamp(max=LARGEST_LOG).exp()
    low = 0.0 if lowest is None else lowest
    within = (ratio >= low) & (ratio <= highest)
    weight = ratio.clamp(low, highest) if mode.endswith("truncate") else torch.where(within, ratio, 0)
    largest = torch.where(tokens.mask, difference.abs(), 0).amax() if len(difference) else 0.0
    return weight, {
        "sampling/sampling_logp_difference/mean": tokens.token_stat(difference.abs()),
        "sampling/sampling_logp_difference/max": Stat(largest, combine="max"),
        "sampling/importance_sampling_ratio/mean": tokens.token_stat(weight),
    }


def _old_logps(tokens: PolicyTokens, old: Old) -> Tensor:
    """[T]; the current ones where the sampler reported none, so that the ratio is 1 there and has a gradient."""
    current = tokens.logps.detach()
    if old == "current":
        return current
    recorded = require(tokens.old_logps if old == "recorded" else tokens.sample_logps)
    return torch.where(recorded.isfinite(), recorded, current)


def _log_ratio(tokens: PolicyTokens, old_logps: Tensor, level: RatioLevel) -> Tensor:
    """[T]. Bounded, because `e^89` overflows and an infinite ratio times an advantage or gradient of 0 is not a number;
    beyond the bounds, which are far outside every clip and cap, there is no gradient."""
    difference = (tokens.logps - old_logps).clamp(-LARGEST_LOG, LARGEST_LOG)
    log_ratio = torch.where(tokens.mask, difference, 0)
    if level == "token":
        return log_ratio
    if level == "sequence_product":
        return tokens.micro.per_token(tokens.row_sums(log_ratio).clamp(-LARGEST_LOG, LARGEST_LOG))
    of_row = tokens.micro.per_token(tokens.row_means(log_ratio))
    return of_row if level == "sequence" else of_row.detach() + log_ratio - log_ratio.detach()


def _uncertain(tokens: Tokens) -> Tensor:
    """[T] bool: the tokens whose entropy reaches the step's threshold."""
    return require(tokens.entropy) >= tokens.shared["entropy_threshold"]


def _near_sampler(tokens: PolicyTokens, threshold: float) -> Tensor:
    """[T] bool: false for rows with a negative advantage whose mean log-ratio of sampler to policy exceeds `threshold`
    nats per token.

    Source: arXiv:2512.02556, section 3.1."""
    drift = torch.nan_to_num(require(tokens.sample_logps) - tokens.logps.detach(), nan=0.0)
    return tokens.micro.per_token(tokens.row_means(drift) <= threshold) | (tokens.advantages >= 0)


def _quantile(values: Tensor, share: float) -> Tensor:
    """Linear interpolation between order statistics. torch.quantile refuses more than 2^24 values."""
    ordered = values.sort().values
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below].lerp(ordered[above], position - below)
