"""Supervised losses: make the given tokens more likely."""

from __future__ import annotations

from actors.objective import Stat
from orchestrator.losses.declare import Loss, is_on, reads
from orchestrator.losses.views import ChosenSequences, ChosenTokens, GoldTokens, Tokens, require


@reads("mean_logps", label_smoothing=is_on)
@reads("entropy", "is_top1", token_metrics=is_on)
def nll(tokens: Tokens, *, label_smoothing: float = 0.0, token_metrics: bool = False) -> Loss:
    """[T]: `-log π(y_t)`; with smoothing, cross entropy against `(1 - ε) one-hot + ε uniform`.

    Source: arXiv:1512.00567, section 7 (smoothing).
    """
    values = -tokens.logps
    if label_smoothing:
        values = (1 - label_smoothing) * values - label_smoothing * require(tokens.mean_logps)
    return values, _metrics(tokens, token_metrics)


@reads("entropy", "is_top1", token_metrics=is_on)
def dft(tokens: Tokens, *, token_metrics: bool = False) -> Loss:
    """[T]: `-sg(π(y_t)) log π(y_t)`: each token's gradient is weighted by its probability.

    Source: arXiv:2508.05629; the paper sums over tokens, here it is reduced like any other supervised loss.
    """
    return -tokens.logps.detach().exp() * tokens.logps, _metrics(tokens, token_metrics)


def _metrics(tokens: Tokens, token_metrics: bool) -> dict[str, Stat]:
    metrics = {"nll": tokens.token_stat(-tokens.logps)}
    if token_metrics:
        metrics["entropy"] = tokens.token_stat(require(tokens.entropy))
        metrics["mean_token_accuracy"] = tokens.token_stat(require(tokens.is_top1))
    return metrics


def chosen_nll(tokens: ChosenTokens) -> Loss:
    """[T]: `nll` of the chosen completions."""
    return -tokens.logps, {"nll_loss": tokens.token_stat(-tokens.logps)}


def chosen_sequence_nll(tokens: ChosenSequences) -> Loss:
    """[T]: `nll` of the chosen completions and their prompts."""
    return -tokens.logps, {"nll_loss": tokens.token_stat(-tokens.logps)}


def gold_nll(tokens: GoldTokens) -> Loss:
    """[T]: `nll` of the gold completions."""
    return -tokens.logps, {"nll_loss": tokens.token_stat(-tokens.logps)}
