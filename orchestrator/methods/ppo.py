"""Proximal policy optimisation with a critic of its own."""

from __future__ import annotations

from typing import Any

from actors.columns import Head
from actors.errors import ConfigError
from orchestrator.credit.returns import (
    Estimator,
    generalised_advantages,
    kl_in_reward,
    only_scored,
    reward_at_the_end,
    whitened_rewards,
    without_eos,
)
from orchestrator.losses.actor_critic import clipped_policy, clipped_value
from orchestrator.losses.reduce import token_mean
from orchestrator.methods.option_types import Count, NotNegative, Positive, Share
from orchestrator.pipeline import Pipeline, Prompts, Stage, credit, generate, infer, score, update, when

KL_HORIZON = 10_000


def ppo(
    *,
    num_generations: Count = 1,
    num_ppo_epochs: Count = 4,
    num_mini_batches: Count = 1,
    kl_coef: NotNegative = 0.05,
    kl_estimator: Estimator = "k1",
    kl_target: Positive | None = None,
    kl_horizon: Count = KL_HORIZON,
    missing_eos_penalty: NotNegative = 0.0,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    gamma: Share = 1.0,
    lam: Share = 0.95,
    cliprange: Positive = 0.2,
    cliprange_value: Positive | None = 0.2,
    token_metrics: bool = False,
) -> Pipeline:
    """Proximal policy optimisation: a critic says what each token was worth. Source: arXiv:1707.06347, section 3."""
    updates: dict[str, Any] = {"reduce": token_mean, "epochs": num_ppo_epochs, "minibatches": num_mini_batches}
    return Pipeline(
        Prompts,
        generate("rollout", n=num_generations),
        score("reward"),
        *when(kl_coef, infer("reference", into="ref_logps")),
        infer("policy", into="old_logps"),
        infer("value", into="values", head=Head.TOKEN_SCALAR),
        credit(only_scored),
        *when(missing_eos_penalty, credit(without_eos, penalty=missing_eos_penalty)),
        _rewards(kl_coef, kl_estimator, kl_target, kl_horizon),
        *when(whiten_rewards, credit(whitened_rewards)),
        credit(generalised_advantages, gamma=gamma, lam=lam, whiten=whiten_advantages),
        update("policy", clipped_policy, cliprange=cliprange, token_metrics=token_metrics, **updates),
        update("value", clipped_value, cliprange_value=cliprange_value, **updates),
    )


def _rewards(coefficient: float, estimator: Estimator, target: float | None, horizon: int) -> Stage:
    """Each option where it acts: what is not passed on is refused if it is set."""
    if not coefficient:
        if target is not None:
            raise ConfigError(
                f"options.kl_target={target:g} adapts options.kl_coef by factors, and 0 stays 0; set it to where it is "
                "to begin (0.2, say)"
            )
        return credit(reward_at_the_end)
    if target is None and horizon != KL_HORIZON:
        raise ConfigError(
            f"options.kl_horizon={horizon} says how fast options.kl_coef is adapted, and only options.kl_target adapts "
            "it: set that, or leave this out"
        )
    adaptive = {} if target is None else {"target": target, "horizon": horizon}
    return credit(kl_in_reward, coefficient=coefficient, estimator=estimator, **adaptive)
