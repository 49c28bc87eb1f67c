"""Losses that fit a completion's log-ratio of policy to reference to what the completion is worth: to its reward, or to
how often it is preferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.objective import Stat
from orchestrator.losses.declare import Loss, is_on, reads
from orchestrator.losses.views import Tokens, require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ValuedCompletions(Tokens):
    """Completions with their reward, and the value of their prompt under the best policy near the reference."""

    ref_logps: Tensor  # [T]
    reward: Tensor  # [B]
    optimal_value: Tensor  # [B]

    def row_stat(self, values: Tensor) -> Stat:
        """A metric that is the mean over rows, of all micro-batches and ranks."""
        return Stat(values.detach().sum(), len(values))


@reads("entropy", token_metrics=is_on)
def optimal_advantage(completions: ValuedCompletions, *, beta: float, token_metrics: bool = False) -> Loss:
    """[T], the same at each token of a row: `(β u - (r - V*))²`, `u = log π(y) - log ref(y)` over the row's tokens. At
    its minimum the policy is the optimal one: `β u` is then the advantage.

    Source: arXiv:2505.20686 (A*-PO, stage 2)."""
    log_ratios = completions.row_sums(completions.logps - completions.ref_logps)
    reward, value = (each.to(log_ratios.dtype) for each in (completions.reward, completions.optimal_value))
    errors = beta * log_ratios - (reward - value)
    metrics = {
        "objective/kl": completions.row_stat(log_ratios),
        "objective/scores": completions.row_stat(reward),
        "objective/optimal_value": completions.row_stat(value),
        "objective/error": completions.row_stat(errors.abs()),
    }
    if token_metrics:
        metrics["entropy"] = completions.token_stat(require(completions.entropy))
    return completions.micro.per_token(errors.square()), metrics


@dataclass(frozen=True, kw_only=True)
class PreferredCompletions(Tokens):
    """Completions of the reference, each with the probability that it is preferred to another one of the prompt's."""

    ref_logps: Tensor  # [T]
    reward: Tensor  # [B]
    preference: Tensor  # [B]

    def row_stat(self, values: Tensor) -> Stat:
        """A metric that is the mean over rows, of all micro-batches and ranks."""
        return Stat(values.detach().sum(), len(values))


@reads("entropy", token_metrics=is_on)
def preference_beyond_half(completions: PreferredCompletions, *, beta: float, token_metrics: bool = False) -> Loss:
    """[T], the same at each token of a row: `(u - (P - 1/2)/β)²`, `u = log π(y) - log ref(y)` over the row's tokens.
    With P of 1 and 0 the sum over a pair is the loss `sppo_hard` of pairs.

    Source: arXiv:2405.00675 (SPPO), eq. 4.9, with η = 1/β."""
    log_ratios = completions.row_sums(completions.logps - completions.ref_logps)
    preference = completions.preference.to(log_ratios.dtype)
    errors = log_ratios - (preference - 0.5) / beta
    follows = (log_ratios * (preference - 0.5) > 0).to(log_ratios.dtype)
    metrics = {
        "objective/kl": completions.row_stat(log_ratios),
        "objective/scores": completions.row_stat(completions.reward.to(log_ratios.dtype)),
        "objective/preference": completions.row_stat(preference),
        "objective/error": completions.row_stat(beta * errors.abs()),
        "rewards/accuracies": completions.row_stat(follows),
    }
    if token_metrics:
        metrics["entropy"] = completions.token_stat(require(completions.entropy))
    return completions.micro.per_token(errors.square()), metrics
