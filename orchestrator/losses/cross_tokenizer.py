"""Distillation from a teacher with another vocabulary: by sorted probabilities, and by the tokens that both have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.imports import torch
from actors.objective import Stat
from orchestrator.losses.declare import Loss, compares
from orchestrator.losses.distillation import TEACHER_TOP_K, of_k_and_the_rest
from orchestrator.losses.views import Aligned

if TYPE_CHECKING:
    from torch import Tensor


def across_vocabularies(
    logits: Tensor,
    topk_ids: Tensor,
    topk_logps: Tensor,
    tail_logps: Tensor,
    *,
    beta: float = 0.5,
    temperature: float | None = 1.0,
    shared_weight: float = 0.0,
) -> Tensor:
    """[n]: `shared_weight` times `shared_jensen_shannon`, and the rest of 1 times `sorted_distance`. `topk_ids` [n, k]
    are the teacher's likeliest tokens as ours, -1 where we have none; `topk_logps` [n, k] are in descending order. Any
    number where they are NaN, which no loss is summed over."""
    scaled = logits / (temperature or 1.0)
    logps, tail = (each.nan_to_num(nan=0.0) for each in (topk_logps, tail_logps))
    distance = sorted_distance(scaled, logps, tail)
    if not shared_weight:
        return distance
    return shared_weight * shared_jensen_shannon(scaled, topk_ids, logps, tail, beta) + (1 - shared_weight) * distance


def sorted_distance(scaled: Tensor, topk_logps: Tensor, tail_logps: Tensor) -> Tensor:
    """[n]: `Σ_i |s_(i) - t_(i)|` of the k largest probabilities of both in descending order, and the difference of what
    is left of each. Which tokens they are of does not matter. At most what it is with all tokens, and equal to it if k
    is all of the larger vocabulary.

    Source: arXiv:2402.12030 (universal logit distillation)."""
    k = topk_logps.shape[1]
    largest = scaled.softmax(-1).topk(min(k, scaled.shape[1]), dim=-1).values
    largest = torch.nn.functional.pad(largest, (0, k - largest.shape[1]))
    left = (1 - largest.sum(-1)) - tail_logps.exp().squeeze(-1)
    return (largest - topk_logps.exp()).abs().sum(-1) + left.abs()


def shared_jensen_shannon(
    scaled: Tensor, topk_ids: Tensor, topk_logps: Tensor, tail_logps: Tensor, beta: float
) -> Tensor:
    """[n], nats: the generalised Jensen-Shannon divergence over those of the teacher's k tokens that both vocabularies
    have, and all others as one outcome."""
    nothing = torch.finfo(scaled.dtype).min
    foreign = topk_ids < 0
    ids = torch.where(foreign, scaled.shape[1], topk_ids.long())  # an entry of its own, with a probability of 0
    ours = torch.cat([scaled, scaled.new_full((len(scaled), 1), nothing)], dim=1)
    others = torch.cat([tail_logps, topk_logps.masked_fill(~foreign, -torch.inf)], dim=1)
    return of_k_and_the_rest(
        ours, ids, topk_logps.masked_fill(foreign, nothing), others.logsumexp(-1, keepdim=True), beta
    )


@compares(across_vocabularies, *TEACHER_TOP_K)
def distil_across(
    tokens: Aligned, *, beta: float = 0.5, temperature: float | None = None, shared_weight: float = 0.0
) -> Loss:
    """[T]: `across_vocabularies` at the tokens that are aligned with the teacher's own.

    Source: arXiv:2402.12030; the tokens that both have as in TRL's GOLD."""
    aligned = Stat(tokens.mask.sum(), tokens.micro["mask"].sum())
    found = {"divergence": tokens.token_stat(tokens.divergence), "nll": tokens.token_stat(-tokens.logps)}
    return tokens.divergence, {**found, "aligned_share": aligned}
