"""Metrics and the table of completions of a batch of sampled groups, with TRL's names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from orchestrator.collection.collected import Collected
from orchestrator.collection.group_stages import DATA, PromptGroup
from rewards.worker import ScoredTexts, ScoreResult
from rollout.sampling import EpisodeFacts, Finish


def rollout_metrics(collected: Collected, version: int) -> dict[str, float]:
    """Rewards, lengths (tokens) and staleness (versions) of a batch; empty for data that was not sampled. Where several
    models sample, rewards and lengths are those of the policy's own samples, and `reward_of_others` is the mean of the
    other ones."""
    if not collected.groups:
        return {}
    groups = [group for group in collected.groups if group.score is not None]
    own = [_of_policy(group) for group in groups]
    episodes = [facts for group in collected.groups for facts in group.episodes]
    metrics = {
        **_rewards(own),
        **_lengths(collected.groups),
        **_staleness(collected.groups, version),
        **episode_metrics(episodes, [n for group in collected.groups for meta in group.metas for n in meta.lengths]),
    }
    others = np.concatenate([_others(group) for group in groups]) if groups else np.zeros(0)
    return {**metrics, "reward_of_others": _nanmean(others)} if len(others) else metrics


def episode_metrics(episodes: Sequence[EpisodeFacts], written: Sequence[int]) -> dict[str, float]:
    """Turns, tools and where the time went; empty if the samples are no episodes. `written`: tokens by the model of
    each. The names of the first two are TRL's."""
    if not episodes:
        return {}
    calls, failures = sum(each.calls for each in episodes), sum(each.failures for each in episodes)
    answers = sum(each.answer_tokens for each in episodes)
    return {
        "tools/call_frequency": calls / len(episodes),  # calls of an episode
        "tools/failure_frequency": failures / calls if calls else 0.0,
        "episodes/mean_turns": float(np.mean([each.turns for each in episodes])),
        "episodes/max_turns": float(max(each.turns for each in episodes)),
        "episodes/model_token_share": sum(written) / max(1, sum(written) + answers),  # of the tokens after the prompt
        "episodes/engine_seconds": float(np.mean([each.engine_s for each in episodes])),
        "episodes/environment_seconds": float(np.mean([each.environment_s for each in episodes])),
    }


def _of_policy(group: PromptGroup) -> ScoreResult:
    """The scores of the samples that the policy drew. Where it drew none, or nobody else drew any: of all."""
    assert group.score is not None
    if all(group.own) or not any(group.own):
        return group.score
    rows = np.flatnonzero(group.own)
    return replace(group.score, rewards=group.score.rewards[rows], total=group.score.total[rows])


def _others(group: PromptGroup) -> np.ndarray:
    """Rewards of samples that another model drew beside the policy's, or had a say in."""
    assert group.score is not None
    return group.score.total[~np.asarray(group.own)] if any(group.own) else np.zeros(0)


def completion_rows(group: PromptGroup, scored: ScoredTexts) -> list[dict[str, Any]]:
    """One row per sample: the table's own columns, columns that rewards logged (`log_extra`), the data set's columns.
    If two of these have the same name, the later one is called `extra/NAME` or `data/NAME`. No rows for samples that
    were not scored."""
    score, prompt = group.score, group.prompt.prompt
    if score is None:
        return []
    lengths = [length for meta in group.metas for length in meta.lengths]
    workers = [meta.worker for meta in group.metas for _ in meta.lengths]
    versions = [meta.oldest_version for meta in group.metas for _ in meta.lengths]
    rows: list[dict[str, Any]] = []
    for index, text in enumerate(scored.texts):
        row: dict[str, Any] = {
            "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt),
            "completion": text,
            "reward": float(score.total[index]),
            **{f"rewards/{name}": float(score.rewards[index, column]) for column, name in enumerate(score.names)},
            "length": lengths[index],
            "version": versions[index],
            "worker": workers[index],
            "position": group.position,
        }
        if group.episodes:
            facts = group.episodes[index]
            row |= {"turns": facts.turns, "tool_calls": facts.calls, "tool_failures": facts.failures}
        taken = {"step", *row}
        logged = {name: values[index] for name, values in scored.extra.items()}
        row |= {(f"extra/{name}" if name in taken else name): value for name, value in logged.items()}
        taken |= row.keys()
        row |= {(f"data/{name}" if name in taken else name): value for name, value in group.prompt.columns.items()}
        rows.append(row)
    return rows


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
    silent = np.isnan(matrix)
    metrics["frac_reward_none"] = float(silent.all(axis=1).mean())
    for column, name in enumerate(scores[0].names):
        metrics[f"rewards/{name}/mean"] = _nanmean(matrix[:, column])
        metrics[f"rewards/{name}/std"] = _nanstd(matrix[:, column])
        metrics[f"rewards/{name}/frac_none"] = float(silent[:, column].mean())
    return {**metrics, **_call_metrics(scores), **_user_metrics(scores)}


