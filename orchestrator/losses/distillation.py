"""Distillation: train a student to match a teacher's distribution at every token.

What compares two distributions is given logits [n, V] of a chunk of tokens at a time (`actors/distributions.py`); the
losses see the result, one number per token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from actors.imports import torch
from actors.objective import Stat
from orchestrator.losses.declare import Loss, compares, is_on, reads
from orchestrator.losses.views import Distilled, Taught, require

if TYPE_CHECKING:
    from torch import Tensor

TEACHER_TOP_K = ("teacher_topk_ids", "teacher_topk_logps", "teacher_tail_logps")


def jensen_shannon(logits: Tensor, teacher_logits: Tensor, *, beta: float, temperature: float = 1.0) -> Tensor:
    """[n], nats: the generalised Jensen-Shannon divergence of softmaxes at a temperature.

    `beta=0` is KL(teacher || student), `beta=1` KL(student || teacher), and between them both are compared with their
    mixture `(1 - beta) student + beta teacher`. Source: arXiv:2306.13649, eq. 1 and section 3.
    """
    scale = 1 / temperature
    return _divergence(
        torch.log_softmax(logits * scale, dim=-1), torch.log_softmax(teacher_logits * scale, dim=-1), beta
    )


def top_k_jensen_shannon(
    logits: Tensor,
    topk_ids: Tensor,
    topk_logps: Tensor,
    tail_logps: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    weights: tuple[float, ...] = (1.0,),
) -> Tensor:
    """[n], nats: `jensen_shannon` where the teacher is known by its k most likely tokens: `topk_ids` [n, k], their
    log-probabilities at that temperature [n, k], and the log-probability of all other tokens together [n, 1]. Of m
    teachers, [n, m k] and [n, m], one after the other: the sum of their divergences with these `weights`.

    Both distributions are over k + 1 outcomes, the last one being any other token, so the result is never negative, at
    most the divergence of the whole distributions, and equal to it if k is all tokens. Leaving the tail out would make
    it the difference of two sums that are not 1, which has no lower bound. The student's tokens that a teacher with a
    tail of 0 does not have are in neither distribution.
    """
    scaled, several = logits / temperature, len(weights)
    ids, logps, tails = (each.chunk(several, dim=1) for each in (topk_ids.long(), topk_logps, tail_logps))
    return sum(
        (weights[at] * of_k_and_the_rest(scaled, ids[at], logps[at], tails[at], beta) for at in range(several)),
        logits.new_zeros(()),
    )


def of_k_and_the_rest(scaled: Tensor, ids: Tensor, logps: Tensor, tail_logps: Tensor, beta: float) -> Tensor:
    """[n]: the divergence of distributions over k + 1 outcomes. `tail_logps` [n, 1]."""
    nothing = torch.finfo(scaled.dtype).min  # not -inf: 0 x -inf is no number
    tail = scaled.scatter(1, ids, nothing).logsumexp(-1, keepdim=True).masked_fill(tail_logps.isneginf(), nothing)
    student = torch.log_softmax(torch.cat([scaled.gather(1, ids), tail], dim=1), dim=-1)
    return _divergence(student, torch.cat([logps, tail_logps], dim=1).clamp(min=nothing), beta)


def _divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return kl_divergence(teacher, student)
    if beta == 1:
        return kl_divergence(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)


def kl_divergence(of: Tensor, to: Tensor) -> Tensor:
    """[n, V], [n, V] -> [n]: of two log-softmaxes."""
    return (of.exp() * (of - to)).sum(-1)


@reads("entropy", token_metrics=is_on)
@compares(jensen_shannon, companion=True)
def distil(
    tokens: Distilled, *, beta: float = 0.5, temperature: float | None = 1.0, token_metrics: bool = False
) -> Loss:
    """[T]: `jensen_shannon` of the student and the teacher that lives beside it.

    Source: arXiv:2306.13649, eq. 2.
    """
    return tokens.divergence, _metrics(tokens, token_metrics)


@reads("entropy", token_metrics=is_on)
@compares(top_k_jensen_shannon, *TEACHER_TOP_K)
def distil_top_k(
    tokens: Distilled,
    *,
    beta: float = 0.5,
    temperature: float | None = 1.0,
    weights: tuple[float, ...] = (1.0,),
    token_metrics: bool = False,
) -> Loss:
    """[T]: `top_k_jensen_shannon` of the student and teachers in other processes, which `infer` asked for their k most
    likely tokens at that temperature.

    Source: arXiv:2306.13649, eq. 2, of distributions over k + 1 outcomes.
    """
    return tokens.divergence, _metrics(tokens, token_metrics)


@reads("entropy", token_metrics=is_on)
@reads("sample_logps", importance_clip=is_on)
@compares(top_k_jensen_shannon, *TEACHER_TOP_K)
def distil_samples_top_k(
    tokens: Distilled,
    *,
    beta: float = 0.0,
    temperature: float | None = None,
    importance_clip: float | None = None,
    token_metrics: bool = False,
) -> Loss:
    """[T]: `ρ_t` times `top_k_jensen_shannon` of tokens that an earlier student may have sampled.

    Source: arXiv:2601.19897 and arXiv:2601.20802, of distributions over k + 1 outcomes."""
    weight = ratio_to_sampler(tokens, importance_clip)
    return weight * tokens.divergence, _metrics(tokens, token_metrics)


def ratio_to_sampler(tokens: Distilled | Taught, clip: float | None) -> Tensor:
    """[T], without gradient: the importance ratio of a sampled token, at most `clip`. 1 without a clip, and where its
    log-probability under the sampler is not known."""
    if clip is None:
        return torch.ones_like(tokens.logps)
    drift = torch.nan_to_num(tokens.logps.detach() - require(tokens.sample_logps), nan=0.0)
    return drift.exp().clamp(max=clip)


def _metrics(tokens: Distilled, token_metrics: bool) -> dict[str, Stat]:
    found = {"divergence": tokens.token_stat(tokens.divergence), "nll": tokens.token_stat(-tokens.logps)}
    return found | ({"entropy": tokens.token_stat(require(tokens.entropy))} if token_metrics else {})
