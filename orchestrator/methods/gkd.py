"""Generalised knowledge distillation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.losses.distillation import TEACHER_TOP_K, distil, distil_top_k
from orchestrator.losses.reduce import token_mean
from orchestrator.pipeline import (
    AnsweredPrompts,
    Completions,
    Pipeline,
    Prompts,
    Stage,
    generate,
    infer_top_k,
    one_of,
    take,
    update,
)


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
    learn = _from_companion(beta, temperature)
    if teacher_top_k is not None:
        learn = _from_top_k(teacher_top_k, beta, temperature)
    student, teacher = generate("rollout"), generate("teacher_rollout")
    if lmbda == 1:
        return Pipeline(Prompts, student, *learn)
    if lmbda == 0:
        return Pipeline(Prompts, teacher, *learn) if seq_kd else Pipeline(Completions, *learn)
    if seq_kd:
        return Pipeline(Prompts, *one_of(lmbda, student, teacher), *learn)
    return Pipeline(AnsweredPrompts, *one_of(lmbda, student, take()), *learn)


def _from_companion(beta: float, temperature: float) -> tuple[Stage, ...]:
    return (update("policy", distil, reduce=token_mean, companion="teacher", beta=beta, temperature=temperature),)


def _from_top_k(k: int, beta: float, temperature: float) -> tuple[Stage, ...]:
    """The teacher in processes of its own, of any size; k of its tokens go over the wire."""
    return (
        infer_top_k("teacher", into=TEACHER_TOP_K, k=k, temperature=temperature),
        update("policy", distil_top_k, reduce=token_mean, beta=beta, temperature=temperature),
    )
