"""Weights for undesirable examples whose prompts have another distribution than those of desirable ones (BCO's `weight`
column).

A logistic regression separates the two sets of prompts; the weight of an undesirable prompt is the odds that it is a
desirable one. Pure numpy. Source: arXiv:2404.04656."""

from __future__ import annotations

import numpy as np

from actors.batch import Array


def density_ratio_weights(probability: Array, *, lowest: float = 0.5, highest: float = 10.0) -> Array:
    """[B]: `p / (1 - p)`, clipped; `probability` [B] that a prompt belongs to a desirable example."""
    return np.clip(probability / (1 - probability + 1e-8), lowest, highest)


def desirable_probability(embeddings: Array, label: Array, *, penalty: float = 1.0, iterations: int = 25) -> Array:
    """[B]: the fitted probability that a prompt is a desirable example's, from `embeddings` [B, D] of prompts.

    Newton's method on the logistic likelihood with a quadratic penalty on all weights but the intercept; both classes
    have the same total weight, so that the odds are a ratio of densities."""
    features = np.column_stack([np.ones(len(embeddings)), embeddings]).astype(np.float64)
    target = np.asarray(label, np.float64)
    balance = np.where(label, 0.5 / max(target.mean(), 1e-12), 0.5 / max(1 - target.mean(), 1e-12))
    ridge = np.diag([0.0, *[penalty] * embeddings.shape[1]])
    weights = np.zeros(features.shape[1])
    for _ in range(iterations):
        probability = _sigmoid(features @ weights)
        gradient = features.T @ (balance * (probability - target)) + ridge @ weights
        curvature = (features.T * (balance * probability * (1 - probability))) @ features + ridge
        step = np.linalg.solve(curvature + 1e-9 * np.eye(len(weights)), gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    return _sigmoid(features @ weights)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))
