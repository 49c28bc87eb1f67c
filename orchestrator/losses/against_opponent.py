"""The loss of a game between the policy and an opponent that samples near it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.objective import Stat
from orchestrator.losses.declare import Loss, is_on, reads
from orchestrator.losses.views import Tokens, require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OpposedCompletions(Tokens):
    """Completions of the policy, each with the probability that it is preferred to its opponent's."""

    ref_logps: Tensor  # [T]
    preference: Tensor  # [B]
    truncated: Tensor  # [B] bool

    def row_stat(self, values: Tensor) -> Stat:
        """A metric that is the mean over rows, of all micro-batches and ranks."""
        return Stat(values.detach().sum(), len(values))


@reads("entropy", token_metrics=is_on)
def preferred_to_opponent(completions: OpposedCompletions, *, beta: float, token_metrics: bool = False) -> Loss:
    """[T]: `(β sg(log π - log ref) - (P - 1/2)) log π`. Summed over a row, its gradient is that of REINFORCE with the
    preference P as the reward, 1/2 as the baseline, and a penalty of β for each nat of KL to the reference.

    Source: arXiv:2312.00886 (Nash-MD-PG)."""
    logps = completions.logps
    log_ratios = (logps - completions.ref_logps).detach()
    preference = completions.preference.to(logps.dtype)
    values = (beta * log_ratios - completions.micro.per_token(preference - 0.5)) * logps
    kl = completions.row_sums(log_ratios)
    metrics = {
        "objective/preference": completions.row_stat(preference),
        "objective/kl": completions.row_stat(kl),
        "objective/entropy": completions.row_stat(-completions.row_sums(logps)),
        "objective/non_score_reward": completions.row_stat(-beta * kl),
        "val/contain_eos_token": completions.row_stat((~completions.truncated).to(logps.dtype)),
    }
    if token_metrics:
        metrics["entropy"] = completions.token_stat(require(completions.entropy))
    return values, metrics
