"""What a batch of sampled groups looked like, under the names that users of this field know: numbers, and a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestrator.collector import Collected, Group
from rollout.sampling import Finish


def rollout_metrics(collected: Collected, version: int) -> dict[str, float]:
    """Rewards, lengths (tokens) and staleness (versions) of a batch; empty for data that was not sampled."""
    if not collected.groups:
        return {}
    return {**_rewards(collected.groups), **_lengths(collected.groups), **_staleness(collected.groups, version)}


def completion_rows(group: Group) -> list[dict[str, Any]]:
    """One row per sample: the table's own columns, what rewards logged (`log_extra`), the data set's columns. Where two
    of these have one name, the later one is called `extra/NAME` or `data/NAME`."""
    score, prompt = group.score, group.prompt.prompt
    rows = []
    for index, text in enumerate(score.texts):
        row: dict[str, Any] = {
            "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt),
            "completion": text,
            "reward": float(score.total[index]),
            **{f"rewards/{name}": float(score.rewards[index, column]) for column, name in enumerate(score.names)},
            "length": group.meta.lengths[index],
            "version": group.meta.oldest_version,
            "worker": group.meta.worker,
            "position": group.position,
        }
        taken = {"step", *row}
        logged = {name: values[index] for name, values in score.extra.items()}
        row |= {(f"extra/{name}" if name in taken else name): value for name, value in logged.items()}
        taken |= row.keys()
        row |= {(f"data/{name}" if name in taken else name): value for name, value in group.prompt.columns.items()}
        rows.append(row)
    return rows


def _rewards(groups: Sequence[Group]) -> dict[str, float]:
    totals = [np.asarray(group.score.total, dtype=np.float64) for group in groups]
    spreads = [float(np.nanstd(total, ddof=1)) for total in totals if np.count_nonzero(~np.isnan(total)) > 1]
    metrics = {
        "reward": _nanmean(np.concatenate(totals)),
        "reward_std": float(np.mean(spreads)) if spreads else 0.0,
        "frac_reward_zero_std": float(np.mean([spread == 0 for spread in spreads])) if spreads else 0.0,
    }
    matrix = np.concatenate([group.score.rewards for group in groups]).astype(np.float64)
    silent = np.isnan(matrix)
    metrics["frac_reward_none"] = float(silent.all(axis=1).mean())
    for column, name in enumerate(groups[0].score.names):
        metrics[f"rewards/{name}/mean"] = _nanmean(matrix[:, column])
        metrics[f"rewards/{name}/std"] = _nanstd(matrix[:, column])
        metrics[f"rewards/{name}/frac_none"] = float(silent[:, column].mean())
    return {**metrics, **_user_metrics(groups)}


def _user_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What reward functions logged themselves (`log_metric`), averaged over groups."""
    names = dict.fromkeys(name for group in groups for name in group.score.metrics)
    return {
        name: _nanmean(np.array([g.score.metrics[name] for g in groups if name in g.score.metrics])) for name in names
    }


def _lengths(groups: Sequence[Group]) -> dict[str, float]:
    lengths = np.array([length for group in groups for length in group.meta.lengths])
    ended = np.array([finish is Finish.STOP for group in groups for finish in group.meta.finishes])
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


def _staleness(groups: Sequence[Group], version: int) -> dict[str, float]:
    ages = np.array([version - group.meta.oldest_version for group in groups])
    return {"staleness/mean": float(ages.mean()), "staleness/max": float(ages.max())}


def _nanmean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.any(~np.isnan(values)) else float("nan")


def _nanstd(values: np.ndarray) -> float:
    return float(np.nanstd(values)) if np.any(~np.isnan(values)) else float("nan")
