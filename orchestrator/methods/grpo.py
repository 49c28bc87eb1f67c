"""Group-relative policy optimisation and the losses that grew from it."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from actors.errors import ConfigError
from orchestrator.credit.advantages import Scale, group_zscore, group_zscores_of_parts, has_signal, mask_truncated
from orchestrator.credit.returns import group_zscores_of_steps, only_scored
from orchestrator.losses.declare import Sum, Term
from orchestrator.losses.policy_gradient import (
    Correction,
    KlEstimator,
    Level,
    Old,
    adaptive_entropy_bonus,
    entropy_bonus,
    policy_gradient,
)
from orchestrator.losses.reduce import (
    Reduction,
    row_mean_of_token_means,
    row_mean_of_token_sums,
    token_mean,
    token_sum_over,
)
from orchestrator.losses.surrogates import (
    Distance,
    Surrogate,
    capped,
    clipped,
    geometric,
    smooth_weighted,
    soft_gated,
    trust_region,
)
from orchestrator.methods.importance_ratio import EPSILON, clips_nothing, correction_options, old_of
from orchestrator.methods.option_types import Count, NotNegative, Positive, Several, Supervision
from orchestrator.pipeline import (
    Pipeline,
    Prompts,
    Stage,
    credit,
    generate,
    infer,
    keep,
    replay,
    score,
    update,
    when,
)

REPLAY_MAX_AGE = 32  # steps
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "gmpo", "vespo", "dppo"]

LEVELS: dict[str, tuple[Level, ...]] = {  # of the importance ratio that a loss is defined for
    **dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo"), ("token", "sequence", "sequence_token")),
    **dict.fromkeys(("gmpo", "vespo", "dppo"), ("token",)),  # means or sums over a row, or a mask per token, inside
    "others": ("token", "sequence"),
}
OVER_TOKENS = frozenset({"bnpo", "dapo", "dr_grpo", "cispo"})
UNCLIPPED = frozenset({"cispo", "sapo", "vespo", "dppo"})  # they take no epsilon, or need it in any case
AGAINST_SAMPLER = frozenset({"vespo", "dppo"})  # their ratio is to the sampler already: nothing is left to correct


def grpo(
    *,
    num_generations: Several = 8,
    loss_type: LossType = "dapo",
    epsilon: Positive = EPSILON,
    epsilon_high: Positive | None = None,
    delta: Annotated[float, Field(gt=1)] | None = None,
    importance_sampling_level: Level = "token",
    beta: NotNegative = 0.0,
    kl_estimator: KlEstimator = "k3",
    use_bias_correction_kl: bool = True,
    correction: Correction = "none",
    correction_min: Positive | None = None,
    correction_max: Positive = 3.0,
    scale_rewards: Scale = "group",
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
    supervision: Supervision = "outcome",
    mask_truncated_completions: bool = False,
    max_completion_length: Count | None = None,
    off_policy_mask_threshold: float | None = None,
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0,
    entropy_coef: NotNegative = 0.0,
    use_adaptive_entropy: bool = False,
    entropy_target: Positive = 0.2,
    entropy_coef_delta: Positive = 0.005,
    entropy_coef_min: NotNegative = 0.0,
    entropy_coef_max: Positive = 1.0,
    sapo_temperature_pos: Positive = 1.0,
    sapo_temperature_neg: Positive = 1.05,
    dppo_distance: Distance = "binary_tv",
    dppo_threshold: Positive = 0.15,
    dynamic_sampling: bool = False,
    replay_buffer_size: Count | None = None,
    replay_max_age: Count = REPLAY_MAX_AGE,
    updates_per_batch: Count = 1,
    minibatches: Count = 1,
    token_metrics: bool = False,
) -> Pipeline:
    """Group-relative policy optimisation: a prompt's own samples are its baseline. Source: arXiv:2402.03300, eq. 3."""
    several_updates = updates_per_batch * minibatches > 1  # with one, the ratio is 1 and no pass is spent on old_logps
    surrogates: dict[str, Surrogate] = {
        "clipped": partial(clipped, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta),
        "cispo": partial(capped, cap=epsilon_high or epsilon),
        "sapo": partial(soft_gated, temperature_pos=sapo_temperature_pos, temperature_neg=sapo_temperature_neg),
        "gmpo": partial(geometric, epsilon=epsilon, epsilon_high=epsilon_high),
        "vespo": smooth_weighted,
        "dppo": partial(trust_region, distance=dppo_distance, threshold=dppo_threshold),
    }
    _check(loss_type, epsilon_high, importance_sampling_level, correction, kl_estimator, use_bias_correction_kl)
    old = _old(loss_type, several_updates, replays=replay_buffer_size is not None)
    clips = {"epsilon": epsilon != EPSILON, "epsilon_high": epsilon_high is not None, "delta": delta is not None}
    learn: dict[str, Any] = {  # each where it acts: what is not passed on is refused if it is set
        "surrogate": surrogates.get(loss_type, surrogates["clipped"]),
        "level": importance_sampling_level,
        "old": old,
        "off_policy_mask_threshold": off_policy_mask_threshold,
        "top_entropy_quantile": top_entropy_quantile,
        "token_metrics": token_metrics and not (entropy_coef or use_adaptive_entropy),  # the bonus reports the entropy
        **correction_options(correction, correction_min, correction_max),
    }
    if beta:
        learn |= {"beta": beta, "kl_estimator": kl_estimator, "use_bias_correction_kl": use_bias_correction_kl}
    bonus = Term(entropy_bonus, token_mean, entropy_coef, {"top_entropy_quantile": top_entropy_quantile})
    if use_adaptive_entropy:
        bounds = _entropy_bounds(entropy_coef, entropy_coef_min, entropy_coef_max)
        adapting = {**bounds, "target": entropy_target, "delta": entropy_coef_delta}
        bonus = Term(adaptive_entropy_bonus, token_mean, options={**bonus.options, **adapting})
    loss = Sum(Term(policy_gradient, _reduction(loss_type, max_completion_length), options=learn), bonus)
    separately = multi_objective_aggregation == "normalize_then_sum"
    by_steps = supervision == "process"
    if separately and by_steps:
        raise ConfigError(
            "options.multi_objective_aggregation=normalize_then_sum with options.supervision=process: rewards of steps "
            "are normalised apart from the others in any case; leave out one of the two"
        )
    return Pipeline(
        Prompts,
        generate("rollout", n=num_generations),
        score("reward", parts=separately, steps=by_steps),
        *when(dynamic_sampling, keep(has_signal)),
        *_replays(replay_buffer_size, replay_max_age, scale_rewards, dynamic_sampling, correction),
        *when(beta, infer("reference", into="ref_logps")),
        *when(old == "recorded", infer("policy", into="old_logps")),
        *when(mask_truncated_completions, credit(mask_truncated)),
        *_credits(scale_rewards, separately=separately, by_steps=by_steps),
        update("policy", loss, epochs=updates_per_batch, minibatches=minibatches),
        warnings=_warnings(loss_type, importance_sampling_level, old, clips=clips),
    )


