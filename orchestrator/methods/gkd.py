"""Generalised knowledge distillation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.methods.teaching import from_teacher
from orchestrator.pipeline import AnsweredPrompts, Completions, Pipeline, Prompts, generate, one_of, take


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
    learn = from_teacher(beta=beta, top_k=teacher_top_k, temperature=temperature)
    student, teacher = generate("rollout"), generate("teacher_rollout")
    if lmbda == 1:
        return Pipeline(Prompts, student, *learn)
    if lmbda == 0:
        return Pipeline(Prompts, teacher, *learn) if seq_kd else Pipeline(Completions, *learn)
    if seq_kd:
        return Pipeline(Prompts, *one_of(lmbda, student, teacher), *learn)
    return Pipeline(AnsweredPrompts, *one_of(lmbda, student, take()), *learn)
