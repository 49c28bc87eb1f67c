"""Distillation by sampled tokens: what a teacher finds of each token that the student sampled, as its advantage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.imports import torch
from actors.objective import MicroBatch, Stat
from orchestrator.losses.declare import Loss, compares, is_on, reads
from orchestrator.losses.distillation import kl_divergence, ratio_to_sampler
from orchestrator.losses.views import Distilled, Taught, Tokens

if TYPE_CHECKING:
    from torch import Tensor


def importance_weighted(tokens: Taught, *, gamma: float = 0.5) -> Loss:
    """[T]: `-w_t a_t log π(y_t)`, where `a_t = log p(y_t) - log π(y_t)`, p the teacher, and `w_t = 1 + γ (1 - Σ_{k<t}
    |a_k| / Σ_k |a_k|)` are without gradient: a token weighs the less, the more of the row's whole discrepancy from the
    teacher lies before it.

    Source: arXiv:2606.22600, algorithm 1.
    """
    advantage = torch.where(tokens.mask, tokens.teacher_logps - tokens.logps, 0).detach()
    drift = advantage.abs()
    whole = tokens.micro.per_token(tokens.row_sums(drift))
    before = whole - discounted_sums(drift, 1.0, tokens.micro)
    weight = 1 + gamma * (1 - before / whole.clamp(min=torch.finfo(whole.dtype).tiny))
    return -weight * advantage * tokens.logps, {**_metrics(tokens, advantage), "weight": tokens.token_stat(weight)}


@reads("sample_logps", importance_clip=is_on)
def by_sampled_tokens(tokens: Taught, *, importance_clip: float | None = None) -> Loss:
    """[T]: `-ρ_t a_t log π(y_t)`, `a_t = log p(y_t) - log π(y_t)` without gradient, p the teacher, of which the reverse
    KL is the expectation; ρ as in `ratio_to_sampler`.

    Source: arXiv:2601.19897, estimated from the sampled token."""
    advantage = torch.where(tokens.mask, tokens.teacher_logps - tokens.logps, 0).detach()
    weight = ratio_to_sampler(tokens, importance_clip)
    return -weight * advantage * tokens.logps, _metrics(tokens, advantage)


def sequence_reverse_kl(tokens: Taught, *, gamma: float = 0.0, length_normalization: bool = True) -> Loss:
    """[T]: `-ρ_t R_t`, where ρ is 1 and carries the gradient of log π, and `R_t = Σ_{k≥t} γ^{k-t} a_k` over the rest of
    the row, `a_k = log p(y_k) - log π(y_k)`, p the teacher. The gradient goes through R, too: with γ = 0 it is
    `-(a_t - 1) ∇ log π(y_t)`. `length_normalization` divides R by `Σ_{k≥t} γ^{k-t}`, so that a long rest weighs no more
    than a short one.

    Source: arXiv:2306.08543, section 2.2 (eq. 2, and length normalisation).
    """
    return _sequence_reverse_kl(tokens, tokens.teacher_logps, gamma, length_normalization)


def beside_teacher(logits: Tensor, teacher_logits: Tensor, ids: Tensor, *, temperature: float | None = None) -> Tensor:
    """[n, 2], nats: the log-probability of the tokens `ids` [n] under the teacher, without gradient, and
    KL(student || teacher), at a temperature."""
    scale = 1 / (temperature or 1.0)
    student, teacher = (torch.log_softmax(each * scale, dim=-1) for each in (logits, teacher_logits))
    sampled = teacher.gather(1, ids.long()[:, None]).squeeze(1)
    return torch.stack([sampled.detach(), kl_divergence(student, teacher)], dim=-1)


@compares(beside_teacher, "tokens", companion=True, width=2)
def sequence_reverse_kl_beside(
    tokens: Distilled, *, gamma: float = 0.0, length_normalization: bool = True, temperature: float | None = None
) -> Loss:
    """[T]: `sequence_reverse_kl` against a teacher that lives beside the student, and the exact KL(student || teacher)
    of each token: of a sum over the rest of the row, the first step has a known expectation.

    Source: arXiv:2306.08543, section 2.2 (eq. 2 and 3: single-step decomposition).
    """
    teacher_logps, single_step = tokens.divergence.unbind(-1)
    values, metrics = _sequence_reverse_kl(tokens, teacher_logps, gamma, length_normalization)
    return values + single_step, {**metrics, "divergence": tokens.token_stat(single_step)}


def _sequence_reverse_kl(tokens: Tokens, teacher_logps: Tensor, gamma: float, normalized: bool) -> Loss:
    gain = torch.where(tokens.mask, teacher_logps - tokens.logps, 0)
    returns = discounted_sums(gain, gamma, tokens.micro)
    if normalized:
        weights = discounted_sums(tokens.mask.to(gain.dtype), gamma, tokens.micro)
        returns = returns / weights.clamp(min=1)  # below 1 where nothing is learned from
    ratio = (tokens.logps - tokens.logps.detach()).exp()
    return -ratio * returns, _metrics(tokens, gain)


def discounted_sums(values: Tensor, gamma: float, micro: MicroBatch) -> Tensor:
    """[T] -> [T]: `Σ_{k≥t} γ^{k-t} values_k` over the rest of the row of each token t. Differentiable.

    By doubling: after n rounds each entry holds the sum over 2^n tokens, so there is neither a loop over tokens nor a
    power of γ that overflows."""
    longest = int(micro.lengths.max()) if len(micro) else 0
    place = torch.arange(len(values), device=values.device)
    left = micro.per_token(micro.offsets[1:]) - 1 - place  # tokens of the row after this one
    total, step = values, 1
    while step < longest:
        total = total + gamma**step * torch.where(left >= step, total.roll(-step), 0)
        step *= 2
    return total


def _metrics(tokens: Tokens, gain: Tensor) -> dict[str, Stat]:
    """`reverse_kl`: what the samples say of KL(student || teacher), nats per token."""
    return {"reverse_kl": tokens.token_stat(-gain), "nll": tokens.token_stat(-tokens.logps)}