def _credits(scale: Scale, *, separately: bool, by_steps: bool) -> tuple[Stage, ...]:
    """From rewards to advantages."""
    if by_steps:
        return credit(only_scored), credit(group_zscores_of_steps, scale=scale)
    return (credit(group_zscores_of_parts) if separately else credit(group_zscore, scale=scale),)


def _entropy_bounds(coefficient: float, lowest: float, highest: float) -> dict[str, float]:
    """Raises ConfigError for a coefficient that does not begin within its bounds."""
    if not lowest <= coefficient <= highest:
        raise ConfigError(
            f"options.entropy_coef={coefficient:g} is where the coefficient begins to adapt, and not within "
            f"options.entropy_coef_min={lowest:g} and options.entropy_coef_max={highest:g}; bring it within them"
        )
    return {"coefficient": coefficient, "lowest": lowest, "highest": highest}


def _old(loss_type: str, several_updates: bool, *, replays: bool) -> Old:
    """What was replayed was sampled with older weights than the batch: of each row, its own sampler is known."""
    return "sampler" if replays or loss_type in AGAINST_SAMPLER else old_of(several_updates)


def _replays(
    size: int | None, max_age: int, scale: Scale, dynamic_sampling: bool, correction: str
) -> tuple[Stage, ...]:
    """The stage that replays groups; none without a buffer. Raises ConfigError for options that do not go together."""
    if size is None:
        if max_age != REPLAY_MAX_AGE:
            raise ConfigError(
                f"options.replay_max_age={max_age} does nothing without a buffer: set options.replay_buffer_size"
            )
        return ()
    if dynamic_sampling:
        raise ConfigError(
            f"options.replay_buffer_size={size} with options.dynamic_sampling: groups without a spread are drawn "
            "again, so there is none whose place a replayed one could take; leave out one of the two"
        )
    if correction != "none":
        raise ConfigError(
            f"options.replay_buffer_size={size}: with replay, ratios are taken to each sample's own sampler; set "
            "options.correction=none"
        )
    return (replay(size=size, max_age=max_age, scale=scale),)


