"""What a batch of sampled groups looked like, under the names that users of this field know."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestrator.collection.collected import Collected
from orchestrator.collection.group_stages import PromptGroup
from rewards.worker import ScoreResult
from rollout.sampling import Finish


def rollout_metrics(collected: Collected, version: int) -> dict[str, float]:
    """Rewards, lengths (tokens) and staleness (versions) of a batch; empty for data that was not sampled."""
    if not collected.groups:
        return {}
    scores = [group.score for group in collected.groups if group.score is not None]
    return {**_rewards(scores), **_lengths(collected.groups), **_staleness(collected.groups, version)}


def _rewards(scores: Sequence[ScoreResult]) -> dict[str, float]:
    """Empty for a pipeline that scores nothing."""
    if not scores:
        return {}
    totals = [np.asarray(score.total, dtype=np.float64) for score in scores]
    spreads = [float(np.nanstd(total, ddof=1)) for total in totals if np.count_nonzero(~np.isnan(total)) > 1]
    metrics = {
        "reward": _nanmean(np.concatenate(totals)),
        "reward_std": float(np.mean(spreads)) if spreads else 0.0,
        "frac_reward_zero_std": float(np.mean([spread == 0 for spread in spreads])) if spreads else 0.0,
    }
    matrix = np.concatenate([score.rewards for score in scores]).astype(np.float64)
    for column, name in enumerate(scores[0].names):
        metrics[f"rewards/{name}/mean"] = _nanmean(matrix[:, column])
        metrics[f"rewards/{name}/std"] = float(np.nanstd(matrix[:, column])) if len(matrix) else float("nan")
    return {**metrics, **_user_metrics(scores)}


def _user_metrics(scores: Sequence[ScoreResult]) -> dict[str, float]:
    """What reward functions logged themselves (`log_metric`), averaged over groups."""
    names = dict.fromkeys(name for score in scores for name in score.metrics)
    return {
        name: _nanmean(np.array([score.metrics[name] for score in scores if name in score.metrics])) for name in names
    }


def _lengths(groups: Sequence[PromptGroup]) -> dict[str, float]:
    lengths = np.array([length for group in groups for meta in group.metas for length in meta.lengths])
    ended = np.array([finish is Finish.STOP for group in groups for meta in group.metas for finish in meta.finishes])
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - ended.mean()),
    }
    terminated = lengths[ended]
    if len(terminated):
        metrics["completions/mean_terminated_length"] = float(terminated.mean())
        metrics["completions/min_terminated_length"] = float(terminated.min())
        metrics["completions/max_terminated_length"] = float(terminated.max())
    return metrics


def _staleness(groups: Sequence[PromptGroup], version: int) -> dict[str, float]:
    ages = np.array([version - group.oldest_version for group in groups])
    return {"staleness/mean": float(ages.mean()), "staleness/max": float(ages.max())}


def _nanmean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.any(~np.isnan(values)) else float("nan")
