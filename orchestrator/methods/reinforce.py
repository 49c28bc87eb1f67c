"""REINFORCE with a baseline that costs no critic: leave-one-out, and REINFORCE++ with and without a group's mean."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.errors import ConfigError
from orchestrator.credit.advantages import clipped_rewards, group_zscore, has_signal, leave_one_out, mask_truncated
from orchestrator.credit.returns import (
    group_zscores_of_steps,
    kl_in_reward,
    only_scored,
    returns_to_go,
    reward_at_the_end,
    reward_less_kl,
    whitened_advantages,
)
from orchestrator.losses.policy_gradient import Correction, RatioLevel, policy_gradient
from orchestrator.losses.reduce import Reduction, row_mean_of_token_means, token_mean
from orchestrator.losses.surrogates import clipped
from orchestrator.methods.importance_ratio import EPSILON, clips_nothing, correction_options, old_of
from orchestrator.methods.option_types import Count, NotNegative, Positive, Several, Share, Supervision
from orchestrator.pipeline import Pipeline, Prompts, Stage, credit, generate, infer, keep, score, update, when

Range = tuple[float, float]


def rloo(
    *,
    num_generations: Several = 2,
    beta: NotNegative = 0.05,
    epsilon: Positive = EPSILON,
    epsilon_high: Positive | None = None,
    reward_clip_range: Range | None = None,
    normalize_advantages: bool = False,
    mask_truncated_completions: bool = False,
    correction: Correction = "none",
    correction_min: Positive | None = None,
    correction_max: Positive = 3.0,
    dynamic_sampling: bool = False,
    updates_per_batch: Count = 1,
    minibatches: Count = 1,
    token_metrics: bool = False,
) -> Pipeline:
    """REINFORCE with leave-one-out: a sample's baseline is the mean of its siblings. Source: arXiv:2402.14740."""
    learn = _Learning(updates_per_batch, minibatches, epsilon, epsilon_high, token_metrics)
    corrected = correction_options(correction, correction_min, correction_max)
    return Pipeline(
        Prompts,
        generate("rollout", n=num_generations),
        score("reward"),
        *when(dynamic_sampling, keep(has_signal)),
        *when(beta, infer("reference", into="ref_logps")),
        *when(beta or learn.several, infer("policy", into="old_logps")),
        *_clipped(reward_clip_range),
        *when(beta, credit(reward_less_kl, coefficient=beta)),
        credit(leave_one_out, normalise=normalize_advantages),
        *when(mask_truncated_completions, credit(mask_truncated)),
        learn.stage(row_mean_of_token_means, level="sequence_product", **corrected),
        warnings=learn.warnings,
    )


def reinforce_pp(
    *,
    num_generations: Count = 1,
    beta: NotNegative = 0.01,
    gamma: Share = 1.0,
    normalize_advantages: bool = True,
    epsilon: Positive = EPSILON,
    epsilon_high: Positive | None = None,
    reward_clip_range: Range | None = None,
    mask_truncated_completions: bool = False,
    correction: Correction = "none",
    correction_min: Positive | None = None,
    correction_max: Positive = 3.0,
    updates_per_batch: Count = 1,
    minibatches: Count = 1,
    token_metrics: bool = False,
) -> Pipeline:
    """REINFORCE++: what is still to be earned from each token on, normalised over the whole batch in place of a critic.

    Source: arXiv:2501.03262."""
    learn = _Learning(updates_per_batch, minibatches, epsilon, epsilon_high, token_metrics)
    corrected = correction_options(correction, correction_min, correction_max)
    return Pipeline(
        Prompts,
        generate("rollout", n=num_generations),
        score("reward"),
        *when(beta, infer("reference", into="ref_logps")),
        *when(beta or learn.several, infer("policy", into="old_logps")),
        credit(only_scored),
        *when(mask_truncated_completions, credit(mask_truncated)),
        *_clipped(reward_clip_range),
        credit(kl_in_reward, coefficient=beta) if beta else credit(reward_at_the_end),
        credit(returns_to_go, gamma=gamma, whiten=normalize_advantages),
        learn.stage(token_mean, level="token", **corrected),
        warnings=learn.warnings,
    )


