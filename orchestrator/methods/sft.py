"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from actors.errors import ConfigError
from orchestrator.losses.declare import LossFunction
from orchestrator.losses.likelihood import dft, nll
from orchestrator.losses.reduce import token_mean
from orchestrator.pipeline import Completions, Pipeline, update

LOSSES: dict[str, LossFunction] = {"nll": nll, "dft": dft}


def sft(
    *,
    loss_type: Literal["nll", "dft"] = "nll",
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    token_metrics: bool = False,
) -> Pipeline:
    """Supervised fine-tuning: make the given completions likely. Every token of a batch weighs the same."""
    if label_smoothing and loss_type != "nll":
        raise ConfigError(f"options.label_smoothing={label_smoothing} needs options.loss_type=nll, not {loss_type}")
    smoothing = {"label_smoothing": label_smoothing} if label_smoothing else {}
    return Pipeline(
        Completions,
        update("policy", LOSSES[loss_type], reduce=token_mean, token_metrics=token_metrics, **smoothing),
    )
