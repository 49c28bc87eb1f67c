"""How several rewards of a completion become one, and what several models say of it one reward. Pure."""

from __future__ import annotations

from typing import Literal

import numpy as np

Array = np.ndarray
Combine = Literal["mean", "min", "mean_minus_std"]


def weighted_sum(rewards: Array, weights: Array) -> Array:
    """[n, k] rewards, NaN where a function had no opinion, and [k] weights -> [n] float32.

    Functions without an opinion are left out. A completion on which none has one is NaN: unscorable, which is not zero.
    """
    has_opinion = ~np.isnan(rewards)
    with np.errstate(over="ignore"):  # an infinite sum is the caller's to refuse
        total = np.where(has_opinion, rewards * weights, 0.0).sum(axis=1)
    return np.where(has_opinion.any(axis=1), total, np.nan).astype(np.float32)


def of_ensemble(scores: Array, combine: Combine, deviations: float) -> Array:
    """[n, m] scores of m models -> [n] float32, NaN where a model has no opinion: the mean of fewer would not be
    comparable. `mean_minus_std` takes `deviations` standard deviations over the models (divided by m) from their mean:
    with two models and 1, that is the lower score.

    Source: arXiv:2310.02743, section 3 (mean, worst case, and a price on disagreement)."""
    if combine == "min":
        return scores.min(axis=1).astype(np.float32)
    mean = scores.mean(axis=1, dtype=np.float64)
    if combine == "mean":
        return mean.astype(np.float32)
    return (mean - deviations * scores.std(axis=1, dtype=np.float64)).astype(np.float32)
