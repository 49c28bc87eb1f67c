"""Process reward models from labelled steps."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.losses.reduce import token_mean
from orchestrator.losses.step_labels import step_cross_entropy
from orchestrator.pipeline import Pipeline, StepLabels, update


def process_reward_model(*, step_separator: str = "\n", train_on_last_step_only: bool = False) -> Pipeline:
    """A process reward model: say of each step of an answer, given the steps before it, whether it is right.

    Source: arXiv:2211.14275, section 2; arXiv:2305.20050, section 2.6."""
    data = replace(StepLabels, step_separator=step_separator, last_step_only=train_on_last_step_only)
    return Pipeline(data, update("reward_model", step_cross_entropy, reduce=token_mean))