def _reduction(loss_type: str, max_completion_length: int | None) -> Reduction:
    """What each loss type is summed over and divided by."""
    reductions = {
        "grpo": row_mean_of_token_means,
        "sapo": row_mean_of_token_means,
        "gmpo": row_mean_of_token_means,
        "luspo": row_mean_of_token_sums,
        "bnpo": token_mean,
        "dapo": token_mean,
        "cispo": token_mean,
        "vespo": token_mean,
        "dppo": token_mean,
    }
    if loss_type != "dr_grpo":
        return reductions[loss_type]
    if max_completion_length is None:
        raise ConfigError("options.loss_type=dr_grpo divides by options.max_completion_length: set it")
    return token_sum_over(max_completion_length)


def _check(
    loss_type: str, epsilon_high: float | None, level: Level, correction: str, kl_estimator: str, unbiased: bool
) -> None:
    """Raises ConfigError for options that do not go together."""
    if loss_type == "cispo" and epsilon_high is None:
        raise ConfigError("options.loss_type=cispo caps the ratio at options.epsilon_high (5.0, say): set it")
    if loss_type in AGAINST_SAMPLER and correction != "none":
        raise ConfigError(f"options.loss_type={loss_type} takes its ratio to the sampler; set options.correction=none")
    if level not in LEVELS.get(loss_type, LEVELS["others"]):
        allowed = " or ".join(LEVELS.get(loss_type, LEVELS["others"]))
        raise ConfigError(
            f"options.importance_sampling_level={level} is not defined for options.loss_type={loss_type}, which has a "
            f"level of its own; set options.importance_sampling_level={allowed}"
        )
    if kl_estimator == "k1" and not unbiased:
        raise ConfigError(
            "options.kl_estimator=k1 with options.use_bias_correction_kl=false: the gradient of lp - ref has mean 0 "
            "and holds the policy near to nothing; leave out one of the two"
        )


def _warnings(loss_type: str, level: Level, old: Old, *, clips: dict[str, bool]) -> tuple[str, ...]:
    """Options that act, but perhaps not as one thinks."""
    set_options = {name: is_set and loss_type not in UNCLIPPED for name, is_set in clips.items()}
    found = list(clips_nothing(old, {**set_options, "importance_sampling_level": level == "sequence_token"}))
    if level == "sequence" and loss_type in OVER_TOKENS:
        found.append(
            f"options.importance_sampling_level=sequence with options.loss_type={loss_type}, which sums over tokens: a "
            "row's ratio counts as often as it has tokens; options.loss_type=grpo weighs every row the same"
        )
    if level != "sequence" and loss_type == "luspo":
        found.append(
            f"options.loss_type=luspo is meant for options.importance_sampling_level=sequence; with {level} it weighs "
            "long completions more"
        )
    return tuple(found)
