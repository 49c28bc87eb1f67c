"""Generalised knowledge distillation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from actors.errors import ConfigError
from orchestrator.losses.distillation import distil
from orchestrator.losses.reduce import token_mean
from orchestrator.pipeline import Completions, Pipeline, Prompts, generate, update


def gkd(
    *,
    lmbda: Annotated[float, Field(ge=0, le=1)] = 1.0,
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    seq_kd: bool = False,
) -> Pipeline:
    """Generalised knowledge distillation: draw the student's distributions towards those of a teacher.

    Source: arXiv:2306.13649, algorithm 1."""
    if 0 < lmbda < 1:
        raise ConfigError(
            f"options.lmbda={lmbda:g}: steps on the student's samples are not mixed with steps on other completions; "
            "set 1 (all sampled by the student) or 0 (all from the data, or with options.seq_kd from the teacher), one "
            "phase after the other if you want both"
        )
    learn = update("policy", distil, reduce=token_mean, companion="teacher", beta=beta, temperature=temperature)
    if lmbda:
        return Pipeline(Prompts, generate("rollout", n=1), learn)
    return Pipeline(Prompts, generate("teacher_rollout", n=1), learn) if seq_kd else Pipeline(Completions, learn)
