"""Group-relative policy optimisation and the losses that grew from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from actors.errors import ConfigError
from orchestrator.advantages import Scale, group_zscore, has_signal, mask_truncated
from orchestrator.losses.policy_gradient import Correction, Level, clipped, policy_gradient
from orchestrator.losses.reduce import Reduction, row_mean_of_token_means, token_mean, token_sum_over
from orchestrator.pipeline import Pipeline, Prompts, credit, generate, keep, logps, score, update, when

Positive = Annotated[float, Field(gt=0)]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


def grpo(
    *,
    num_generations: Annotated[int, Field(ge=2)] = 8,
    loss_type: LossType = "dapo",
    epsilon: Positive = 0.2,
    epsilon_high: Positive | None = None,
    delta: Annotated[float, Field(gt=1)] | None = None,
    importance_sampling_level: Level = "token",
    beta: Annotated[float, Field(ge=0)] = 0.0,
    use_bias_correction_kl: bool = True,
    correction: Correction = "none",
    correction_min: Positive | None = None,
    correction_max: Positive = 3.0,
    scale_rewards: Scale = "group",
    mask_truncated_completions: bool = False,
    max_completion_length: Annotated[int, Field(ge=1)] | None = None,
    off_policy_mask_threshold: float | None = None,
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0,
    dynamic_sampling: bool = False,
    updates_per_batch: Annotated[int, Field(ge=1)] = 1,
    minibatches: Annotated[int, Field(ge=1)] = 1,
    token_metrics: bool = False,
) -> Pipeline:
    """Group-relative policy optimisation: a prompt's own samples are its baseline. Source: arXiv:2402.03300, eq. 3."""
    several_updates = updates_per_batch * minibatches > 1  # with one, the ratio is 1 and no pass is spent on old_logps
    return Pipeline(
        Prompts,
        generate("rollout", n=num_generations),
        score("reward"),
        *when(dynamic_sampling, keep(has_signal)),
        *when(beta, logps("reference", into="ref_logps")),
        *when(several_updates, logps("policy", into="old_logps")),
        *when(mask_truncated_completions, credit(mask_truncated)),
        credit(group_zscore, scale=scale_rewards),
        update(
            "policy",
            policy_gradient,
            reduce=_reduction(loss_type, max_completion_length),
            epochs=updates_per_batch,
            minibatches=minibatches,
            surrogate=partial(clipped, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta),
            level=importance_sampling_level,
            old="recorded" if several_updates else "current",
            correction=correction,
            correction_min=correction_min,
            correction_max=correction_max,
            off_policy_mask_threshold=off_policy_mask_threshold,
            top_entropy_quantile=top_entropy_quantile,
            beta=beta,
            use_bias_correction_kl=use_bias_correction_kl,
            token_metrics=token_metrics,
        ),
    )



def _reduction(loss_type: str, max_completion_length: int | None) -> Reduction:
    if loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ConfigError("options.loss_type=dr_grpo divides by options.max_completion_length: set it")
        return token_sum_over(max_completion_length)
    return {"grpo": row_mean_of_token_means, "bnpo": token_mean, "dapo": token_mean}[loss_type]
