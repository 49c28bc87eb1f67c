"""Group-relative policy optimisation on some of each prompt's samples: the short or the efficient ones."""

from __future__ import annotations

from typing import Literal

from actors.errors import ConfigError
from orchestrator.batches.regrouping import FilterScores, highest, keep_highest, most_reward_per_token, shortest
from orchestrator.credit.advantages import Scale, group_zscore, group_zscore_of_some, has_signal
from orchestrator.losses.policy_gradient import Correction
from orchestrator.methods.grpo import grpo
from orchestrator.methods.importance_ratio import EPSILON
from orchestrator.methods.option_types import Count, NotNegative, Positive, Several
from orchestrator.pipeline import Pipeline, Verb, credit, keep, regroup, when
from orchestrator.plugins import Plugin, is_plugin, load

FILTERS: dict[str, FilterScores] = {"length": shortest, "reward_per_token": most_reward_per_token}


def gfpo(
    *,
    num_generations: Several = 16,
    num_remains_in_group: Several = 8,
    group_filter: Plugin | Literal["length", "reward_per_token"] = "length",
    rejected: Literal["removed", "advantage_0"] = "removed",
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo",
    epsilon: Positive = EPSILON,
    epsilon_high: Positive | None = None,
    beta: NotNegative = 0.0,
    correction: Correction = "none",
    correction_min: Positive | None = None,
    correction_max: Positive = 3.0,
    scale_rewards: Scale = "group",
    mask_truncated_completions: bool = False,
    max_completion_length: Count | None = None,
    entropy_coef: NotNegative = 0.0,
    dynamic_sampling: bool = False,
    updates_per_batch: Count = 1,
    minibatches: Count = 1,
    token_metrics: bool = False,
) -> Pipeline:
    """GRPO on some of each prompt's samples: the shortest, or those with the most reward per token.

    Source: arXiv:2508.09726."""
    if num_remains_in_group >= num_generations:
        raise ConfigError(
            f"options.num_remains_in_group={num_remains_in_group} of options.num_generations={num_generations}: all "
            "samples remain; lower the one, raise the other, or use grpo"
        )
    base = grpo(
        num_generations=num_generations,
        loss_type=loss_type,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        beta=beta,
        correction=correction,
        correction_min=correction_min,
        correction_max=correction_max,
        scale_rewards=scale_rewards,
        mask_truncated_completions=mask_truncated_completions,
        max_completion_length=max_completion_length,
        entropy_coef=entropy_coef,
        updates_per_batch=updates_per_batch,
        minibatches=minibatches,
        token_metrics=token_metrics,
    )
    scores = load(group_filter, "options.group_filter") if is_plugin(group_filter) else FILTERS[group_filter]
    removed = rejected == "removed"
    chosen = {"scores": scores, "count": num_remains_in_group}
    stages = list(base)
    if not removed:
        (index,) = (index for index, stage in enumerate(stages) if stage.call is group_zscore)
        stages[index] = credit(group_zscore_of_some, chosen=highest, scale=scale_rewards, **chosen)
    scored = [stage.verb for stage in stages].index(Verb.SCORE) + 1
    filtering = (
        *when(removed, regroup(keep_highest, rows=num_remains_in_group, **chosen)),
        *when(dynamic_sampling, keep(has_signal)),
    )
    return base.with_stages(*stages[:scored], *filtering, *stages[scored:])
