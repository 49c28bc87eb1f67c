"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.losses.likelihood import dft, nll
from orchestrator.losses.reduce import token_mean
from orchestrator.pipeline import Completions, Pipeline, update


def sft(
    *,
    loss_type: Literal["nll", "dft"] = "nll",
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    token_metrics: bool = False,
) -> Pipeline:
    """Supervised fine-tuning: make the given completions likely. Every token of a batch weighs the same."""
    learn = {
        "nll": update("policy", nll, reduce=token_mean, label_smoothing=label_smoothing, token_metrics=token_metrics),
        "dft": update("policy", dft, reduce=token_mean, token_metrics=token_metrics),
    }
    return Pipeline(Completions, learn[loss_type])
