"""How several rewards of a completion become one. Pure."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def weighted_sum(rewards: Array, weights: Array) -> Array:
    """[n, k] rewards, NaN where a function had no opinion, and [k] weights -> [n] float32.

    Functions without an opinion are left out. A completion on which none has one is NaN: unscorable, which is not zero.
    """
    has_opinion = ~np.isnan(rewards)
    with np.errstate(over="ignore"):  # an infinite sum is the caller's to refuse
        total = np.where(has_opinion, rewards * weights, 0.0).sum(axis=1)
    return np.where(has_opinion.any(axis=1), total, np.nan).astype(np.float32)
