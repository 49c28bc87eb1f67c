"""The preference loss over pairs that the policy sampled: as for given pairs, with more metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.imports import torch
from actors.objective import Stat
from orchestrator.losses.declare import Loss, is_on, reads
from orchestrator.losses.pairwise import Contrast, against_reference
from orchestrator.losses.views import PairsOfTwoSamplers, SampledPairs

if TYPE_CHECKING:
    from torch import Tensor


@reads("entropy", "mean_logits", "is_top1", token_metrics=is_on)
def against_reference_of_samples(
    pairs: SampledPairs, *, contrast: Contrast, beta: float, token_metrics: bool = False
) -> Loss:
    """[P]: `against_reference`, with metrics of the objective `reward - β KL`."""
    values, metrics = against_reference(pairs, contrast=contrast, beta=beta, token_metrics=token_metrics)
    return values, metrics | objective_metrics(pairs, beta)


@reads("entropy", "mean_logits", "is_top1", token_metrics=is_on)
def with_exploration_bonus(
    pairs: PairsOfTwoSamplers, *, contrast: Contrast, beta: float, alpha: float, token_metrics: bool = False
) -> Loss:
    """[P]: `against_reference_of_samples + α log π(y)`, y the pair's sample from the reference: the policy is drawn
    away from what the reference says anyway.

    Source: arXiv:2405.21046, algorithm 1."""
    values, metrics = against_reference_of_samples(pairs, contrast=contrast, beta=beta, token_metrics=token_metrics)
    from_reference = torch.where(pairs.is_reference, pairs.row_sums(pairs.logps), 0)
    bonus = sum(pairs.split(from_reference))
    rewards = pairs.reward.to(pairs.logps.dtype)
    of_policy, of_reference = (torch.where(rows, rewards, 0) for rows in (~pairs.is_reference, pairs.is_reference))
    return values + alpha * bonus, metrics | {
        "objective/model_scores": Stat(of_policy.sum(), (~pairs.is_reference).sum()),
        "objective/ref_scores": Stat(of_reference.sum(), pairs.is_reference.sum()),
    }


def objective_metrics(pairs: SampledPairs, beta: float) -> dict[str, Stat]:
    """Means over the rows of all pairs. KL and entropy are estimated from the sampled tokens and summed over a row, in
    nats."""
    rewards = pairs.reward.to(pairs.logps.dtype)
    kl = pairs.row_sums(pairs.logps - pairs.ref_logps).detach()
    chosen, rejected = pairs.split(rewards)
    return {
        "objective/kl": _row_stat(kl),
        "objective/entropy": _row_stat(-pairs.row_sums(pairs.logps)),
        "objective/non_score_reward": _row_stat(-beta * kl),
        "objective/rlhf_reward": _row_stat(rewards - beta * kl),
        "objective/scores": _row_stat(rewards),
        "objective/scores_margin": pairs.pair_stat(chosen - rejected),
        "val/contain_eos_token": _row_stat((~pairs.truncated).to(rewards.dtype)),
        "beta": pairs.pair_stat(torch.full_like(chosen, beta)),
    }


def _row_stat(values: Tensor) -> Stat:
    return Stat(values.detach().sum(), len(values))
