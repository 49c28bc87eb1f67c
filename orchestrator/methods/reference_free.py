"""Preference methods without a reference: CPO, SimPO, AlphaPO, ORPO, TPO."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from orchestrator.losses.declare import Sum, Term
from orchestrator.losses.likelihood import chosen_nll, chosen_sequence_nll, gold_nll
from orchestrator.losses.pairwise import (
    Contrast,
    hinge,
    ipo,
    margin_sigmoid,
    odds_ratio,
    of_triples,
    reference_free,
    sigmoid,
)
from orchestrator.losses.reduce import item_mean, token_mean
from orchestrator.methods.option_types import NotNegative, Positive, Smoothing
from orchestrator.pipeline import Pairs, Pipeline, Triples, update


def cpo(
    *,
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
    cpo_alpha: NotNegative = 1.0,
    token_metrics: bool = False,
) -> Pipeline:
    """Contrastive preference optimisation: a preference loss without reference, and likelihood of the chosen.

    Source: arXiv:2401.08417."""
    contrasts = _contrasts(label_smoothing)
    options = _options(contrasts[loss_type], beta, token_metrics, length_normalised=loss_type == "ipo")
    return _pairs(options, Term(chosen_nll, token_mean, cpo_alpha))


def simpo(
    *,
    beta: Positive = 2.0,
    simpo_gamma: NotNegative = 0.5,
    label_smoothing: Smoothing = 0.0,
    cpo_alpha: NotNegative = 0.0,
    token_metrics: bool = False,
) -> Pipeline:
    """Simple preference optimisation: mean log-probabilities, apart by a margin.

    `cpo_alpha` adds CPO's likelihood term. Source: arXiv:2405.14734, eq. 6."""
    contrast = partial(margin_sigmoid, gamma=simpo_gamma, label_smoothing=label_smoothing)
    options = _options(contrast, beta, token_metrics, length_normalised=True)
    return _pairs(options, Term(chosen_nll, token_mean, cpo_alpha))


def alphapo(
    *,
    alpha: float = 0.25,
    beta: Positive = 2.5,
    simpo_gamma: NotNegative = 0.1,
    label_smoothing: Smoothing = 0.0,
    cpo_alpha: NotNegative = 0.0,
    token_metrics: bool = False,
) -> Pipeline:
    """SimPO with a reward whose shape `alpha` sets.

    `cpo_alpha` adds CPO's likelihood term. Source: arXiv:2501.03884; defaults of its table 3."""
    contrast = partial(margin_sigmoid, gamma=simpo_gamma, alpha=alpha, label_smoothing=label_smoothing)
    options = _options(contrast, beta, token_metrics, length_normalised=True)
    return _pairs(options, Term(chosen_nll, token_mean, cpo_alpha))


def orpo(*, beta: Positive = 0.1, token_metrics: bool = False) -> Pipeline:
    """Odds-ratio preference optimisation: supervised fine-tuning with a penalty on the odds of what was rejected.

    The likelihood term spans prompt and completion. Source: arXiv:2403.07691, eq. 6 (its λ is `beta`)."""
    options = {"beta": beta, "token_metrics": token_metrics}
    loss = Sum(Term(odds_ratio, item_mean, options=options), Term(chosen_sequence_nll, token_mean))
    return Pipeline(Pairs, update("policy", loss))


def tpo(
    *,
    loss_type: Literal["sigmoid", "hinge", "ipo", "tpo-l"] = "sigmoid",
    beta: Positive = 0.01,
    label_smoothing: Smoothing = 0.0,
    tpo_alpha: NotNegative = 1.0,
    tpo_l_gamma: NotNegative = 0.5,
    token_metrics: bool = False,
) -> Pipeline:
    """Triple preference optimisation: a preference loss on two completions, likelihood of a third, the gold one.

    Source: arXiv:2405.16681."""
    with_margin = partial(margin_sigmoid, gamma=tpo_l_gamma, label_smoothing=label_smoothing)
    contrast = {**_contrasts(label_smoothing), "tpo-l": with_margin}[loss_type]
    options = _options(contrast, beta, token_metrics, length_normalised=loss_type in ("ipo", "tpo-l"))
    terms = Sum(Term(of_triples, item_mean, options=options), Term(gold_nll, token_mean, tpo_alpha))
    return Pipeline(Triples, update("policy", terms))


def _contrasts(label_smoothing: float) -> dict[str, Contrast]:
    return {"sigmoid": partial(sigmoid, label_smoothing=label_smoothing), "hinge": hinge, "ipo": ipo}


def _options(contrast: Contrast, beta: float, token_metrics: bool, *, length_normalised: bool) -> dict[str, Any]:
    return {
        "contrast": contrast,
        "beta": beta,
        "length_normalised": length_normalised,
        "token_metrics": token_metrics,
    }


def _pairs(options: dict[str, Any], *likelihood: Term) -> Pipeline:
    return Pipeline(Pairs, update("policy", Sum(Term(reference_free, item_mean, options=options), *likelihood)))