def _call_metrics(scores: Sequence[ScoreResult]) -> dict[str, float]:
    """How the calls of each reward went: seconds of the attempt that counted, failed attempts by
    kind, of all groups together, and the share of groups for which a constant stands (`on_failure`). Groups that were
    scored before the run was resumed say nothing of that."""
    metrics: dict[str, float] = {}
    for column, name in enumerate(scores[0].names):
        calls = [score.calls[column] for score in scores if column < len(score.calls)]
        if not calls:
            continue
        seconds = [call.seconds for call in calls]
        metrics[f"rewards/{name}/seconds"] = float(np.mean(seconds))
        metrics[f"rewards/{name}/seconds_max"] = float(max(seconds))
        for kind in sorted({kind for call in calls for kind in call.failures}):
            metrics[f"rewards/{name}/failed/{kind}"] = float(sum(call.failures.get(kind, 0) for call in calls))
        stood_in = [call.stood_in for call in calls if call.stood_in is not None]
        if stood_in:
            metrics[f"rewards/{name}/frac_constant"] = float(np.mean(stood_in))
    return metrics


def _user_metrics(scores: Sequence[ScoreResult]) -> dict[str, float]:
    """Metrics that reward functions logged (`log_metric`), averaged over groups."""
    names = dict.fromkeys(name for score in scores for name in score.metrics)
    return {
        name: _nanmean(np.array([score.metrics[name] for score in scores if name in score.metrics])) for name in names
    }


def _lengths(groups: Sequence[PromptGroup]) -> dict[str, float]:
    own = np.array([each for group in groups for each in group.own], bool)
    shown = own if own.any() else ~own
    if not len(shown):  # no prompt of the batch could be answered
        return {}
    lengths = np.array([length for group in groups for meta in group.metas for length in meta.lengths])[shown]
    finishes = [finish for group in groups for meta in group.metas for finish in meta.finishes]
    ended = np.array([finish is Finish.STOP for finish in finishes])[shown]
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - ended.mean()),
    }
    taken = [meta.worker == DATA for group in groups for meta in group.metas for _ in meta.lengths]
    if any(taken):
        metrics["completions/from_data"] = float(np.mean(taken))
    terminated = lengths[ended]
    if len(terminated):
        metrics["completions/mean_terminated_length"] = float(terminated.mean())
        metrics["completions/min_terminated_length"] = float(terminated.min())
        metrics["completions/max_terminated_length"] = float(terminated.max())
    return metrics


def _staleness(groups: Sequence[PromptGroup], version: int) -> dict[str, float]:
    ages = np.array([version - group.oldest_version for group in groups if group.oldest_version is not None])
    if not len(ages):  # all were sampled with weights that do not change
        return {}
    return {"staleness/mean": float(ages.mean()), "staleness/max": float(ages.max())}


def _nanmean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.any(~np.isnan(values)) else float("nan")


def _nanstd(values: np.ndarray) -> float:
    return float(np.nanstd(values)) if np.any(~np.isnan(values)) else float("nan")
