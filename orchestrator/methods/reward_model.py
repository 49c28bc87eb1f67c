"""Reward models from preference pairs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.losses.preference_models import bradley_terry
from orchestrator.losses.reduce import item_mean
from orchestrator.pipeline import PairsWithMargin, Pipeline, UncutPairs, update


def reward_model(
    *,
    use_margin: bool = False,
    center_rewards_coefficient: Annotated[float, Field(ge=0)] = 0.0,
) -> Pipeline:
    """A reward model: of each pair, score the chosen completion above the rejected one (Bradley-Terry).

    Source: arXiv:2203.02155, eq. 1."""
    return Pipeline(
        PairsWithMargin if use_margin else UncutPairs,
        update(
            "reward_model",
            bradley_terry,
            reduce=item_mean,
            use_margin=use_margin,
            centering=center_rewards_coefficient,
        ),
    )
