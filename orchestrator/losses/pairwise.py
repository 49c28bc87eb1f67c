"""Preference losses over pairs of a chosen and a rejected completion.

A contrast is a small pure function of a pair's two scores and of beta; a new one is one function here and its row in
`CONTRASTS`. The loss decides which scores it contrasts: `against_reference` scores a completion by its log-ratio to the
reference, `reference_free` by its own log-probability.

Letters: `d = chosen - rejected`, `n` tokens, `ε` label smoothing. Scores are sums over a completion's tokens, in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from actors.imports import F, torch
from actors.objective import Stat
from orchestrator.losses.declare import Loss, is_on, reads
from orchestrator.losses.divergences import LARGEST_EXPONENT, Divergence, reverse_kl
from orchestrator.losses.views import Pairs, RefPairs, Triples, require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairScores:
    """[P] each: the scores of both completions and their lengths in tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def difference(self) -> Tensor:
        return self.chosen - self.rejected

    @property
    def per_token(self) -> PairScores:
        """Scores divided by their lengths; a second `per_token` has no effect."""
        ones = torch.ones_like(self.chosen_tokens)
        return PairScores(self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens, ones, ones)


Contrast = Callable[[PairScores, float], "Tensor"]


def sigmoid(scores: PairScores, beta: float, *, label_smoothing: float = 0.0) -> Tensor:
    """`-(1-ε) log σ(βd) - ε log σ(-βd)`. Source: arXiv:2305.18290, eq. 7; smoothing (cDPO): Mitchell, 2023, a note.

    Departure from TRL 1.16, which ignores the smoothing here."""
    return smoothed_logistic(beta * scores.difference, label_smoothing)


def sigmoid_norm(scores: PairScores, beta: float, *, label_smoothing: float = 0.0) -> Tensor:
    """`sigmoid` of scores per token. Source: arXiv:2411.15124."""
    return sigmoid(scores.per_token, beta, label_smoothing=label_smoothing)


def hinge(scores: PairScores, beta: float) -> Tensor:
    """`max(0, 1 - βd)`. Source: arXiv:2305.10425, in the normalised form of arXiv:2309.06657."""
    return F.relu(1 - beta * scores.difference)


def ipo(scores: PairScores, beta: float) -> Tensor:
    """`(d/n - 1/(2β))²`, with scores per token. Source: arXiv:2310.12036, eq. 17.

    Departure from the paper, with TRL: its d is not divided by lengths; the authors confirmed that it should be.
    """
    return (scores.per_token.difference - 1 / (2 * beta)).square()


def ipo_of_sums(scores: PairScores, beta: float) -> Tensor:
    """`(d - 1/(2β))²`, with scores summed over tokens. Source: arXiv:2310.12036, eq. 17."""
    return (scores.difference - 1 / (2 * beta)).square()


def exo_pair(scores: PairScores, beta: float, *, label_smoothing: float) -> Tensor:
    """`KL(q ‖ (1-ε, ε))` with `q = (σ(βd), σ(-βd))`. Needs ε > 0. Source: arXiv:2402.00856."""
    z = beta * scores.difference
    log_win, log_lose = F.logsigmoid(z), F.logsigmoid(-z)
    target = torch.tensor([1 - label_smoothing, label_smoothing], dtype=z.dtype, device=z.device).log()
    return log_win.exp() * (log_win - target[0]) + log_lose.exp() * (log_lose - target[1])


def nca_pair(scores: PairScores, beta: float) -> Tensor:
    """`-log σ(βu_w) - ½ log σ(-βu_w) - ½ log σ(-βu_l)`. Source: arXiv:2402.05369, with two completions."""
    won, lost = beta * scores.chosen, beta * scores.rejected
    return -F.logsigmoid(won) - 0.5 * F.logsigmoid(-won) - 0.5 * F.logsigmoid(-lost)


def robust(scores: PairScores, beta: float, *, label_smoothing: float = 0.0) -> Tensor:
    """`[-(1-ε) log σ(βd) + ε log σ(-βd)] / (1-2ε)`: unbiased if a fraction ε of the labels is flipped.

    Source: arXiv:2403.00409."""
    z = beta * scores.difference
    biased = -(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)
    return biased / (1 - 2 * label_smoothing)


def bco_pair(scores: PairScores, beta: float) -> Tensor:
    """`-log σ(βu_w) - log σ(-βu_l)`. Source: arXiv:2404.04656, without its shift δ, which the method `bco` has."""
    return -F.logsigmoid(beta * scores.chosen) - F.logsigmoid(-beta * scores.rejected)


def sppo_hard(scores: PairScores, beta: float) -> Tensor:
    """`(u_w - 1/(2β))² + (u_l + 1/(2β))²`. Source: arXiv:2405.00675, with win rates 1 and 0."""
    target = 1 / (2 * beta)
    return (scores.chosen - target).square() + (scores.rejected + target).square()


