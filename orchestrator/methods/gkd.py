"""Generalised knowledge distillation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from actors.errors import ConfigError
from orchestrator.losses.distillation import TEACHER_TOP_K, distil, distil_top_k
from orchestrator.losses.reduce import token_mean
from orchestrator.pipeline import Completions, Pipeline, Prompts, Stage, generate, infer_top_k, update


def gkd(
    *,
    lmbda: Annotated[float, Field(ge=0, le=1)] = 1.0,
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    seq_kd: bool = False,
    teacher_top_k: Annotated[int, Field(ge=1)] | None = None,
) -> Pipeline:
    """Generalised knowledge distillation: draw the student's distributions towards those of a teacher, whose model
    lives in the student's ranks, or in ranks of its own with `teacher_top_k`.

    Source: arXiv:2306.13649, algorithm 1."""
    if 0 < lmbda < 1:
        raise ConfigError(
            f"options.lmbda={lmbda:g}: steps on the student's samples are not mixed with steps on other completions; "
            "set 1 (all sampled by the student) or 0 (all from the data, or with options.seq_kd from the teacher), one "
            "phase after the other if you want both"
        )
    learn = _from_companion(beta, temperature)
    if teacher_top_k is not None:
        learn = _from_top_k(teacher_top_k, beta, temperature)
    if lmbda:
        return Pipeline(Prompts, generate("rollout", n=1), *learn)
    return Pipeline(Prompts, generate("teacher_rollout", n=1), *learn) if seq_kd else Pipeline(Completions, *learn)


def _from_companion(beta: float, temperature: float) -> tuple[Stage, ...]:
    return (update("policy", distil, reduce=token_mean, companion="teacher", beta=beta, temperature=temperature),)


def _from_top_k(k: int, beta: float, temperature: float) -> tuple[Stage, ...]:
    """The teacher in processes of its own, of any size; k of its tokens go over the wire."""
    return (
        infer_top_k("teacher", into=TEACHER_TOP_K, k=k, temperature=temperature),
        update("policy", distil_top_k, reduce=token_mean, beta=beta, temperature=temperature),
    )