def reinforce_pp_baseline(
    *,
    num_generations: Several = 8,
    beta: NotNegative = 0.001,
    epsilon: Positive = EPSILON,
    epsilon_high: Positive | None = None,
    reward_clip_range: Range | None = None,
    supervision: Supervision = "outcome",
    mask_truncated_completions: bool = False,
    correction: Correction = "none",
    correction_min: Positive | None = None,
    correction_max: Positive = 3.0,
    dynamic_sampling: bool = False,
    updates_per_batch: Count = 1,
    minibatches: Count = 1,
    token_metrics: bool = False,
) -> Pipeline:
    """REINFORCE++ with baseline: rewards beyond their group's mean, normalised over the whole batch; KL in the loss.

    Source: arXiv:2501.03262."""
    learn = _Learning(updates_per_batch, minibatches, epsilon, epsilon_high, token_metrics)
    corrected = correction_options(correction, correction_min, correction_max)
    by_steps = supervision == "process"
    if by_steps and reward_clip_range is not None:
        raise ConfigError(
            f"options.reward_clip_range={list(reward_clip_range)} clips rewards of answers, and with "
            "options.supervision=process each step has its own, a probability; leave out one of the two"
        )
    kl: dict[str, Any] = {"beta": beta, "kl_estimator": "k2", "use_bias_correction_kl": False} if beta else {}
    return Pipeline(
        Prompts,
        generate("rollout", n=num_generations),
        score("reward", steps=by_steps),
        *when(dynamic_sampling, keep(has_signal)),
        *when(beta, infer("reference", into="ref_logps")),
        *when(learn.several, infer("policy", into="old_logps")),
        *_clipped(reward_clip_range),
        *when(mask_truncated_completions, credit(mask_truncated)),
        *when(by_steps, credit(only_scored), credit(group_zscores_of_steps, scale="none")),
        *when(not by_steps, credit(group_zscore, scale="none")),
        credit(whitened_advantages),
        learn.stage(token_mean, level="token", **kl, **corrected),
        warnings=learn.warnings,
    )


@dataclass(frozen=True)
class _Learning:
    """The clipped update that all of them end with."""

    updates_per_batch: int
    minibatches: int
    epsilon: float
    epsilon_high: float | None
    token_metrics: bool

    @property
    def several(self) -> bool:
        """Whether the ratio is other than 1, and needs the log-probabilities before the first update."""
        return self.updates_per_batch * self.minibatches > 1

    def stage(self, reduce: Reduction, *, level: RatioLevel, **options: Any) -> Stage:
        return update(
            "policy",
            policy_gradient,
            reduce=reduce,
            epochs=self.updates_per_batch,
            minibatches=self.minibatches,
            surrogate=partial(clipped, epsilon=self.epsilon, epsilon_high=self.epsilon_high),
            level=level,
            old=old_of(self.several),
            token_metrics=self.token_metrics,
            **options,
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        set_options = {"epsilon": self.epsilon != EPSILON, "epsilon_high": self.epsilon_high is not None}
        return clips_nothing(old_of(self.several), set_options)


def _clipped(bounds: Range | None) -> tuple[Stage, ...]:
    """The stage that brings rewards within bounds; none without. Raises ConfigError for bounds that hold nothing."""
    if bounds is None:
        return ()
    lowest, highest = bounds
    if lowest >= highest:
        raise ConfigError(
            f"options.reward_clip_range=[{lowest:g}, {highest:g}]: every reward would be the same; the first must be "
            "below the second"
        )
    return (credit(clipped_rewards, lowest=lowest, highest=highest),)