def apo_zero(scores: PairScores, beta: float) -> Tensor:
    """`1 - σ(βu_w) + σ(βu_l)`: raises the chosen, lowers the rejected. Source: arXiv:2408.06266."""
    return torch.sigmoid(-beta * scores.chosen) + torch.sigmoid(beta * scores.rejected)


def apo_down(scores: PairScores, beta: float) -> Tensor:
    """`σ(βu_w) + 1 - σ(βd)`: lowers both, the rejected more. Source: arXiv:2408.06266."""
    return torch.sigmoid(beta * scores.chosen) + torch.sigmoid(-beta * scores.difference)


def discopop(scores: PairScores, beta: float, *, discopop_tau: float = 0.05) -> Tensor:
    """`(1-κ)(-log σ(z)) + κ e^{-z}`, `z = βd`, `κ = σ(z/τ)`. Source: arXiv:2406.08414 (log-ratio modulated)."""
    z = beta * scores.difference
    gate = torch.sigmoid(z / discopop_tau)
    log_product = (
        F.logsigmoid(z / discopop_tau) - z
    )  # the gate underflows where e^{-z} overflows, their product does neither
    return -(1 - gate) * F.logsigmoid(z) + log_product.clamp(max=LARGEST_EXPONENT).exp()


def margin_sigmoid(
    scores: PairScores, beta: float, *, gamma: float, alpha: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """`sigmoid` of `βd - γ`; with `alpha`, `d` is the difference of `(1 - e^{-α s}) / α`, s the scores. For scores per
    token.

    Source: arXiv:2405.14734, eq. 6; alpha: arXiv:2501.03884."""
    difference = shaped(scores.chosen, alpha) - shaped(scores.rejected, alpha)
    return smoothed_logistic(beta * difference - gamma, label_smoothing)


CONTRASTS: dict[str, Callable[..., Tensor]] = {
    contrast.__name__: contrast
    for contrast in (
        sigmoid,
        hinge,
        ipo,
        exo_pair,
        nca_pair,
        robust,
        bco_pair,
        sppo_hard,
        apo_zero,
        apo_down,
        discopop,
        sigmoid_norm,
    )
}


@reads("log_sum_sq_probs", use_weighting=is_on)
@reads("entropy", "mean_logits", "is_top1", token_metrics=is_on)
def against_reference(
    pairs: RefPairs,
    *,
    contrast: Contrast,
    beta: float,
    divergence: Divergence = reverse_kl,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    token_metrics: bool = False,
) -> Loss:
    """[P]: a contrast of `x(u)`, `u = log π(y) - log ref(y)` and `x` the divergence's derivative.

    `ld_alpha` weights the tokens of a completion beyond the length of the other one (arXiv:2409.06411); `use_weighting`
    weights pairs by the policy's own likelihood of them (arXiv:2406.11827)."""
    ratios = pair_scores(pairs, pairs.logps - pairs.ref_logps, ld_alpha)
    scores = replace(ratios, chosen=divergence(ratios.chosen), rejected=divergence(ratios.rejected))
    values = contrast(scores, beta)
    if use_weighting:
        values = values * policy_likelihood(pairs)
    return values, pair_metrics(pairs, ratios, beta, token_metrics)


@reads("entropy", "mean_logits", "is_top1", token_metrics=is_on)
def reference_free(
    pairs: Pairs, *, contrast: Contrast, beta: float, length_normalised: bool = False, token_metrics: bool = False
) -> Loss:
    """[P]: a contrast of the completions' own log-probabilities, summed or averaged over tokens. `nll_loss` is reported
    even if it has weight 0: without a reference, it shows how far the likelihood of chosen completions has drifted."""
    values, metrics = _contrasted(pairs, contrast, beta, length_normalised, token_metrics)
    chosen = pairs.mask & pairs.micro.per_token(pairs.preferred)
    likelihood = Stat(torch.where(chosen, -pairs.logps.detach(), 0).sum(), chosen.sum())
    return values, {"nll_loss": likelihood, **metrics}


@reads("entropy", "mean_logits", "is_top1", token_metrics=is_on)
def of_triples(
    pairs: Triples, *, contrast: Contrast, beta: float, length_normalised: bool = False, token_metrics: bool = False
) -> Loss:
    """[P]: `reference_free` of the chosen and rejected completions of triples."""
    return _contrasted(pairs, contrast, beta, length_normalised, token_metrics)


def _contrasted(
    pairs: Pairs, contrast: Contrast, beta: float, length_normalised: bool, token_metrics: bool
) -> tuple[Tensor, dict[str, Stat]]:
    scores = pair_scores(pairs, pairs.logps)
    scores = scores.per_token if length_normalised else scores
    return contrast(scores, beta), pair_metrics(pairs, scores, beta, token_metrics)


@reads("entropy", "mean_logits", "is_top1", token_metrics=is_on)
def odds_ratio(pairs: Pairs, *, beta: float, token_metrics: bool = False) -> Loss:
    """[P]: `-β log σ(log odds(chosen) - log odds(rejected))`, odds of the mean token's probability.

    Source: arXiv:2403.07691, eq. 6 and 7, with λ for beta."""
    scores = pair_scores(pairs, pairs.logps).per_token
    difference = log_odds(scores.chosen) - log_odds(scores.rejected)
    log_sigmoid = F.logsigmoid(difference)
    own = {"log_odds_chosen": pairs.pair_stat(difference), "log_odds_ratio": pairs.pair_stat(log_sigmoid)}
    return -beta * log_sigmoid, own | pair_metrics(pairs, scores, beta, token_metrics)


def pair_scores(pairs: Pairs, values: Tensor, ld_alpha: float | None = None) -> PairScores:
    """Per-token values summed over each completion; with `ld_alpha`, that is the weight of a token beyond the shorter
    completion's length."""
    chosen_tokens, rejected_tokens = pairs.split(pairs.counts)
    if ld_alpha is not None:
        values = values * torch.where(_beyond_shorter(pairs), ld_alpha, 1.0)
    chosen, rejected = pairs.split(pairs.row_sums(values))
    return PairScores(chosen, rejected, chosen_tokens.clamp(min=1), rejected_tokens.clamp(min=1))


def smoothed_logistic(z: Tensor, label_smoothing: float) -> Tensor:
    """`-(1-ε) log σ(z) - ε log σ(-z)`."""
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def shaped(scores: Tensor, alpha: float) -> Tensor:
    """`(1 - e^{-α s}) / α`, and `s` itself for `α = 0`."""
    return -torch.expm1((-alpha * scores).clamp(max=LARGEST_EXPONENT)) / alpha if alpha else scores


def log_odds(logps: Tensor) -> Tensor:
    """`log(p / (1 - p))` of `p = e^logps`; a probability of 1, whose odds are infinite, is replaced by the next smaller
    number."""
    below_one = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return below_one - _log1mexp(below_one)


def policy_likelihood(pairs: Pairs) -> Tensor:
    """[P]: `ω_w ω_l` without gradient, `ω = exp(mean_t(log π(y_t) - log Σ_v π(v)²))`."""
    weights = pairs.row_means(pairs.logps.detach() - require(pairs.log_sum_sq_probs)).exp()
    chosen, rejected = pairs.split(weights)
    return chosen * rejected


def pair_metrics(pairs: Pairs, scores: PairScores, beta: float, token_metrics: bool) -> dict[str, Stat]:
    """Rewards are `β x score`, whichever contrast is optimised."""
    chosen_logps, rejected_logps = pairs.split(pairs.row_sums(pairs.logps))
    metrics = {
        "rewards/chosen": pairs.pair_stat(beta * scores.chosen),
        "rewards/rejected": pairs.pair_stat(beta * scores.rejected),
        "rewards/margins": pairs.pair_stat(beta * scores.difference),
        "rewards/accuracies": pairs.pair_stat((scores.difference > 0).to(scores.chosen.dtype)),
        "logps/chosen": pairs.pair_stat(chosen_logps),
        "logps/rejected": pairs.pair_stat(rejected_logps),
    }
    return metrics | _token_metrics(pairs) if token_metrics else metrics


def _token_metrics(pairs: Pairs) -> dict[str, Stat]:
    chosen_logits, rejected_logits = pairs.split(pairs.row_sums(require(pairs.mean_logits)))
    chosen_right, _ = pairs.split(pairs.row_sums(require(pairs.is_top1)))
    chosen_tokens, rejected_tokens = pairs.split(pairs.counts)
    return {
        "entropy": pairs.token_stat(require(pairs.entropy)),
        "logits/chosen": Stat(chosen_logits.sum(), chosen_tokens.sum()),
        "logits/rejected": Stat(rejected_logits.sum(), rejected_tokens.sum()),
        "mean_token_accuracy": Stat(chosen_right.sum(), chosen_tokens.sum()),
    }


def _beyond_shorter(pairs: Pairs) -> Tensor:
    """[T] bool: tokens of a completion beyond the length of the shorter one of its pair."""
    seen = pairs.mask.long().cumsum(0)
    before = (seen - pairs.mask.long())[pairs.micro.offsets[:-1].clamp(max=max(len(seen) - 1, 0))]
    position = seen - pairs.micro.per_token(before)
    chosen, rejected = pairs.sides
    shorter = torch.full_like(pairs.counts, torch.inf)
    shorter[chosen] = shorter[rejected] = torch.minimum(pairs.counts[chosen], pairs.counts[rejected])
    return position > pairs.micro.per_token(shorter)


def _log1mexp(x: Tensor) -> Tensor:
    """`log(1 - e^x)` for `x < 0`, accurate at both ends. Source: Mächler, 2012, eq. 7."""
    near_zero = x > -0.6931471805599453
    safe_near, safe_far = torch.where(near_zero, x, -1.0), torch.where(near_zero, -1.0, x)
    return torch.where(near_zero, (-torch.expm1(safe_near)).log(), torch.log1p(-safe_far.exp()))
